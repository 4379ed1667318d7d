"""Where the graph lies in an ONNX folder: `model.onnx` (onnxruntime-genai, plain onnxruntime) or `onnx/model_q4.onnx`
and its like (transformers.js). Its external data lies beside it, under names that the graph itself holds.

Refuses folders with no graph, and those with several among which nothing chooses.
Source: transformers.js 4.3, src/utils/dtypes.js and src/utils/model-loader.js.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from signround.errors import refuse

if TYPE_CHECKING:
    import onnx

GRAPH = "model.onnx"
SUBFOLDER = "onnx"  # where transformers.js looks
BROWSER_CONFIG = "transformers.js_config"  # its key in config.json
# What transformers.js appends to "model" for each dtype; other names it does not open.
SUFFIXES = {
    "fp32": "", "fp16": "_fp16", "int8": "_int8", "uint8": "_uint8", "q8": "_quantized", "q4": "_q4", "q2": "_q2",
    "q1": "_q1", "q4f16": "_q4f16", "q2f16": "_q2f16", "q1f16": "_q1f16", "bnb4": "_bnb4",
}  # fmt: skip


def graphs_in(folder: Path) -> list[Path]:
    """Every graph at a place where a runtime looks: `model.onnx` alone, or those of transformers.js."""
    if (folder / GRAPH).is_file():
        return [folder / GRAPH]
    names = (f"model{suffix}.onnx" for suffix in SUFFIXES.values())
    return sorted(path for name in names if (path := folder / SUBFOLDER / name).is_file())


def find_graph(folder: Path) -> Path:
    """The graph of `folder`. Among several of transformers.js, the one of the dtype that config.json names.

    Raises RefusedError when there is none, or no choice.
    """
    found = graphs_in(folder)
    if not found:
        raise refuse(
            f"the folder has no {GRAPH}, and no {SUBFOLDER}/model_q4.onnx or its like",
            "give a folder that `--to onnx` wrote",
            str(folder),
        )
    if len(found) > 1:
        chosen = folder / SUBFOLDER / f"model{SUFFIXES.get(_default_dtype(folder), '?')}.onnx"
        found = [chosen] if chosen in found else found
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise refuse(
            f"the folder holds several graphs ({names}) and config.json names none",
            f'set "{BROWSER_CONFIG}": {{"dtype": ...}} in config.json',
            str(folder),
        )
    return found[0]


def data_problem(model: onnx.ModelProto, folder: Path) -> str | None:
    """Why the external data of a graph in `folder` is not all there: a file that is missing, or too short."""
    ends: dict[str, int] = {}
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if "location" in where:
            end = int(where.get("offset", 0)) + int(where.get("length", 0))
            ends[where["location"]] = max(end, ends.get(where["location"], 0))
    for name, end in ends.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size < end:
            return f"{name} is cut short, {end:,} bytes are needed"
    return None


def _default_dtype(folder: Path) -> str:
    try:
        config: Any = json.loads((folder / "config.json").read_text())
        return str(config[BROWSER_CONFIG]["dtype"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
