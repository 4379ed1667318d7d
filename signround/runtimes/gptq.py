"""GPTQ folders in the loaders that people use, on a CPU: logits of every position.

`open_gptq`: transformers + optimum + gptqmodel, float32, the plain `gptq_torch` kernel, without compilation. (Left to
itself gptqmodel picks a kernel that computes in bfloat16, whatever dtype is asked for.)
`open_gptq_through_builder`: the onnxruntime-genai builder turns the folder into ONNX, onnxruntime runs it; an
implementation that shares nothing with the first. Both loaders live in child processes. Refuses when a loader is not
installed; 3 bits and gptq_v2 through the builder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from signround.errors import unavailable
from signround.runtimes.gptq_child import Child
from signround.runtimes.protocol import Speed

WORKER = "signround.runtimes.gptq_worker"
BUILDER = "signround.runtimes.gptq_builder_worker"
LOADERS = ("gptqmodel", "optimum")
BUILDER_LOADERS = ("onnxruntime_genai", "onnx_ir", "onnxruntime")
BUILDER_BITS = (2, 4, 8)
BUILDER_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # of others it splits, renames or adds to tensors
ONNX_BLOCKS = {16, 32, 64, 128, 256}
BATCH_TOKENS = 2048


class GptqRuntime:
    """A model in the worker process; fits `signround.runtimes.protocol.Runtime`."""

    affordable_positions: int | None = None

    def __init__(self, child: Child, loaded: Mapping[str, Any], owns_child: bool) -> None:
        self._child = child
        self._owns_child = owns_child
        self._model = loaded["model"]
        self.vocabulary: int = loaded["vocabulary"]
        self.scale_dtype: str = loaded["scale_dtype"]
        libraries = " + ".join(f"{name} {number}" for name, number in loaded["versions"].items())
        self.name = f"{libraries}, gptq_torch, float32 activations, {self.scale_dtype} scales"

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """See `Runtime.logits`."""
        for batch in _batches(windows):
            _, (values,) = self._child.ask({"do": "logits", "model": self._model}, [batch.contiguous().numpy()])
            yield torch.from_numpy(values)

    def speed(self, prompt: int = 128, new: int = 16) -> Speed | None:
        """None: on a CPU this is a reader; GPTQ files are run for their speed on GPUs."""
        return None

    def close(self) -> None:
        if self._owns_child:
            self._child.close()
        else:
            self._child.ask({"do": "unload", "model": self._model})


def start_gptq_child() -> Child:
    """A worker that several `open_gptq` calls can share (imports take 8 s).

    Raises UnavailableError without the extra.
    """
    _need(LOADERS, "gptq")
    return Child(WORKER, "the GPTQ loader (transformers + optimum + gptqmodel)")


def open_gptq(folder: Path, *, exact_products: bool = False, child: Child | None = None) -> GptqRuntime:
    """Load a GPTQ folder as its users do.

    The kernel multiplies fp16 scales with codes in fp16, so every weight is rounded to 11 bits: about 6e-4 of the
    logits' norm; it also keeps biases in fp16. `exact_products` widens the scales to float32 after loading and changes
    nothing else; then the logits are those of the decoded weights but for the order of sums.

    Raises UnavailableError without the extra, FailedError when loading fails or a tensor is missing, unexpected or of
    another shape.
    """
    worker = child or start_gptq_child()
    with ExitStack() as on_failure:
        if child is None:
            on_failure.callback(worker.close)
        request = {"do": "load", "folder": str(folder.resolve()), "exact_products": exact_products}
        loaded, _ = worker.ask(request)
        on_failure.pop_all()
    return GptqRuntime(worker, loaded, owns_child=child is None)


class BuilderRuntime:
    """The builder's ONNX model in onnxruntime; fits `signround.runtimes.protocol.Runtime`."""

    affordable_positions: int | None = None

    def __init__(self, model: Path, vocabulary: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        shape = json.loads((model.parent / "genai_config.json").read_text())["model"]["decoder"]
        self._past = (shape["num_key_value_heads"], 0, shape["head_size"])
        self.vocabulary = vocabulary
        libraries = f"onnxruntime-genai {version('onnxruntime-genai')} builder, onnxruntime {onnxruntime.__version__}"
        self.name = f"{libraries}, accuracy_level 0"

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """See `Runtime.logits`."""
        for batch in _batches(windows):
            empty = np.zeros((len(batch), *self._past), np.float32)
            feeds = {entry.name: empty for entry in self._session.get_inputs() if entry.name.startswith("past")}
            feeds |= {"input_ids": batch.numpy(), "attention_mask": np.ones(batch.shape, np.int64)}
            yield torch.from_numpy(self._session.run(["logits"], feeds)[0])

    def speed(self, prompt: int = 128, new: int = 16) -> Speed | None:
        """None: this is a reader."""
        return None

    def close(self) -> None:
        self._session = None


def start_builder_child() -> Child:
    """A worker that several `open_gptq_through_builder` calls can share. Raises UnavailableError without the extras."""
    _need(BUILDER_LOADERS, "genai,onnx")
    return Child(BUILDER, "the onnxruntime-genai builder")


def open_gptq_through_builder(folder: Path, workdir: Path, *, child: Child | None = None) -> BuilderRuntime:
    """Convert a GPTQ folder with the onnxruntime-genai builder into `workdir` and run it in onnxruntime.

    Raises UnavailableError for 3 bits (the builder has none), for gptq_v2 (it reads that as v1, with wrong logits and
    no error), for blocks that onnxruntime does not know, and for other families than BUILDER_FAMILIES.
    """
    config = json.loads((folder / "config.json").read_text())
    _refuse_for_builder(config, folder)
    out = workdir / "onnx"
    paths = {"folder": folder, "out": out, "cache": workdir / "cache"}
    with ExitStack() as at_end:
        worker = child or at_end.enter_context(start_builder_child())
        worker.ask({"do": "convert", **{key: str(path.resolve()) for key, path in paths.items()}})
    return BuilderRuntime(out / "model.onnx", config["vocab_size"])


def _refuse_for_builder(config: Mapping[str, Any], folder: Path) -> None:
    if config["model_type"] not in BUILDER_FAMILIES:
        raise unavailable(
            f"the onnxruntime-genai builder is asked for {', '.join(BUILDER_FAMILIES)} models, this is a "
            f"{config['model_type']!r}",
            "verify it through transformers + optimum + gptqmodel (`pip install 'signround[gptq]'`)",
            str(folder),
        )
    gptq = config["quantization_config"]
    version_read = gptq.get("checkpoint_format", "gptq")
    heads = config["num_attention_heads"]
    width = heads * (config.get("head_dim") or config["hidden_size"] // heads)
    rows = {config["hidden_size"], width, config["intermediate_size"]}
    blocks = rows if gptq["group_size"] == -1 else {gptq["group_size"]}
    if gptq["bits"] in BUILDER_BITS and version_read == "gptq" and blocks <= ONNX_BLOCKS:
        return
    raise unavailable(
        "the onnxruntime-genai builder reads 2, 4 and 8 bits in GPTQ v1 in blocks of 16, 32, 64, 128 or 256, "
        f"the folder holds {gptq['bits']}-bit {version_read} in blocks of {', '.join(map(str, sorted(blocks)))}",
        "verify it through transformers + optimum + gptqmodel (`pip install 'signround[gptq]'`)",
        str(folder),
    )


def _batches(windows: Tensor) -> Sequence[Tensor]:
    """Whole windows, about BATCH_TOKENS tokens at a time."""
    return torch.split(windows, max(1, BATCH_TOKENS // windows.shape[1]))


def _need(modules: Sequence[str], extra: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise unavailable(
            f"running GPTQ files needs {', '.join(missing)}, which is not installed",
            f"pip install 'signround[{extra}]'",
            "gptq",
        )
