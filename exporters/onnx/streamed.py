"""A constant that is written piece by piece: a table of a large vocabulary is never in memory whole.

Refuses (ValueError) pieces that do not add up to the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    Pieces = Callable[[], Iterator[NDArray[Any]]]


def streamed_tensor(name: str, dtype: ir.DataType, shape: Sequence[int], pieces: Pieces) -> ir.LazyTensor:
    """`pieces` gives arrays that follow each other along the first axis, in the dtype of the tensor, or the bytes of
    integers of less than 8 bits; it is asked each time that the tensor is read. Only `tofile` goes through them one by
    one."""
    import onnx_ir as ir

    def whole() -> ir.TensorProtocol:
        array = np.concatenate(list(pieces()))
        if dtype.bitwidth < 8:
            return ir.PackedTensor(array, dtype, shape=ir.Shape(shape), name=name)
        if array.shape != tuple(shape):
            raise ValueError(f"{name} must have shape {list(shape)}, got {array.shape}")
        return ir.Tensor(array, dtype=dtype, name=name)

    class StreamedTensor(ir.LazyTensor):
        """Here, because its base is imported here."""

        def tofile(self, file: BinaryIO) -> None:
            """Write the bytes, little-endian as the tensors of onnx_ir do on every machine that we run on."""
            written = 0
            for piece in pieces():
                written += file.write(np.ascontiguousarray(piece).view(np.uint8).data)
            if written != self.nbytes:
                raise ValueError(f"{name} must have {self.nbytes} bytes, got {written}")

    return StreamedTensor(whole, dtype, ir.Shape(shape), name=name)
