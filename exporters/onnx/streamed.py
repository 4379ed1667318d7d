"""A constant that is written piece by piece: a table of a large vocabulary is never in memory whole.

Refuses (ValueError) pieces that do not add up to the tensor. Imported where a graph is built, since it needs onnx_ir.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Pieces = Callable[[], Iterator[NDArray[Any]]]


class StreamedTensor(ir.LazyTensor):
    """`pieces` gives arrays that follow each other along the first axis, in the dtype of the tensor, or the bytes of
    integers of less than 8 bits; it is asked each time that the tensor is read. Only `tofile` goes through them one by
    one."""

    __slots__ = ("_pieces",)

    def __init__(self, name: str, dtype: ir.DataType, shape: Sequence[int], pieces: Pieces) -> None:
        super().__init__(self._whole, dtype, ir.Shape(shape), name=name)
        self._pieces = pieces

    def _whole(self) -> ir.TensorProtocol:
        array = np.concatenate(list(self._pieces()))
        if self.dtype.bitwidth < 8:
            return ir.PackedTensor(array, self.dtype, shape=self.shape, name=self.name)
        if array.shape != tuple(self.shape.numpy()):
            raise ValueError(f"{self.name} must have shape {self.shape}, got {array.shape}")
        return ir.Tensor(array, dtype=self.dtype, name=self.name)

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes, little-endian as the tensors of onnx_ir do on every machine that we run on."""
        written = 0
        for piece in self._pieces():
            written += file.write(np.ascontiguousarray(piece).view(np.uint8).data)
        if written != self.nbytes:
            raise ValueError(f"{self.name} must have {self.nbytes} bytes, got {written}")
