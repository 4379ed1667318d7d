"""The gated feed-forward network of one block: down(activation(gate(x)) * up(x))."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exporters.onnx.elementwise import activated
from exporters.onnx.linear import can_fuse
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
    """Through one node where the checkpoint has one, or their layouts agree: the input is rounded once."""
    names = [f"mlp.{name}_proj" for name in ("gate", "up")]
    if f"{prefix}{PACKED}.weight" in parts.layers:
        packed = parts.linear(prefix, PACKED, normed)
    else:
        layers = [parts.layers[f"{prefix}{name}.weight"] for name in names]
        biases = [parts.architecture.has_bias(name) for name in names]
        if not can_fuse(layers, biases):
            return [parts.linear(prefix, name, normed) for name in names]
        packed = parts.linears.add(f"{prefix}{PACKED}", normed, layers, biases[0])
    widths = parts.builder.constant("constant.gate_up", np.array([parts.architecture.intermediate] * 2, np.int64))
    return parts.builder.op("Split", f"{prefix}mlp.apart", [packed, widths], outputs=2, attributes={"axis": -1})
