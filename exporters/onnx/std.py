"""The `std` flavour: norms, rotary positions and attention as operators of the ONNX standard (opset 23).

Attention gets its mask, so padding may stand left or right and a chunk of any batch may follow a past; keys and values
are concatenated at every step, which GroupQueryAttention avoids. Nothing is refused.
Source: ONNX specification of Attention 23, RotaryEmbedding 23 and RMSNormalization 23. Scores are scaled, capped and
then masked, as the specification was corrected in 2026 (onnx#7867); onnxruntime does so from 1.27 on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from exporters.onnx.builder import GraphBuilder
from exporters.onnx.flavour import DecoderInputs
from exporters.onnx.masks import Masks
from exporters.onnx.operands import apart, rotary_caches
from exporters.onnx.rope import RotaryTable, rotary_tables
from signround.architecture import Architecture
from signround.errors import Refusal

if TYPE_CHECKING:
    import onnx_ir as ir


class StdFlavour:
    """Fulfils `Flavour`."""

    opset = 23  # the first with Attention
    ir_version = 10  # the first with int4: what opset 23 needs no more than
    shares_cache = False

    def __init__(self, builder: GraphBuilder, architecture: Architecture) -> None:
        self._builder = builder
        self._architecture = architecture
        self._tables = rotary_tables(architecture)
        self._masks: Masks | None = None

    @staticmethod
    def refusals(architecture: Architecture) -> list[Refusal]:
        """See `Flavour.refusals`."""
        return []

    def norm(self, name: str, value: ir.Value, weight: ir.Value) -> ir.Value:
        """See `Flavour.norm`."""
        attributes = {"axis": -1, "epsilon": self._architecture.norm_epsilon, "stash_type": 1}
        return self._builder.op("RMSNormalization", name, [value, weight], attributes=attributes)[0]

    def add_and_norm(
        self, name: str, residual: ir.Value, delta: ir.Value, weight: ir.Value, last: bool
    ) -> tuple[ir.Value, ir.Value]:
        """See `Flavour.add_and_norm`."""
        total = self._builder.op("Add", f"{name}.sum", [residual, delta])[0]
        return self.norm(name, total, weight), total

    def attention(
        self,
        name: str,
        block: int,
        projections: Sequence[ir.Value | None],
        past: tuple[ir.Value, ir.Value],
        inputs: DecoderInputs,
    ) -> list[ir.Value]:
        """See `Flavour.attention`."""
        architecture, masks = self._architecture, self._masks_of(inputs)
        query, key, value = apart(self._builder, architecture, name, projections)
        rope = architecture.ropes[block]
        if rope is not None:
            table = self._tables[rope]
            query = self._rotated(f"{name}.q_rotated", query, architecture.heads, table, masks)
            key = self._rotated(f"{name}.k_rotated", key, architecture.kv_heads, table, masks)
        attributes: dict[str, int | float] = {
            "q_num_heads": architecture.heads,
            "kv_num_heads": architecture.kv_heads,
            "scale": architecture.scales.attention,
            "softcap": architecture.scales.attention_cap or 0.0,
        }
        values = [query, key, value, masks.mask(architecture.windows[block]), *past]
        return self._builder.op("Attention", name, values, outputs=3, attributes=attributes)

    def table_product(self, name: str, value: ir.Value, table: ir.Value, shape: tuple[int, int]) -> ir.Value:
        """See `Flavour.table_product`. Gemm, which takes matrices only: as little memory as FusedMatMul and as fast,
        where Transpose + MatMul peaks at two copies (measured, 50000 x 1024)."""
        builder = self._builder
        rows, columns = shape
        flat = builder.constant(f"constant.flat.{columns}", np.array([-1, columns], np.int64))
        width = builder.constant(f"constant.rows.{rows}", np.array([rows], np.int64))
        matrix = builder.op("Reshape", f"{name}.matrix", [value, flat])
        product = builder.op("Gemm", name, [*matrix, table], attributes={"transA": 0, "transB": 1})
        outer = builder.op("Shape", f"{name}.outer", [value], attributes={"start": 0, "end": 2})
        whole = builder.op("Concat", f"{name}.shape", [*outer, width], attributes={"axis": 0})
        return builder.op("Reshape", f"{name}.apart", [*product, *whole])[0]

    def _rotated(self, name: str, value: ir.Value, heads: int, table: RotaryTable, masks: Masks) -> ir.Value:
        attributes = {"interleaved": 0, "num_heads": heads, "rotary_embedding_dim": 2 * table.width}
        values = [value, *rotary_caches(self._builder, table), masks.positions(table.switch)]
        return self._builder.op("RotaryEmbedding", name, values, attributes=attributes)[0]

    def _masks_of(self, inputs: DecoderInputs) -> Masks:
        if self._masks is None:
            self._masks = Masks(self._builder, inputs)
        return self._masks
