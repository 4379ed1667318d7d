"""The gated feed-forward network of one block: down(activation(gate(x)) * up(x))."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exporters.onnx.elementwise import activated
from exporters.onnx.parts import DecoderParts

if TYPE_CHECKING:
    import onnx_ir as ir

PACKED = "mlp.gate_up_proj"  # gate and up in one, as Phi-3 stores them


def feed_forward(parts: DecoderParts, prefix: str, normed: ir.Value) -> ir.Value:
    """What the feed-forward network of the block whose tensors begin with `prefix` adds."""
    gate, up = _gate_and_up(parts, prefix, normed)
    active = activated(parts.builder, f"{prefix}mlp.activated", gate, parts.architecture.family.activation)
    gated = parts.builder.op("Mul", f"{prefix}mlp.gated", [active, up])
    return parts.linear(prefix, "mlp.down_proj", gated[0])


def _gate_and_up(parts: DecoderParts, prefix: str, normed: ir.Value) -> list[ir.Value]:
    if f"{prefix}{PACKED}.weight" not in parts.layers:
        return [parts.linear(prefix, f"mlp.{name}_proj", normed) for name in ("gate", "up")]
    packed = parts.linear(prefix, PACKED, normed)
    widths = parts.builder.constant("constant.gate_up", np.array([parts.architecture.intermediate] * 2, np.int64))
    return parts.builder.op("Split", f"{prefix}mlp.apart", [packed, widths], outputs=2, attributes={"axis": -1})
