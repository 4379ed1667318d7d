"""Which runtime opens which path. The table that `evaluate`, `verify` and `inspect` share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from signround.artifact import QuantizedCheckpoint, is_artifact
from signround.checkpoint import SourceCheckpoint
from signround.errors import refuse
from signround.runtimes.gguf_files import model_files
from signround.runtimes.onnx_files import GRAPH, SUBFOLDER, graphs_in
from signround.runtimes.protocol import Runtime

Kind = Literal["artifact", "gguf", "onnx", "gptq", "checkpoint"]


def kind_of(path: Path) -> Kind:
    """What lies at `path`. Raises RefusedError with what would be accepted."""
    if path.is_file() and path.suffix == ".gguf":
        return "gguf"
    if path.is_dir():
        if is_artifact(path):
            return "artifact"
        if list(path.glob("*.gguf")):
            return "gguf"
        if is_artifact(path / "artifact"):  # before ONNX: its onnx/ is not the one of transformers.js
            raise refuse(
                "this is the output folder of a job, not a model",
                f"give {path / 'artifact'}, or the folder of a format beside it",
                str(path),
            )
        if (path / "genai_config.json").is_file() or _is_onnx(path):
            return "onnx"
        if (path / "config.json").is_file():
            return "gptq" if _is_gptq(path / "config.json") else "checkpoint"
    if path.suffix == ".onnx" and path.is_file():
        folder = path.parent.parent if path.parent.name == SUBFOLDER and path.name != GRAPH else path.parent
        raise refuse("this is one file of an ONNX folder", f"give the folder, {folder}", str(path))
    raise refuse(
        "no model is found here; accepted are a Hugging Face folder, an artifact folder, a .gguf file, an ONNX folder "
        "and a GPTQ folder",
        "check the path",
        str(path),
    )


def open_target(path: Path, device: str = "cpu") -> Runtime:
    """The model at `path` in the runtime that its users run."""
    kind = kind_of(path)
    if kind == "artifact":
        from signround.runtimes.torch_blocks import tuned_model

        return tuned_model(QuantizedCheckpoint(path), device)
    if kind == "checkpoint":
        from signround.runtimes.torch_blocks import float_model

        return float_model(SourceCheckpoint(path), device)
    if kind == "gguf":
        from signround.runtimes.llama_cpp import open_llama_cpp

        return open_llama_cpp(model_files(path)[0])
    if kind == "onnx":
        from signround.runtimes.ort import open_onnxruntime

        return open_onnxruntime(path)
    from signround.runtimes.gptq import open_gptq

    return open_gptq(path)


def _is_onnx(path: Path) -> bool:
    """A checkpoint of the hub may carry graphs of transformers.js beside its weights: it is read as the checkpoint."""
    graphs = graphs_in(path)
    return bool(graphs) and (graphs[0].parent == path or not list(path.glob("*.safetensors")))


def _is_gptq(config: Path) -> bool:
    try:
        settings = json.loads(config.read_text())["quantization_config"]["quant_method"]
    except (ValueError, KeyError, TypeError):
        return False  # SourceCheckpoint names what is wrong with it
    return bool(settings == "gptq")
