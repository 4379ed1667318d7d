"""The gated feed-forward network of one block: down(activation(gate(x)) * up(x))."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exporters.onnx.elementwise import activated
from exporters.onnx.parts import DecoderParts

if TYPE_CHECKING:
    import onnx_ir as ir

MODULE = "mlp"
PARTS = ("gate_proj", "up_proj", "down_proj")
PACKED = "mlp.gate_up_proj"  # gate and up in one, as Phi-3 stores them


def feed_forward(parts: DecoderParts, prefix: str, normed: ir.Value) -> ir.Value:
    """What the feed-forward network of the block whose tensors begin with `prefix` adds."""
    return gated_network(parts, prefix, MODULE, PARTS, normed)


def gated_network(
    parts: DecoderParts, prefix: str, module: str, names: tuple[str, str, str], normed: ir.Value
) -> ir.Value:
    """down(activation(gate(x)) * up(x)) with the linears `names` of `module`."""
    *inner, down = (f"{module}.{name}" for name in names)
    gate, up = _gate_and_up(parts, prefix, inner, normed)
    active = activated(parts.builder, f"{prefix}{module}.activated", gate, parts.architecture.family.activation)
    gated = parts.builder.op("Mul", f"{prefix}{module}.gated", [active, up])
    return parts.linear(prefix, down, gated[0])


def _gate_and_up(parts: DecoderParts, prefix: str, names: list[str], normed: ir.Value) -> list[ir.Value]:
    """Through one node where the checkpoint has one, or their layouts agree: the input is then rounded once. Measured
    on models of 26 and 130 million weights: 3 to 5 % less time for a token, none lost when a prompt is read."""
    layers = None if parts.has(prefix, PACKED) else parts.together(prefix, names)
    module = names[0].rpartition(".")[0]
    if parts.has(prefix, PACKED):
        packed, rows = parts.linear(prefix, PACKED, normed), parts.architecture.intermediate
    elif layers is not None:
        name = f"{prefix}{module}.gate_up_proj"
        packed, rows = parts.linears.add(name, normed, layers, parts.architecture.has_bias(names[0])), layers[0].rows
    else:
        return [parts.linear(prefix, name, normed) for name in names]
    widths = parts.builder.constant(f"constant.{rows}_twice", np.array([rows] * 2, np.int64))
    return parts.builder.op("Split", f"{prefix}{module}.apart", [packed, widths], outputs=2, attributes={"axis": -1})
