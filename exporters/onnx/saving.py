"""Writing a graph and its tensors. Two constants may share their bytes in the file: onnx_ir's own `save` writes both.

onnxruntime maps every external tensor by itself, so a table with two users, one of which repacks it while the model is
loaded, costs memory once: the repacked copy. What the other one reads are pages of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporters.onnx.builder import View

if TYPE_CHECKING:
    import onnx_ir as ir

INLINE_BYTES = 1024  # shape constants must stay in the graph: onnxruntime does not load them from outside


def save_graph(
    model: ir.Model, views: Iterable[View], path: Path, data: str, on_tensor: Callable[[str, int, int], None]
) -> None:
    """Write the graph to `path` and its tensors to `data` beside it, one in memory at a time. `on_tensor` is told the
    name of each, how many were written with it, and how many there are. The model then refers to the files."""
    import onnx_ir as ir

    def written(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        on_tensor(tensor.name or "", info.index + 1, info.total)

    ir.external_data.unload_from_model(model, path.parent, data, size_threshold_bytes=INLINE_BYTES, callback=written)
    for view in views:
        view.value.const_value = _seen_as(view)
        model.graph.register_initializer(view.value)
    ir.save(model, path)


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
