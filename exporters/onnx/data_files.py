"""Writing a graph and its data files: tensors one at a time, in the order of the graph, in as many files as wanted.

Two constants may share their bytes in a file, which onnx_ir's own `save` would write twice. onnxruntime maps every
external tensor by itself, so a table with two users, one of which repacks it while the model is loaded, costs memory
once: the repacked copy. What the other one reads are pages of the file. And onnx_ir 0.1 sorts tensors by their size,
where the graph's order lets each weight be read once for its codes, scales and zero points. Tensors lie without gaps.
The graph's metadata keeps the SHA-256 of each file (DATA_KEY): whoever holds the folder alone can tell a damaged copy.
Knows nothing of models. Refuses (FailedError) more data files than a reader would open.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from exporters.onnx.builder import View
from exporters.onnx.layouts import MOST_CHUNKS, Places
from exporters.onnx.streamed import raw_bytes
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
    done = itertools.count(1)
    hashes = {}
    for chunk in sorted(set(chunks)):
        members = [pair for pair, place in zip(tensors, chunks, strict=True) if place == chunk]
        name = places.data_file(chunk)
        hashes[name] = _write(graph.parent, name, members, lambda tensor: on_tensor(next(done), len(tensors), tensor))
    model.metadata_props[DATA_KEY] = canonical_json(hashes)
    for view in views:
        view.value.const_value = _seen_as(view)
        model.graph.register_initializer(view.value)
    for value in model.graph.initializers.values():  # the small ones: here, where an error keeps its kind
        lazy = value.const_value
        if isinstance(lazy, ir.LazyTensor):
            value.const_value = lazy.raw()
    ir.save(model, graph)


def changed_files(model: ir.Model, folder: Path) -> Iterator[str]:
    """Data files in `folder` whose bytes are not those that were written; all of them are read."""
    for name, digest in json.loads(model.metadata_props.get(DATA_KEY, "{}")).items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            yield f"{name}: its bytes are not those that were written"


def _outside(model: ir.Model) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    values = [(value, value.const_value) for value in model.graph.initializers.values()]
    return [(value, tensor) for value, tensor in values if tensor is not None and tensor.nbytes > INLINE_BYTES]


def _write(
    folder: Path, name: str, constants: Iterable[tuple[ir.Value, ir.TensorProtocol]], on_tensor: Callable[[str], None]
) -> str:
    """Write one data file; each constant becomes what lies there. Gives the file's hex SHA-256."""
    import onnx_ir as ir

    digest, offset = hashlib.sha256(), 0
    with open(folder / name, "wb") as file:
        for value, tensor in constants:
            _append(tensor, file, digest)
            value.const_value = ir.ExternalTensor(
                name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=tensor.name or "",
                base_dir=folder,
            )
            offset += tensor.nbytes
            on_tensor(tensor.name or "")
    return digest.hexdigest()


def _append(tensor: ir.TensorProtocol, file: BinaryIO, digest: hashlib._Hash) -> None:
    """A function of its own, so that no array outlives its tensor."""
    for data in raw_bytes(tensor):
        file.write(data.data)
        digest.update(data.data)


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
