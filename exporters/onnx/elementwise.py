"""Arithmetic between the large operators, in operators that every flavour has (opset 20 and later): multipliers, caps,
activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporters.onnx.builder import GraphBuilder

if TYPE_CHECKING:
    import onnx_ir as ir

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


def scaled(builder: GraphBuilder, name: str, value: ir.Value, factor: float) -> ir.Value:
    """value * factor; the value itself where the factor is 1."""
    if factor == 1.0:
        return value
    return builder.op("Mul", name, [value, builder.number(factor)])[0]


def capped(builder: GraphBuilder, name: str, value: ir.Value, cap: float | None) -> ir.Value:
    """cap * tanh(value / cap); the value itself where there is no cap."""
    if cap is None:
        return value
    inner = builder.op("Div", f"{name}.inner", [value, builder.number(cap)])
    bent = builder.op("Tanh", f"{name}.tanh", inner)
    return builder.op("Mul", name, [*bent, builder.number(cap)])[0]


def activated(builder: GraphBuilder, name: str, value: ir.Value, activation: str) -> ir.Value:
    """One of ACTIVATIONS. onnxruntime fuses the two nodes of silu into one. Raises ValueError for any other."""
    match activation:
        case "silu":
            sigmoid = builder.op("Sigmoid", f"{name}.sigmoid", [value])
            return builder.op("Mul", name, [value, *sigmoid])[0]
        case "gelu_pytorch_tanh":
            return builder.op("Gelu", name, [value], attributes={"approximate": "tanh"})[0]
    raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
