"""Writing a graph and its data files: tensors one at a time, in the order of the graph, in as many files as wanted.

Knows nothing of models. Refuses (FailedError) more data files than a reader would open.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.onnx.layouts import MOST_CHUNKS, Places
from signround.errors import FailedError

if TYPE_CHECKING:
    import onnx_ir as ir

INLINE_BYTES = 1024  # shape constants must stay in the graph: onnxruntime does not load them from outside


def count_data_files(model: ir.Model, places: Places) -> int:
    """How many data files `save_chunks` will write."""
    return max(places.chunks([tensor.nbytes for _, tensor in _outside(model)]), default=-1) + 1


def save_chunks(model: ir.Model, folder: Path, places: Places, on_tensor: Callable[[int, int, str], None]) -> None:
    """Write the graph and its data below `folder`; `on_tensor(done, total, name)` follows each tensor. The tensors of
    `model` are those in the files afterwards."""
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

    for chunk in sorted(set(chunks)):
        members = [pair for pair, place in zip(tensors, chunks, strict=True) if place == chunk]
        written = ir.external_data.convert_tensors_to_external(
            [tensor for _, tensor in members], graph.parent, places.data_file(chunk), advanced
        )
        for (value, _), tensor in zip(members, written, strict=True):
            value.const_value = tensor
    ir.save(model, graph)


def _outside(model: ir.Model) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    values = [(value, value.const_value) for value in model.graph.initializers.values()]
    return [(value, tensor) for value, tensor in values if tensor is not None and tensor.nbytes > INLINE_BYTES]
