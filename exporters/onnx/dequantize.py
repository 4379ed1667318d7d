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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from exporters.onnx.builder import GraphBuilder
from exporters.onnx.linear import FusedLinear, LinearWriter
from exporters.onnx.packing import CONTAINER, Layout, Packed, pack_bits, unpack_bits
from signround.errors import Refusal
from signround.plan import LayerPlan, ModelPlan

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

NODE_SUFFIX = ".dequantized"  # after the name of the linear; its bias is the constant `NAME.bias`
ROW_MULTIPLE_2_BITS = 4
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


def to_columns(packed: Packed, layout: Layout) -> Columns:
    """MatMulNBits' arrays transposed; without zero points the codes become signed."""
    codes = unpack_bits(packed.codes.reshape(layout.rows, -1), layout.bits)[:, : layout.columns]
    zeros = None
    if packed.zero_points is None:
        codes = (codes - _half(layout)).view(np.int8)  # wraps below 0, as int8 does
    else:
        zeros = np.ascontiguousarray(unpack_bits(packed.zero_points, layout.bits)[:, : layout.blocks].T)
    return Columns(np.ascontiguousarray(codes.T), np.ascontiguousarray(packed.scales.T), zeros)


def from_columns(columns: Columns, layout: Layout) -> Packed:
    """The inverse of `to_columns`, up to what pads a ragged last block."""
    codes = np.ascontiguousarray(columns.codes.T).view(np.uint8)
    if columns.zero_points is None:
        codes = codes + _half(layout)
    padding = layout.blocks * layout.block - layout.columns
    codes = np.pad(codes, ((0, 0), (0, padding)))
    zeros = columns.zero_points
    return Packed(
        pack_bits(codes, layout.bits).reshape(layout.codes_shape),
        np.ascontiguousarray(columns.scales.T),
        None if zeros is None else pack_bits(np.ascontiguousarray(zeros.T), layout.bits),
    )


def _half(layout: Layout) -> np.uint8:
    return np.uint8(2 ** (layout.bits - 1))


class DequantizeWriter:
    """Adds DequantizeLinear and MatMul for each linear; keeps the arrays of the latest one, as `LinearWriter` does."""

    def __init__(self, builder: GraphBuilder, packer: LinearWriter) -> None:
        self._builder = builder
        self._packer = packer
        self._columns = lru_cache(maxsize=1)(self._transposed)

    def _transposed(self, linear: FusedLinear) -> Columns:
        return to_columns(self._packer.packed(linear), linear.layout)

    def _zero_points(self, linear: FusedLinear) -> NDArray[np.uint8]:
        zeros = self._columns(linear).zero_points
        assert zeros is not None
        return zeros

    def add(self, name: str, value: ir.Value, layers: Sequence[LayerPlan], biased: bool) -> ir.Value:
        """value [.., columns] -> [.., rows of all layers]."""
        builder, linear = self._builder, FusedLinear(tuple(layers))
        layout, dtype = linear.layout, self._builder.float_type
        integers, shape = _integers(layout), (layout.blocks, layout.rows)
        inputs = [
            builder.lazy(f"{name}.codes", integers, (layout.columns, layout.rows), lambda: self._columns(linear).codes),
            builder.lazy(f"{name}.scales", dtype, shape, lambda: self._columns(linear).scales.astype(dtype.numpy())),
        ]
        if layout.has_zero_points:
            inputs.append(builder.lazy(f"{name}.zero_points", integers, shape, lambda: self._zero_points(linear)))
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
    import onnxruntime
    from onnx import TensorProto, helper

    names = ["codes", "scales", "zero_points"][: len(constants)]
    codes, scales, *zeros = constants
    integers = helper.np_dtype_to_tensor_dtype(codes.dtype)
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    inputs = [codes, scales.astype(np.float32), *zeros]  # in fp16 the product would be rounded
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", names, ["weight"], **attributes)],
        "one_weight",
        [],
        [helper.make_tensor_value_info("weight", TensorProto.FLOAT, codes.shape)],
        [
            helper.make_tensor(name, integers if name != "scales" else TensorProto.FLOAT, array.shape, array)
            for name, array in zip(names, inputs, strict=True)
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET_READ)], ir_version=IR_READ)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (weight,) = session.run(None, {})
    return torch.from_numpy(weight).T.contiguous()
