"""Which type llama.cpp gives to each tensor: its own `llama_model_quantize` asked in dry runs, written as a table.

    python benchmarks/llama_cpp_types.py tests/data/llama_cpp_types.json

The table is what `tests/test_file_types.py` compares `signround.file_types` with, since llama-cpp-python needs a
compiler and CI has none. A dry run looks at the hyper-parameters, names and row lengths only, so each model here is an
empty file with the layers, heads and row lengths of a real one and four rows a matrix. Where llama.cpp would need an
importance matrix the row says "refused". Stops at anything else that llama.cpp refuses.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

ROWS = 4
NUMBERS = {
    "q2_k": 10, "q2_k_s": 21, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16,
    "q5_k_m": 17, "q6_k": 18, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q8_0": 7, "iq4_nl": 25, "iq4_xs": 30,
    "mxfp4": 38, "q2_0": 41,
}  # fmt: skip  # llama_ftype of include/llama.h
LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\w+), size = .*?MiB(?: -> .*?MiB \((\w+)\))?\n")


@dataclass(frozen=True)
class Model:
    """What the rules look at. `hidden`, `inner`, `expert_inner`: row lengths of the matrices that read the hidden
    state, of ffn_down and of ffn_down_exps; `attention`: of attn_output (heads times head size)."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    inner: int
    attention: int = 0
    experts: int = 0
    expert_inner: int = 0
    tied: bool = False
    fused_qkv: bool = False
    gated: bool = True  # False: no ffn_gate of its own (Phi-3 fuses it into ffn_up, Falcon has none)

    def parts(self) -> dict[str, int]:
        """Part -> row length, for one block."""
        columns = dict.fromkeys(("attn_qkv",) if self.fused_qkv else ("attn_q", "attn_k", "attn_v"), self.hidden)
        columns["attn_output"] = self.attention or self.hidden
        kinds = [("_exps", self.expert_inner)] if self.experts else []
        if self.inner:
            kinds.append(("_shexp" if self.experts else "", self.inner))
        for suffix, inner in kinds:
            columns |= {f"ffn_{part}{suffix}": self.hidden for part in (("gate", "up") if self.gated else ("up",))}
            columns[f"ffn_down{suffix}"] = inner
        return columns

    def outer(self) -> dict[str, int]:
        """Part -> row length, outside the blocks."""
        return dict.fromkeys(("token_embd",) if self.tied else ("token_embd", "output"), self.hidden)

    def as_row(self) -> dict[str, Any]:
        """What the test needs to know of it, as JSON."""
        names = ("architecture", "layers", "heads", "kv_heads", "experts", "tied")
        return {name: getattr(self, name) for name in names} | {"outer": self.outer(), "block": self.parts()}

    def tensors(self) -> dict[str, int]:
        """GGUF name -> row length of every matrix."""
        blocks = {
            f"blk.{block}.{part}.weight": columns
            for block in range(self.layers)
            for part, columns in self.parts().items()
        }
        return {f"{part}.weight": columns for part, columns in self.outer().items()} | blocks


MODELS = {
    "llama, 4 layers, tied": Model("llama", 4, 4, 4, 256, 768, tied=True),
    "llama, 8 layers, 4 queries a key": Model("llama", 8, 8, 2, 512, 1536),
    "llama, 32 layers": Model("llama", 32, 32, 32, 4096, 11008),
    "llama, 32 layers, 8 queries a key": Model("llama", 32, 32, 4, 4096, 14336),
    "llama, 80 layers, 8 queries a key (70B)": Model("llama", 80, 64, 8, 8192, 28672),
    "llama, 80 layers (65B)": Model("llama", 80, 64, 64, 8192, 22016),
    "llama, rows of 576 (SmolLM2-135M)": Model("llama", 30, 9, 3, 576, 1536, tied=True),
    "llama, ffn_down rows of 272": Model("llama", 8, 4, 4, 256, 272),
    "llama, rows of 48": Model("llama", 4, 4, 4, 48, 96),
    "llama, 8 experts (Mixtral-8x7B)": Model("llama", 32, 32, 8, 4096, 0, experts=8, expert_inner=14336),
    "llama, 8 experts, 80 layers, 8 queries a key": Model("llama", 80, 64, 8, 512, 0, experts=8, expert_inner=1024),
    "qwen2, 24 layers, rows of 896 (Qwen2.5-0.5B)": Model("qwen2", 24, 14, 2, 896, 4864, tied=True),
    "qwen2, 80 layers (72B)": Model("qwen2", 80, 64, 8, 8192, 29568),
    "qwen2moe, 24 layers, shared expert": Model(
        "qwen2moe", 24, 16, 16, 2048, 5632, experts=60, expert_inner=1408
    ),  # rows of 1408 are no multiple of 256
    "qwen3, 28 layers (Qwen3-0.6B)": Model("qwen3", 28, 16, 8, 1024, 3072, attention=2048, tied=True),
    "qwen3moe, 48 layers (Qwen3-30B-A3B)": Model(
        "qwen3moe", 48, 32, 4, 2048, 0, attention=4096, experts=128, expert_inner=768
    ),
    "gemma, 18 layers (Gemma-2B)": Model("gemma", 18, 8, 1, 2048, 16384, tied=True),
    "gemma3, 26 layers, rows of 1152 (Gemma3-1B)": Model("gemma3", 26, 4, 1, 1152, 6912, attention=1024, tied=True),
    "phi3, 32 layers": Model("phi3", 32, 32, 32, 3072, 8192, fused_qkv=True, gated=False),
    "falcon, 32 layers": Model("falcon", 32, 32, 1, 4096, 16384, fused_qkv=True, gated=False),
}

# (model, file type, overrides): the first match wins, overridden tensors do not count, and rows still must divide.
OVERRIDDEN = (
    ("llama, 32 layers", "q4_k_m", [("ffn_down", "q6_k")]),
    ("llama, 32 layers", "q4_k_m", [(r"blk\.[0-3]\.attn_v", "q8_0"), ("ffn_down", "q5_k")]),
    ("llama, 32 layers", "q3_k_m", [(r"blk\.1?[02468]\.(attn_v|ffn_down)", "f16"), ("attn_v", "iq4_xs")]),
    ("llama, 32 layers", "q4_0", [("^output", "q8_0"), ("TOKEN_EMBD", "bf16"), ("attn_q", "f32")]),
    ("llama, 4 layers, tied", "q2_k", [("output", "q5_1"), ("embd", "mxfp4")]),
    ("llama, rows of 576 (SmolLM2-135M)", "q4_0", [("attn_k", "q6_k"), ("ffn_up", "q2_0"), ("ffn_gate", "iq4_xs")]),
    ("llama, ffn_down rows of 272", "q4_0", [("ffn_down", "q3_k")]),
    ("llama, ffn_down rows of 272", "q4_k_m", [("ffn_down", "q8_0")]),
    ("llama, 8 experts (Mixtral-8x7B)", "mxfp4", [("attn_v", "q6_k"), ("down_exps", "iq4_nl")]),
    ("qwen3moe, 48 layers (Qwen3-30B-A3B)", "q4_k_m", [(r"\.[0-9]\.ffn_down", "q5_k")]),
)


def write_model(path: Path, model: Model) -> None:
    """A GGUF file of `model` with a hole for weights; only what `llama_model_quantize` reads."""
    import gguf

    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_block_count(model.layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.inner or model.expert_inner)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-6)
    writer.add_sliding_window(1024)
    writer.add_expert_count(model.experts)
    writer.add_expert_used_count(2 if model.experts else 0)
    writer.add_expert_feed_forward_length(model.expert_inner)
    head_length = (model.attention or model.hidden) // model.heads
    for add_length in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add_length(head_length)
    for name, columns in model.tensors().items():
        shape = (2, ROWS, columns) if "_exps" in name else (ROWS, columns)  # the rules ask for three axes, not for more
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    size = sum(8 * ROWS * columns * 4 + 64 for columns in model.tensors().values())
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size + size)  # a hole: a dry run maps the data and does not read it


class LlamaCpp:
    """llama.cpp's quantiser, asked for types only. Its log is the one place that names them."""

    def __init__(self) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.log: list[str] = []
        self._callback = llama_cpp.llama_log_callback(lambda level, text, data: self.log.append(text.decode()))
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def types(
        self, path: Path, number: int, importance: bool, overrides: Sequence[tuple[str, str]] = ()
    ) -> dict[str, str] | None:
        """GGUF tensor name -> type in lower case, or None where llama.cpp needs an importance matrix."""
        import gguf

        api = self.api
        settings = api.llama_model_quantize_default_params()
        settings.nthread, settings.ftype, settings.dry_run = 1, number, True
        numbers = (ctypes.c_float * 1)(1.0)
        matrix = (api.llama_model_imatrix_data * 2)()  # one entry that no tensor has, then the empty one that ends it
        matrix[0].name, matrix[0].data, matrix[0].size = b"none", numbers, 1
        if importance:
            settings.imatrix = matrix
        table = (api.llama_model_tensor_override * (len(overrides) + 1))()
        for row, (pattern, name) in zip(table, overrides, strict=False):
            # gguf 0.19 does not know q2_0
            row.type = 42 if name == "q2_0" else gguf.GGMLQuantizationType[name.upper()].value
            row.pattern = pattern.lower().encode()
        if overrides:
            settings.tt_overrides = table
        self.log.clear()
        if api.llama_model_quantize(str(path).encode(), b"", ctypes.byref(settings)) != 0:
            raise RuntimeError("".join(self.log).strip().splitlines()[-1])
        log = "".join(self.log)
        if "will require an imatrix" in log:
            return None
        return {name: (new or old).lower() for name, old, new in LINE.findall(log)}


def compact(model: Model, types: dict[str, str] | None) -> dict[str, str] | str:
    """{"rest": commonest type, part: its type or the run of types over the blocks, "q6_k*4 q4_k ..."}."""
    if types is None:
        return "refused"
    if types.keys() != model.tensors().keys():
        raise RuntimeError(f"llama.cpp's log names {len(types)} tensors of {len(model.tensors())}")
    runs = {part: types[f"{part}.weight"] for part in model.outer()}
    for part in model.parts():
        layers = [types[f"blk.{block}.{part}.weight"] for block in range(model.layers)]
        groups = [(name, len(list(group))) for name, group in groupby(layers)]
        whole = len(groups) == 1
        runs[part] = layers[0] if whole else " ".join(f"{name}*{n}" if n > 1 else name for name, n in groups)
    every = sorted(types.values())
    rest = max(every, key=every.count)
    return {"rest": rest} | {part: run for part, run in runs.items() if run != rest}


def version() -> str:
    import llama_cpp

    ggml = next((Path(llama_cpp.__file__).parent.parent / "lib").glob("libggml-base.so.0.*"), None)
    return f"llama-cpp-python {llama_cpp.__version__}" + (f", ggml {ggml.name.split('.so.')[1]}" if ggml else "")


def make_table(folder: Path) -> dict[str, Any]:
    """The whole table. `folder` is for the models' files, a few megabytes."""
    quantiser = LlamaCpp()
    table: dict[str, Any] = {"made by": version(), "models": {}, "types": {}, "overridden": []}
    for name, model in MODELS.items():
        path = folder / "model.gguf"
        write_model(path, model)
        table["models"][name] = model.as_row()
        rows = table["types"][name] = {}
        for file_type, number in NUMBERS.items():
            without, with_importance = (compact(model, quantiser.types(path, number, known)) for known in (False, True))
            rows[file_type] = with_importance
            if without != with_importance:
                rows[f"{file_type} without importance"] = without
        for other, file_type, overrides in OVERRIDDEN:
            if other == name:
                types = compact(model, quantiser.types(path, NUMBERS[file_type], True, overrides))
                table["overridden"].append([name, file_type, overrides, types])
    return table


def to_text(table: dict[str, Any]) -> str:
    """JSON with one row a line, so that a difference reads as one."""
    lines = [f'{{"made by": {json.dumps(table["made by"])},']
    models = [f"{json.dumps(name)}: {json.dumps(model)}" for name, model in table["models"].items()]
    lines.append('"models": {\n' + ",\n".join(models) + "\n},")
    types = []
    for name, rows in table["types"].items():
        entries = [f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items()]
        types.append(f"{json.dumps(name)}: {{\n" + ",\n".join(entries) + "\n}")
    lines.append('"types": {\n' + ",\n".join(types) + "\n},")
    lines.append('"overridden": [\n' + ",\n".join(json.dumps(row) for row in table["overridden"]) + "\n]}")
    return "\n".join(lines) + "\n"


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python {sys.argv[0]} TABLE.json")
    with tempfile.TemporaryDirectory() as folder:
        table = make_table(Path(folder))
    Path(sys.argv[1]).write_text(to_text(table))
    refused = sum(row == "refused" for rows in table["types"].values() for row in rows.values())
    rows = sum(map(len, table["types"].values()))
    print(f"{table['made by']}: {len(MODELS)} models, {rows} rows, {refused} refused, {len(OVERRIDDEN)} overridden")


if __name__ == "__main__":
    main()
