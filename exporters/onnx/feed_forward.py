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
    """Through one node where the checkpoint has one, or their layouts agree: the input is rounded once."""
    module, width = names[0].rpartition(".")[0], parts.architecture.intermediate
    if parts.has(prefix, PACKED):
        packed = parts.linear(prefix, PACKED, normed)
    else:
        layers = parts.together(prefix, names)
        if layers is None:
            return [parts.linear(prefix, name, normed) for name in names]
        biased, width = parts.architecture.has_bias(names[0]), layers[0].rows
        packed = parts.linears.add(f"{prefix}{module}.gate_up_proj", normed, layers, biased)
    widths = parts.builder.constant(f"constant.gate_up.{width}", np.array([width] * 2, np.int64))
    name = f"{prefix}{module}.apart"
    return parts.builder.op("Split", name, [packed, widths], outputs=2, attributes={"axis": -1})
