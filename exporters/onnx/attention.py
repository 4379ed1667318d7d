"""Self-attention of one block: projections, norms of q and k, the flavour's attention, the output projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exporters.onnx.flavour import DecoderInputs
from exporters.onnx.operands import apart
from exporters.onnx.parts import DecoderParts

if TYPE_CHECKING:
    import onnx_ir as ir

PACKED = "self_attn.qkv_proj"  # q, k and v in one, as Phi-3 stores them; the name of the node where we pack them


def self_attention(
    parts: DecoderParts,
    index: int,
    prefix: str,
    normed: ir.Value,
    past: tuple[ir.Value, ir.Value],
    inputs: DecoderInputs,
) -> tuple[ir.Value, list[ir.Value]]:
    """(what the block adds, [present key, present value]) of block `index`, whose tensors begin with `prefix`."""
    projections = _projections(parts, prefix, normed)
    attended, *present = parts.flavour.attention(f"{prefix}attention", index, projections, past, inputs)
    return parts.linear(prefix, "self_attn.o_proj", attended), present


def _projections(parts: DecoderParts, prefix: str, normed: ir.Value) -> list[ir.Value | None]:
    """q, k and v; in one node where the checkpoint has one, or their layouts agree."""
    architecture = parts.architecture
    if parts.has(prefix, PACKED):
        return [parts.linear(prefix, PACKED, normed), None, None]
    names = [f"self_attn.{part}_proj" for part in "qkv"]
    layers = parts.together(prefix, names)
    widths = {norm.name: norm.width for norm in architecture.family.norms}
    if layers is not None:
        packed = parts.linears.add(f"{prefix}{PACKED}", normed, layers, architecture.has_bias(names[0]))
        if not architecture.family.qk_norm:
            return [packed, None, None]
        # cheaper than three nodes, which round their input three times
        query, key, value = apart(parts.builder, architecture, f"{prefix}self_attn", [packed, None, None])
    else:
        query, key, value = (parts.linear(prefix, name, normed) for name in names)
    for_heads = {"q": (query, architecture.heads), "k": (key, architecture.kv_heads)}
    normed_heads: list[ir.Value | None] = [
        _normed(parts, prefix, part, projection, heads, widths.get(f"self_attn.{part}_norm"))
        for part, (projection, heads) in for_heads.items()
    ]
    return [*normed_heads, value]


def _normed(parts: DecoderParts, prefix: str, part: str, value: ir.Value, heads: int, width: str | None) -> ir.Value:
    """q or k after its norm, if it has one: over each head, or over all heads together."""
    if width is None:
        return value
    name, size, builder = f"{prefix}self_attn.{part}_norm", parts.architecture.head_dim, parts.builder
    weight = parts.norm_weight(f"{name}.weight")
    if width != "head_dim":
        return parts.flavour.norm(name, value, weight)
    by_head = builder.constant(f"constant.{part}_heads", np.array([0, 0, heads, size], np.int64))
    joined = builder.constant(f"constant.{part}_joined", np.array([0, 0, heads * size], np.int64))
    split = builder.op("Reshape", f"{name}.split", [value, by_head])[0]
    return builder.op("Reshape", f"{name}.join", [parts.flavour.norm(name, split, weight), joined])[0]
