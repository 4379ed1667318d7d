"""Writing a graph and its data files: tensors one at a time, in the order of the graph, in as many files as wanted.

Two constants may share their bytes in a file, which onnx_ir's own `save` would write twice. onnxruntime maps every
external tensor by itself, so a table with two users, one of which repacks it while the model is loaded, costs memory
once: the repacked copy. What the other one reads are pages of the file.
The graph's metadata keeps the SHA-256 of each file (DATA_KEY): whoever holds the folder alone can tell a damaged copy.
Knows nothing of models. Refuses (FailedError) more data files than a reader would open.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporters.onnx.builder import View
from exporters.onnx.layouts import MOST_CHUNKS, Places
from signround.errors import FailedError
from signround.files import canonical_json, sha256_of

if TYPE_CHECKING:
    import onnx_ir as ir

DATA_KEY = "signround.data"  # model metadata: JSON, data file -> hex SHA-256; absent in files of earlier versions
INLINE_BYTES = 1024  # shape constants must stay in the graph: onnxruntime does not load them from outside


def count_data_files(model: ir.Model, places: Places) -> int:
    """How many data files `save_chunks` will write."""
    return max(places.chunks([tensor.nbytes for _, tensor in _outside(model)]), default=-1) + 1


def save_chunks(
    model: ir.Model,
    views: Iterable[View],
    folder: Path,
    places: Places,
    on_tensor: Callable[[int, int, str], None],
) -> None:
    """Write the graph and its data below `folder`; `on_tensor(done, total, name)` follows each tensor. The tensors of
    `model` are those in the files afterwards, and `views` are among its constants."""
    import onnx_ir as ir

    graph = folder / places.graph
    graph.parent.mkdir(parents=True, exist_ok=True)
    tensors = _outside(model)
    chunks = places.chunks([tensor.nbytes for _, tensor in tensors])
    if places.chunk_bytes is not None and chunks and chunks[-1] >= MOST_CHUNKS:
        raise FailedError(f"{graph.name} would need {chunks[-1] + 1} data files, {MOST_CHUNKS} are the most.")
    done = 0

    def advanced(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        nonlocal done
        done += 1
        on_tensor(done, len(tensors), tensor.name or "")

    hashes = {}
    for chunk in sorted(set(chunks)):
        members = [pair for pair, place in zip(tensors, chunks, strict=True) if place == chunk]
        written = ir.external_data.convert_tensors_to_external(
            [tensor for _, tensor in members], graph.parent, places.data_file(chunk), advanced
        )
        for (value, _), tensor in zip(members, written, strict=True):
            value.const_value = tensor
        hashes[places.data_file(chunk)] = sha256_of(graph.parent / places.data_file(chunk))
    model.metadata_props[DATA_KEY] = canonical_json(hashes)
    for view in views:
        view.value.const_value = _seen_as(view)
        model.graph.register_initializer(view.value)
    for value in model.graph.initializers.values():  # the small ones: here, where an error keeps its kind
        lazy = value.const_value
        if isinstance(lazy, ir.LazyTensor):
            value.const_value = ir.Tensor(lazy.numpy(), dtype=lazy.dtype, name=lazy.name)
    ir.save(model, graph)


def changed_files(model: ir.Model, folder: Path) -> Iterator[str]:
    """Data files in `folder` whose bytes are not those that were written; all of them are read."""
    for name, digest in json.loads(model.metadata_props.get(DATA_KEY, "{}")).items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            yield f"{name}: its bytes are not those that were written"


def _outside(model: ir.Model) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    values = [(value, value.const_value) for value in model.graph.initializers.values()]
    return [(value, tensor) for value, tensor in values if tensor is not None and tensor.nbytes > INLINE_BYTES]


def _seen_as(view: View) -> ir.TensorProtocol:
    """The bytes of a written tensor in another shape."""
    import onnx_ir as ir

    tensor, value = view.of.const_value, view.value
    assert tensor is not None
    assert isinstance(value.shape, ir.Shape)
    if not isinstance(tensor, ir.ExternalTensor):  # too small to lie outside the graph
        return ir.Tensor(np.reshape(tensor.numpy(), value.shape.numpy()), dtype=tensor.dtype, name=value.name)
    return ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=value.shape,
        name=value.name or "",
        base_dir=tensor.base_dir,
    )
