"""Weights in standard operators: DequantizeLinear in blocks along axis 0, then MatMul. Lays out; never rounds.

    codes        int{2,4,8} [columns, rows] for `centre` grids, whose zero is 0; uint{2,4,8} with zero points
    scales       float [blocks, rows]
    zero_points  uint{2,4,8} [blocks, rows], left out for `centre` grids

It is MatMulNBits' layout (packing.py) transposed: onnxruntime fuses DequantizeLinear -> MatMul into that operator while
it loads, but only in this orientation, and computes at the accuracy_level that the session asks for, not the file.
Source: DequantizeLinear 21 (4 and 8 bits) and 25 (2 bits) of the ONNX specification. Refuses 2-bit weights whose rows
are no multiple of 4 (`refusals`): onnxruntime 1.25 to 1.32 fuse them, without a word, into other weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from exporters.onnx.builder import GraphBuilder
from exporters.onnx.linear import FusedLinear, LinearWriter
from exporters.onnx.packing import CONTAINER, Layout, Packed, pack_bits, unpack_bits
from exporters.onnx.single_node import output_of
from signround.errors import Refusal
from signround.plan import LayerPlan, ModelPlan

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

NODE_SUFFIX = ".dequantized"  # after the name of the linear; its bias is the constant `NAME.bias`
ROW_MULTIPLE_2_BITS = 4
PIECE_COLUMNS = 16  # a multiple of these are whole bytes, whatever the bits and rows
PIECE_WEIGHTS = 1 << 22  # transposed at a time
OPSET_READ, IR_READ = 25, 13  # for a node alone: what has every type


@dataclass(frozen=True)
class Columns:
    """The constant inputs of a DequantizeLinear node; codes int8 or uint8, one weight a byte."""

    codes: NDArray[Any]
    scales: NDArray[Any]
    zero_points: NDArray[np.uint8] | None


def refusals(plan: ModelPlan) -> list[Refusal]:
    """The weights that onnxruntime would misread; grids are refused as for MatMulNBits."""
    wrong = [
        layer for layer in plan.layers() if CONTAINER.get(layer.grid.bits) == 2 and layer.rows % ROW_MULTIPLE_2_BITS
    ]
    if not wrong:
        return []
    problem = (
        f"{wrong[0].name} has {wrong[0].rows} rows of 2 bits, which onnxruntime misreads in DequantizeLinear unless "
        f"they are a multiple of {ROW_MULTIPLE_2_BITS}"
    )
    return [Refusal(problem, "use weights=matmulnbits, or 3 or 4 bits", "onnx")]


def code_pieces(packed: Packed, layout: Layout) -> Iterator[NDArray[Any]]:
    """MatMulNBits' codes transposed, slice after slice of the columns: int8 or uint8 [columns, rows] of 8 bits, else
    their bytes (`_as_stored`). Without zero points codes are signed."""
    half = np.uint8(0 if layout.has_zero_points else 2 ** (layout.bits - 1))
    rows_of_bytes = packed.codes.reshape(layout.rows, -1)
    step = PIECE_COLUMNS * max(1, PIECE_WEIGHTS // (PIECE_COLUMNS * layout.rows))
    for start in range(0, layout.columns, step):
        end = min(start + step, layout.columns)
        part = rows_of_bytes[:, start * layout.bits // 8 : -(-end * layout.bits // 8)]
        codes = np.ascontiguousarray(unpack_bits(part, layout.bits)[:, : end - start].T)
        codes = (codes - half) & np.uint8(2**layout.bits - 1)  # wraps below 0, as two's complement does
        yield _as_stored(codes if layout.has_zero_points else codes.view(np.int8), layout.bits)


def transposed_zeros(packed: Packed, layout: Layout) -> NDArray[np.uint8]:
    """uint8 [blocks, rows]; there must be zero points."""
    assert packed.zero_points is not None
    return np.ascontiguousarray(unpack_bits(packed.zero_points, layout.bits)[:, : layout.blocks].T)


def _as_stored(integers: NDArray[Any], bits: int) -> NDArray[Any]:
    """One a byte, or uint8 [n]: one after the other from the lowest bits on, across the ends of rows."""
    return integers if bits == 8 else pack_bits(integers.view(np.uint8).reshape(1, -1), bits)[0]


def from_columns(columns: Columns, layout: Layout) -> Packed:
    """The inverse of `code_pieces` and of the transpositions, up to what pads a ragged last block."""
    codes = np.ascontiguousarray(columns.codes.T).view(np.uint8)
    if columns.zero_points is None:
        codes = codes + np.uint8(2 ** (layout.bits - 1))
    padding = layout.blocks * layout.block - layout.columns
    codes = np.pad(codes, ((0, 0), (0, padding)))
    zeros = columns.zero_points
    return Packed(
        pack_bits(codes, layout.bits).reshape(layout.codes_shape),
        np.ascontiguousarray(columns.scales.T),
        None if zeros is None else pack_bits(np.ascontiguousarray(zeros.T), layout.bits),
    )


class DequantizeWriter:
    """Adds DequantizeLinear and MatMul for each linear. What is in memory is MatMulNBits' arrays of the latest one, and
    one transposed slice."""

    def __init__(self, builder: GraphBuilder, packer: LinearWriter) -> None:
        self._builder = builder
        self._packer = packer

    def add(self, name: str, value: ir.Value, layers: Sequence[LayerPlan], biased: bool) -> ir.Value:
        """value [.., columns] -> [.., rows of all layers]."""
        builder, linear = self._builder, FusedLinear(tuple(layers))
        layout, dtype = linear.layout, self._builder.float_type
        integers, shape = _integers(layout), (layout.blocks, layout.rows)

        def packed() -> Packed:
            return self._packer.packed(linear)

        def scales() -> NDArray[Any]:
            return packed().scales.T.astype(dtype.numpy())

        def zeros() -> Iterator[NDArray[Any]]:
            yield _as_stored(transposed_zeros(packed(), layout), layout.bits)

        inputs = [
            builder.streamed(
                f"{name}.codes", integers, (layout.columns, layout.rows), lambda: code_pieces(packed(), layout)
            ),
            builder.lazy(f"{name}.scales", dtype, shape, scales),
        ]
        if layout.has_zero_points:
            inputs.append(builder.streamed(f"{name}.zero_points", integers, shape, zeros))
        attributes = {"axis": 0, "block_size": layout.block}
        weight = builder.op(
            "DequantizeLinear", name + NODE_SUFFIX, inputs, attributes=attributes, metadata=linear.metadata
        )
        product = builder.op("MatMul", name, [value, *weight])
        if not biased:
            return product[0]
        return builder.op("Add", f"{name}.biased", [*product, self._packer.bias(name, linear)])[0]


def _integers(layout: Layout) -> ir.DataType:
    import onnx_ir as ir

    return ir.DataType[f"{'U' if layout.has_zero_points else ''}INT{layout.bits}"]


def is_weight(node: ir.Node | onnx.NodeProto) -> bool:
    """Whether a node is one that `DequantizeWriter` adds."""
    return bool(node.op_type == "DequantizeLinear" and (node.name or "").endswith(NODE_SUFFIX))


def decoded_weight(node: onnx.NodeProto, constants: Sequence[NDArray[Any]]) -> Tensor:
    """float32 [rows, columns]: what onnxruntime's DequantizeLinear makes of the constants of a node that `is_weight`,
    as the onnx package reads them. Shares no code with the packer."""
    from onnx import TensorProto, helper

    names = ["codes", "scales", "zero_points"][: len(constants)]
    codes, scales, *zeros = constants
    integers = helper.np_dtype_to_tensor_dtype(codes.dtype)
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    inputs = [codes, scales.astype(np.float32), *zeros]  # in fp16 the product would be rounded
    tensors = [
        helper.make_tensor(name, integers if name != "scales" else TensorProto.FLOAT, array.shape, array)
        for name, array in zip(names, inputs, strict=True)
    ]
    alone = helper.make_node("DequantizeLinear", names, ["weight"], **attributes)
    return output_of(alone, tensors, {}, (OPSET_READ, IR_READ)).T.contiguous()
