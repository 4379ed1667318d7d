"""A constant that is read piece by piece while the file is written: a table of a large vocabulary is never in memory
whole.

It is an `ir.LazyTensor` around a `Pieces`. The writer asks for its bytes here (`raw_bytes`), not onnx_ir for an array:
`PackedTensor.numpy` of onnx_ir 0.1 reads fields of 2 bits as if they had 4, and numpy's `tofile`, by which every
version writes, does not say why a disk took less.
Refuses (ValueError) pieces that do not add up to the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Pieces:
    """`read` gives arrays that follow each other along the first axis, in the dtype of the tensor, or the bytes of
    integers of less than 8 bits; it is asked each time that the tensor is read."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    read: Callable[[], Iterator[NDArray[Any]]]

    def __call__(self) -> ir.TensorProtocol:
        """The whole tensor, in memory."""
        import onnx_ir as ir

        array = np.concatenate(list(self.read()))
        if self.dtype.bitwidth < 8:
            return ir.PackedTensor(array, self.dtype, shape=ir.Shape(self.shape), name=self.name)
        if array.shape != self.shape:
            raise ValueError(f"{self.name} must have shape {list(self.shape)}, got {array.shape}")
        return ir.Tensor(array, dtype=self.dtype, name=self.name)


def streamed_tensor(
    name: str, dtype: ir.DataType, shape: Sequence[int], read: Callable[[], Iterator[NDArray[Any]]]
) -> ir.LazyTensor:
    """See `Pieces`."""
    import onnx_ir as ir

    return ir.LazyTensor(Pieces(name, dtype, tuple(shape), read), dtype, ir.Shape(shape), name=name)


def raw_bytes(tensor: ir.TensorProtocol) -> Iterator[NDArray[np.uint8]]:
    """The bytes of any tensor, uint8 [n] after uint8 [n], little-endian as every machine that we run on. Only a small
    constant that was in memory all along is copied."""
    written = 0
    for piece in _pieces(tensor):
        data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        written += data.size
        yield data
    if written != tensor.nbytes:
        raise ValueError(f"{tensor.name} must have {tensor.nbytes} bytes, got {written}")


def _pieces(tensor: ir.TensorProtocol) -> Iterator[NDArray[Any]]:
    import onnx_ir as ir

    if isinstance(tensor, ir.LazyTensor) and isinstance(tensor.raw, Pieces):
        return tensor.raw.read()
    return iter([np.frombuffer(tensor.tobytes(), np.uint8)])
