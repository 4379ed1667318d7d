"""Lengths and positions of a batch, computed in the graph from input_ids and attention_mask.

Conventions of GroupQueryAttention: a row's padding stands at its end, and a chunk with a past has a batch of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exporters.onnx.builder import GraphBuilder
from exporters.onnx.flavour import DecoderInputs

if TYPE_CHECKING:
    import onnx_ir as ir


class Lengths:
    """`last`: int32 [batch], tokens of each row minus one; `total`: int32 scalar, width of the mask. Positions are
    added to the graph when they are asked for."""

    def __init__(self, builder: GraphBuilder, inputs: DecoderInputs) -> None:
        import onnx_ir as ir

        self._builder, self._inputs = builder, inputs
        self._positions: dict[int | None, ir.Value] = {}
        ones, integer = builder.constant("constant.ones", np.array([1], np.int64)), {"to": int(ir.DataType.INT32)}
        count = builder.op("ReduceSum", "mask.sum", [inputs.mask, ones], attributes={"keepdims": 0})
        last = builder.op("Sub", "mask.last", [*count, ones])
        self._count, self._width = count[0], self._size("mask", inputs.mask)
        self.last = builder.op("Cast", "mask.lengths", last, attributes=integer)[0]
        self.total = builder.op("Cast", "mask.total", [self._width], attributes=integer)[0]

    def positions(self, switch: int | None) -> ir.Value:
        """int64 [batch, tokens]: rows of a rotary table (`RotaryTable.switch`)."""
        if switch not in self._positions:
            plain = self._plain_positions() if switch is None else self.positions(None)
            self._positions[switch] = plain if switch is None else self._switched(plain, switch)
        return self._positions[switch]

    def _plain_positions(self) -> ir.Value:
        """A row starts where its past ends: at its tokens minus those of this call; padding makes that negative."""
        builder = self._builder
        zero, one = (builder.constant(f"constant.{number}", np.array(number, np.int64)) for number in (0, 1))
        tokens = self._size("ids", self._inputs.ids)
        past = builder.op("Sub", "positions.past", [self._count, tokens])
        start = builder.op("Max", "positions.start", [*past, zero])
        axis = builder.constant("constant.ones", np.array([1], np.int64))
        column = builder.op("Unsqueeze", "positions.column", [*start, axis])
        steps = builder.op("Range", "positions.steps", [zero, tokens, one])
        return builder.op("Add", "positions", [*column, *steps])[0]

    def _switched(self, plain: ir.Value, switch: int) -> ir.Value:
        import onnx_ir as ir

        builder = self._builder
        limit = builder.constant(f"constant.{switch}", np.array(switch, np.int64))
        longer = builder.op("Greater", "positions.longer", [self._width, limit])
        flag = builder.op("Cast", "positions.flag", longer, attributes={"to": int(ir.DataType.INT64)})
        rows = builder.op("Mul", "positions.rows", [*flag, limit])
        return builder.op("Add", "positions.switched", [plain, *rows])[0]

    def _size(self, name: str, value: ir.Value) -> ir.Value:
        """int64 scalar: the second dimension."""
        one = self._builder.constant("constant.1", np.array(1, np.int64))
        shape = self._builder.op("Shape", f"{name}.shape", [value])
        return self._builder.op("Gather", f"{name}.width", [*shape, one], attributes={"axis": 0})[0]
