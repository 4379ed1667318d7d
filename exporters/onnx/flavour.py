"""What the decoder graph asks of a flavour: norms, rotary positions and attention in one set of operators.

The decoder (blocks, projections, feed-forward, residual, multipliers) is written once; flavours differ in the operators
that they need from the runtime. A flavour reads the numbers of a block (window, rope, scale, cap) from the
`Architecture`; it never sees a weight, and never asks for the name of a family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from signround.architecture import Architecture
from signround.errors import Refusal

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class DecoderInputs:
    """`ids` int64 [batch, tokens]; `mask` int64 [batch, past + tokens], 1 where a token is and 0 where padding is."""

    ids: ir.Value
    mask: ir.Value


class Flavour(Protocol):
    """Writes norms and attention of one model into a GraphBuilder. Values are float [batch, tokens, width] unless said
    otherwise; `name` is the name of the node, or the beginning of the names of several."""

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        ...

    @property
    def ir_version(self) -> int:
        """Version of the file format; onnxruntime refuses those that it does not know."""
        ...

    @property
    def shares_cache(self) -> bool:
        """Whether past and present keys and values may be one buffer (`past_present_share_buffer`)."""
        ...

    def refusals(self, architecture: Architecture) -> list[Refusal]:
        """Every reason why these operators cannot compute this model."""
        ...

    def norm(self, name: str, value: ir.Value, weight: ir.Value) -> ir.Value:
        """RMS norm over the last axis, times `weight`; also of [batch, tokens, heads, head_dim]."""
        ...

    def add_and_norm(
        self, name: str, residual: ir.Value, delta: ir.Value, weight: ir.Value, last: bool
    ) -> tuple[ir.Value, ir.Value]:
        """(norm of residual + delta, residual + delta); the `last` norm of a model has no residual to carry."""
        ...

    def attention(
        self,
        name: str,
        block: int,
        projections: Sequence[ir.Value | None],
        past: tuple[ir.Value, ir.Value],
        inputs: DecoderInputs,
    ) -> list[ir.Value]:
        """[attended, present key, present value] of block `block`, whose window, rope, scale and cap it obeys.

        `projections` is q, k, v, not yet rotated, or the three side by side as the first of [qkv, None, None]; `past`
        and present are [batch, kv_heads, length, head_dim], keys rotated.
        """
        ...

    def table_product(self, name: str, value: ir.Value, table: ir.Value, shape: tuple[int, int]) -> ir.Value:
        """value [batch, tokens, columns] times the transpose of a constant `table` of `shape` [rows, columns], which
        may have other users: no second copy of it may stay in memory."""
        ...
