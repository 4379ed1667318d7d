"""The `contrib` flavour: norms and attention as onnxruntime's own operators (opset 21, com.microsoft 1).

GroupQueryAttention rotates q and k itself and can grow the KV cache in place; the Skip norm carries the residual.
A flavour of standard operators (opset 23: Attention, RotaryEmbedding, RMSNormalization) would offer the same methods.
Refuses head sizes that the CPU kernel refuses (`refusal_of`).
Source: schemas of com.microsoft 1; wiring as in onnxruntime-genai's model builder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from exporters.onnx.builder import MICROSOFT, GraphBuilder
from exporters.onnx.rope import positions_of, rotary_table
from signround.architecture import Architecture
from signround.errors import Refusal

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 21
IR_VERSION = 10  # what onnxruntime 1.18 and later load
SHARES_CACHE = True  # past and present may be one buffer


def refusal_of(architecture: Architecture) -> Refusal | None:
    """Why GroupQueryAttention cannot run this model, or None."""
    if architecture.head_dim % 16 == 0:
        return None
    return Refusal(
        f"heads of {architecture.head_dim} are not possible in GroupQueryAttention, whose rotary kernel takes "
        "multiples of 16",
        "choose another model, or export to gguf or gptq",
        "onnx",
    )


class ContribFlavour:
    """Writes norms and attention of one model into a GraphBuilder."""

    def __init__(self, builder: GraphBuilder, architecture: Architecture) -> None:
        self._builder = builder
        self._architecture = architecture
        self._lengths: tuple[ir.Value, ir.Value] | None = None

    def norm(self, name: str, value: ir.Value, weight: ir.Value) -> ir.Value:
        """RMS norm over the last axis."""
        attributes = {"axis": -1, "epsilon": self._architecture.norm_epsilon, "stash_type": 1}
        return self._builder.op("SimplifiedLayerNormalization", name, [value, weight], attributes=attributes)[0]

    def add_and_norm(
        self, name: str, residual: ir.Value, delta: ir.Value, weight: ir.Value, last: bool
    ) -> tuple[ir.Value, ir.Value]:
        """(norm of residual + delta, residual + delta); the last norm of a model has no residual to carry."""
        outputs = self._builder.op(
            "SkipSimplifiedLayerNormalization",
            name,
            [residual, delta, weight],
            domain=MICROSOFT,
            outputs=1 if last else 4,
            unused=() if last else (1, 2),
            attributes={"epsilon": self._architecture.norm_epsilon},
        )
        return outputs[0], outputs[-1]

    def attention(
        self,
        name: str,
        projections: Sequence[ir.Value | None],
        past: tuple[ir.Value, ir.Value],
        window: int | None,
        mask: ir.Value,
    ) -> list[ir.Value]:
        """[attended, present key, present value]; `projections` is q, k, v, or the three packed into the first."""
        architecture = self._architecture
        attributes: dict[str, int | float] = {
            "num_heads": architecture.heads,
            "kv_num_heads": architecture.kv_heads,
            "scale": architecture.head_dim**-0.5,
            "do_rotary": 1,
            "rotary_interleaved": 0,
            "local_window_size": -1 if window is None else window,
        }
        inputs = [*projections, *past, *self._sequence_lengths(mask), self._table("cos"), self._table("sin")]
        return self._builder.op("GroupQueryAttention", name, inputs, domain=MICROSOFT, outputs=3, attributes=attributes)

    def _table(self, part: str) -> ir.Value:
        import onnx_ir as ir

        name = f"{part}_cache"
        if name in self._builder.constants:
            return self._builder.constants[name]
        shape = (positions_of(self._architecture), self._architecture.head_dim // 2)
        return self._builder.lazy(name, ir.DataType.FLOAT, shape, lambda: rotary_table(self._architecture, part))

    def _sequence_lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """int32 [batch] tokens in the cache minus one, and int32 scalar longest: both from the attention mask."""
        if self._lengths is None:
            import onnx_ir as ir

            builder, integer = self._builder, {"to": int(ir.DataType.INT32)}
            one = builder.constant("constant.ones", np.array([1], np.int64))
            axis = builder.constant("constant.one", np.array(1, np.int64))
            count = builder.op("ReduceSum", "mask.sum", [mask, one], attributes={"keepdims": 0})
            last = builder.op("Sub", "mask.last", [*count, one])
            shape = builder.op("Shape", "mask.shape", [mask])
            total = builder.op("Gather", "mask.width", [*shape, axis], attributes={"axis": 0})
            self._lengths = (
                builder.op("Cast", "mask.lengths", last, attributes=integer)[0],
                builder.op("Cast", "mask.total", total, attributes=integer)[0],
            )
        return self._lengths
