"""Where the files of an exported folder lie and what they are called: one row a layout.

    genai             model.onnx, model.onnx.data, genai_config.json, tokenizer files    onnxruntime-genai, onnxruntime
    transformers.js   config.json, tokenizer files, onnx/model_q4.onnx, onnx/model_q4.onnx_data (then _data_1, ...)

transformers.js finds the graph by its dtype, which is a suffix of the name, and the data by counting: config.json says
how many files there are. It opens no other names, so weights that it has no suffix for are refused (`refusals_of`).
Source: transformers.js 4.3, src/utils/dtypes.js, src/utils/model-loader.js, src/configs.js.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exporters.onnx.packing import CONTAINER
from signround.errors import Refusal
from signround.plan import ModelPlan
from signround.runtimes.onnx_files import BROWSER_CONFIG, GRAPH, SUBFOLDER, SUFFIXES

GENAI, BROWSER = "genai", "transformers.js"
LAYOUTS = (GENAI, BROWSER)
CHUNK_BYTES = 2_000_000_000  # a browser's ArrayBuffer ends at 2^31
MOST_CHUNKS = 100  # MAX_EXTERNAL_DATA_CHUNKS of transformers.js
BROWSER_DTYPES = {("fp32", 2): "q2", ("fp32", 4): "q4", ("fp32", 8): "q8", ("fp16", 2): "q2f16", ("fp16", 4): "q4f16"}
# model_type of the decoders that transformers.js has a class and the names of a cache for
BROWSER_FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "granite", "olmo2"}
)  # fmt: skip


@dataclass(frozen=True)
class Places:
    """Paths below the exported folder; data files lie beside the graph and hold at most `chunk_bytes` each (None: one
    file holds all), but always whole tensors."""

    layout: str
    graph: str
    data: str
    chunk_bytes: int | None

    def data_file(self, index: int) -> str:
        """Name of data file `index`, as the graph writes it."""
        return self.data if index == 0 else f"{self.data}_{index}"

    def chunks(self, sizes: Sequence[int]) -> list[int]:
        """The data file of each tensor, in order, from their bytes."""
        found, used, current = [], 0, 0
        for size in sizes:
            if self.chunk_bytes is not None and used and used + size > self.chunk_bytes:
                used, current = 0, current + 1
            used += size
            found.append(current)
        return found


def places_of(layout: str, plan: ModelPlan, graph_dtype: str) -> Places:
    """Where the files of `plan` go; a layout that `refusals_of` let pass."""
    if layout == GENAI:
        return Places(layout, GRAPH, f"{GRAPH}.data", None)
    name = f"model{SUFFIXES[browser_dtype(plan, graph_dtype)]}.onnx"
    return Places(layout, f"{SUBFOLDER}/{name}", f"{name}_data", CHUNK_BYTES)


def browser_dtype(plan: ModelPlan, graph_dtype: str) -> str:
    """What transformers.js calls these weights ("q4"): the field width that most of them are stored in."""
    return BROWSER_DTYPES[graph_dtype, _most_bits(plan)]


def _most_bits(plan: ModelPlan) -> int:
    weights: Counter[int] = Counter()
    for layer in plan.layers():
        weights[CONTAINER.get(layer.grid.bits, 0)] += layer.rows * layer.columns
    return weights.most_common(1)[0][0]


def refusals_of(layout: str, plan: ModelPlan, graph_dtype: str) -> list[Refusal]:
    """Why this layout is not possible, of grids that the packer takes (it has refusals of its own for others)."""
    if layout not in LAYOUTS:
        problem = f"layout {layout!r} is not known; allowed are {', '.join(LAYOUTS)}"
        return [Refusal(problem, "choose one of them", "--layout")]
    if layout == GENAI:
        return []
    found = []
    family = plan.architecture.family
    if plan.architecture.mixture:
        problem = "the onnxruntime of transformers.js 4.3 does not load QMoE nodes with an accuracy_level"
        found.append(Refusal(problem, f"leave the layout at {GENAI}", "--layout"))
    elif family.model_type not in BROWSER_FAMILIES:
        problem = f"transformers.js has no class for {family.hf_class}"
        found.append(Refusal(problem, f"leave the layout at {GENAI}", "--layout"))
    bits = _most_bits(plan)
    if bits and (graph_dtype, bits) not in BROWSER_DTYPES:
        problem = f"transformers.js has no name for {bits}-bit weights in an {graph_dtype} graph"
        found.append(Refusal(problem, f"choose 2 or 4 bits, an fp32 graph, or layout {GENAI}", "--layout"))
    if not (plan.files / "tokenizer.json").is_file():
        problem = "the model has no tokenizer.json, the only tokenizer that transformers.js reads"
        found.append(Refusal(problem, f"leave the layout at {GENAI}, or convert the tokenizer", "--layout"))
    return found


def browser_notes(plan: ModelPlan, flavour: str) -> list[str]:
    """What transformers.js does otherwise than the other runtimes (measured with 4.3.1 and 3.8.1)."""
    notes = []
    if flavour == "contrib":
        notes.append(
            "onnx: transformers.js pads batches on the left, which GroupQueryAttention does not know: prompts of "
            "unequal length in one batch need `--set onnx.flavour=std`; one prompt at a time is right."
        )
    widths = {CONTAINER[layer.grid.bits] for layer in plan.layers()}
    if widths != {4} or flavour != "contrib":
        notes.append(
            "onnx: this file needs transformers.js 4; version 3 (onnxruntime 1.21) runs 4 bits in flavour contrib only."
        )
    return notes


def browser_config(plan: ModelPlan, places: Places, graph_dtype: str, data_files: int) -> dict[str, Any]:
    """config.json with what transformers.js wants to know: the dtype to open, the number of data files. Version 3 also
    needs the type of the cache where it is not float32; version 4 asks the graph."""
    dtype = browser_dtype(plan, graph_dtype)
    name = places.graph.removeprefix(f"{SUBFOLDER}/")
    settings: dict[str, Any] = {"dtype": dtype, "use_external_data_format": {name: data_files}}
    if graph_dtype == "fp16":
        settings["kv_cache_dtype"] = {dtype: "float16"}
    return {**plan.config, BROWSER_CONFIG: settings}
