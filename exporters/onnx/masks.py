"""Positions and attention masks of a batch, computed in the graph from input_ids and attention_mask.

Both follow from the attention mask alone: a token's position is the number of tokens before it in its row, wherever the
padding stands (left, right, between a past and a chunk). So the graph has no `position_ids` input, which every runtime
would compute from the same mask, and transformers.js would begin at 1 for Gemma 3.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from exporters.onnx.builder import GraphBuilder
from exporters.onnx.flavour import DecoderInputs

if TYPE_CHECKING:
    import onnx_ir as ir

FOREVER = np.iinfo(np.int64).max


class Masks:
    """Shared by all blocks of one graph; what is asked for twice is computed once."""

    def __init__(self, builder: GraphBuilder, inputs: DecoderInputs) -> None:
        import onnx_ir as ir

        self._builder = builder
        self._positions: dict[int | None, ir.Value] = {}
        self._masks: dict[int | None, ir.Value] = {}
        zero, one = self._integer(0), self._integer(1)
        count = builder.op("CumSum", "mask.count", [inputs.mask, one])
        before = builder.op("Sub", "mask.before", [*count, one])
        self._all = builder.op("Max", "mask.positions", [*before, zero])[
            0
        ]  # what pads a row's beginning would be at -1
        self._is_token = builder.op("Cast", "mask.tokens", [inputs.mask], attributes={"to": int(ir.DataType.BOOL)})[0]
        tokens = builder.op("Shape", "ids.tokens", [inputs.ids], attributes={"start": 1, "end": 2})
        self._start = builder.op("Neg", "ids.start", tokens)[0]
        self._length = self._last("mask.length", count[0], self._vector(-1))  # [batch, 1]: tokens of each row

    def positions(self, switch: int | None) -> ir.Value:
        """int64 [batch, tokens]: rows of a rotary table. With `switch` (`RotaryTable.switch`), a row of the batch that
        has more than so many tokens takes those from `switch` on."""
        if switch not in self._positions:
            if switch is None:
                self._positions[switch] = self._last("positions", self._all, self._start)
            else:
                self._positions[switch] = self._switched(self.positions(None), switch)
        return self._positions[switch]

    def mask(self, window: int | None) -> ir.Value:
        """bool [batch, 1, tokens, past + tokens]: which keys each token attends to: tokens, itself and earlier ones,
        the latest `window` of them.

        Padding attends to everything: its outputs are never used, but a row without a key would be NaN in kernels that
        follow the first edition of the specification, and NaN times a weight of 0 is NaN in every token after it.
        """
        if window not in self._masks:
            self._masks[window] = self._built(f"mask.{window or 'full'}", window)
        return self._masks[window]

    def _built(self, name: str, window: int | None) -> ir.Value:
        builder = self._builder
        seen = builder.op("LessOrEqual", f"{name}.causal", [self._keys, self._queries])[0]
        if window is not None:
            first = builder.op("Sub", f"{name}.first", [self._queries, self._integer(window)])
            near = builder.op("Greater", f"{name}.near", [self._keys, *first])
            seen = builder.op("And", f"{name}.window", [seen, *near])[0]
        seen = builder.op("And", f"{name}.tokens", [seen, self._token_keys])[0]
        return builder.op("Or", name, [seen, self._padding])[0]

    @cached_property
    def _queries(self) -> ir.Value:
        """Positions [batch, 1, tokens, 1]."""
        return self._unsqueezed("mask.queries", self.positions(None), [1, 3])

    @cached_property
    def _keys(self) -> ir.Value:
        """Positions [batch, 1, 1, past + tokens]."""
        return self._unsqueezed("mask.keys", self._all, [1, 2])

    @cached_property
    def _token_keys(self) -> ir.Value:
        """bool [batch, 1, 1, past + tokens]: which keys are tokens."""
        return self._unsqueezed("mask.token_keys", self._is_token, [1, 2])

    @cached_property
    def _padding(self) -> ir.Value:
        """bool [batch, 1, tokens, 1]: which queries are padding."""
        queries = self._last("mask.token_queries", self._is_token, self._start)
        padding = self._builder.op("Not", "mask.is_padding", [queries])[0]
        return self._unsqueezed("mask.padding", padding, [1, 3])

    def _switched(self, plain: ir.Value, switch: int) -> ir.Value:
        import onnx_ir as ir

        builder, limit = self._builder, self._integer(switch)
        longer = builder.op("Greater", "positions.longer", [self._length, limit])
        flag = builder.op("Cast", "positions.flag", longer, attributes={"to": int(ir.DataType.INT64)})
        rows = builder.op("Mul", "positions.rows", [*flag, limit])
        return builder.op("Add", f"positions.{switch}", [plain, *rows])[0]

    def _last(self, name: str, value: ir.Value, start: ir.Value) -> ir.Value:
        """value [batch, past + tokens] from column `start` (negative: from the end) on."""
        return self._builder.op("Slice", name, [value, start, self._vector(FOREVER), self._vector(1)])[0]

    def _unsqueezed(self, name: str, value: ir.Value, axes: list[int]) -> ir.Value:
        vector = self._builder.constant(f"constant.{axes}", np.array(axes, np.int64))
        return self._builder.op("Unsqueeze", name, [value, vector])[0]

    def _integer(self, value: int) -> ir.Value:
        return self._builder.constant(f"constant.integer.{value}", np.array(value, np.int64))

    def _vector(self, value: int) -> ir.Value:
        return self._builder.constant(f"constant.vector.{value}", np.array([value], np.int64))
