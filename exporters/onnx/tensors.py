"""What the graph asks for while it is written, and the conversions from torch to what ONNX stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from signround.errors import FailedError
from signround.qtensor import QuantizedTensor

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray


class TensorSource(Protocol):
    """Where the tensors come from; an artifact fits."""

    def quantized(self, name: str, rows: range | None = None) -> QuantizedTensor:
        """Integers and fields of the linear `name`, or of neighbouring `rows` of it."""
        ...

    def tensor(self, name: str, rows: range | None = None) -> Tensor:
        """The kept tensor `name` in its own dtype, or neighbouring `rows` of it."""
        ...


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    import onnx_ir as ir

    return {
        torch.float32: ir.DataType.FLOAT,
        torch.float16: ir.DataType.FLOAT16,
        torch.bfloat16: ir.DataType.BFLOAT16,
    }[dtype]


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """The same numbers as a numpy array; bfloat16 as ml_dtypes' type."""
    if tensor.dtype != torch.bfloat16:
        array: NDArray[Any] = tensor.numpy()
        return array
    import ml_dtypes

    bits: NDArray[Any] = tensor.contiguous().view(torch.uint16).numpy()
    return bits.view(ml_dtypes.bfloat16)


def floats(name: str, tensor: Tensor, dtype: ir.DataType) -> NDArray[Any]:
    """The tensor `name` as float32 or float16, whichever `dtype` is. Raises FailedError when float16 cannot hold it."""
    exact = tensor.to(torch.float32)
    if dtype.numpy() == np.float32:
        array: NDArray[Any] = exact.numpy()
        return array
    half = exact.half()
    if not torch.equal(half.isfinite(), exact.isfinite()):
        raise FailedError(
            f"onnx: {name} has values up to {exact.abs().max().item():.3g}, and fp16 ends at 65504; "
            "export with `--set onnx.dtype=fp32`."
        )
    halves: NDArray[Any] = half.numpy()
    return halves
