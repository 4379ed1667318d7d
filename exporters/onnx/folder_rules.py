"""What the files beside a graph must say: genai_config.json and config.json against the graph, the tokenizer.

A runtime that reads them feeds, allocates and stops by what they say; the graph alone would still run in plain
onnxruntime, so nothing else notices. Any folder may be asked about: what only our exporter is known to write is asked
of `ours` alone. What a user may change at will (sampling, `max_length` within the context) is none of our business.
Source: src/config.cpp of onnxruntime-genai 0.18; src/configs.js and src/utils/model-loader.js of transformers.js 4.3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from signround.runtimes.genai import CONFIG
from signround.runtimes.onnx_files import BROWSER_CONFIG, SUBFOLDER, SUFFIXES

if TYPE_CHECKING:
    import onnx_ir as ir

# What onnxruntime-genai feeds unless the configuration names it otherwise.
INPUTS = {
    "input_ids": "input_ids", "attention_mask": "attention_mask", "position_ids": "position_ids",
    "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
}  # fmt: skip


def folder_problems(model: ir.Model, graph: Path, folder: Path, *, ours: bool) -> Iterator[str]:
    """Every problem of the files beside `graph`, which lies in `folder` or below it."""
    if graph.parent != folder:
        yield from _browser_problems(model, graph, folder / "config.json", ours=ours)
    elif ours or (folder / CONFIG).is_file():
        yield from _genai_problems(model, graph, folder / CONFIG)
    yield from _tokenizer_problems(folder)


def _object(path: Path) -> dict[str, Any] | str:
    """The JSON object of a file, or what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, ValueError):
        return f"{path.name} is damaged"
    return found if isinstance(found, dict) else f"{path.name} is damaged"


def _section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def _tokenizer_problems(folder: Path) -> Iterator[str]:
    path = folder / "tokenizer.json"
    if path.is_file():
        found = _object(path)
        if isinstance(found, str) or "model" not in found:
            yield f"{path.name} is damaged"
    elif (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.model").is_file():
        yield f"{path.name} is missing"


def _genai_problems(model: ir.Model, graph: Path, path: Path) -> Iterator[str]:
    settings = _object(path)
    if isinstance(settings, str):
        yield settings
        return
    whole = _section(settings, "model")
    decoder = _section(whole, "decoder")
    if decoder.get("filename") != graph.name:
        yield f"{CONFIG}: the graph is {graph.name}, model.decoder.filename says {decoder.get('filename')!r}"
    for name, (given, expected) in _sizes(model, whole, decoder).items():
        if isinstance(expected, int) and given != expected:
            yield f"{CONFIG}: {name} is {given}, the graph has {expected}"
    scores = _section(decoder, "outputs").get("logits", "logits")
    if scores not in [value.name for value in model.graph.outputs]:
        yield f"{CONFIG}: the graph has no output {scores}"
    names = {key: str(value) for key, value in (INPUTS | _section(decoder, "inputs")).items()}
    layers = range(max(1, len(_caches(model))))
    fed = {name.replace("%d", str(layer)) for name in names.values() for layer in layers}
    for value in model.graph.inputs:
        if value.name not in fed:
            yield f"{CONFIG}: nothing feeds the input {value.name} of the graph"
    yield from _length_problems(settings, whole)
    yield from _token_problems(model, whole)


def _sizes(model: ir.Model, whole: Mapping[str, Any], decoder: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (what the configuration says, what the graph says; no number where it leaves that open)."""
    caches = _caches(model)
    shape = caches[0].shape if caches else None
    _, heads, _, size = shape if shape is not None and len(shape) == 4 else (None,) * 4
    return {
        "num_hidden_layers": (decoder.get("num_hidden_layers"), len(caches)),
        "num_key_value_heads": (decoder.get("num_key_value_heads"), heads),
        "head_size": (decoder.get("head_size"), size),
        "vocab_size": (whole.get("vocab_size"), _vocabulary(model)),
    }


def _caches(model: ir.Model) -> list[ir.Value]:
    """The inputs for the keys of each layer."""
    return [value for value in model.graph.inputs if (value.name or "").endswith(".key")]


def _vocabulary(model: ir.Model) -> int | None:
    shape = next((value.shape for value in model.graph.outputs if value.name == "logits"), None)
    return shape[-1] if shape is not None and isinstance(shape[-1], int) else None


def _length_problems(settings: Mapping[str, Any], whole: Mapping[str, Any]) -> Iterator[str]:
    longest, context = _section(settings, "search").get("max_length"), whole.get("context_length")
    if isinstance(longest, int) and isinstance(context, int) and longest > context:
        yield f"{CONFIG}: search.max_length {longest} is above context_length {context}"


def _token_problems(model: ir.Model, whole: Mapping[str, Any]) -> Iterator[str]:
    vocabulary = _vocabulary(model)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = whole.get(key, [])
        for token in given if isinstance(given, list) else [given]:
            if not isinstance(token, int) or (vocabulary is not None and token >= vocabulary):
                yield f"{CONFIG}: {key} {token} is no token of {vocabulary}"


def _browser_problems(model: ir.Model, graph: Path, path: Path, *, ours: bool) -> Iterator[str]:
    config = _object(path)
    if isinstance(config, str):
        yield config
        return
    settings = _section(config, BROWSER_CONFIG)
    if not settings and ours:
        yield f"{path.name}: {BROWSER_CONFIG} is missing"
    dtype, files = settings.get("dtype"), settings.get("use_external_data_format")
    if isinstance(dtype, str) and graph.name != f"model{SUFFIXES.get(dtype, '?')}.onnx":
        yield f"{path.name}: the dtype {dtype} is not that of {SUBFOLDER}/{graph.name}"
    count = len(_data_files(model))
    if isinstance(files, dict) and files.get(graph.name, 0) != count:
        yield f"{path.name}: {graph.name} has {count} data files, use_external_data_format says {files.get(graph.name)}"


def _data_files(model: ir.Model) -> set[str]:
    import onnx_ir as ir

    tensors = (value.const_value for value in model.graph.initializers.values())
    return {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
