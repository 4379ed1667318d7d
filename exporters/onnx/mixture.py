"""The feed-forward part of a block with a mixture of experts: router, experts, and the shared expert if there is one.

The router is a float product, because it decides which experts run. Where a family does not make the scores of the
chosen experts sum to one, QMoE gets the softmax over all experts beside the router's own scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exporters.onnx.experts import expert_layers
from exporters.onnx.feed_forward import gated_network
from exporters.onnx.parts import DecoderParts
from signround.mixture import Mixture

if TYPE_CHECKING:
    import onnx_ir as ir


def mixture_of_experts(parts: DecoderParts, mixture: Mixture, index: int, prefix: str, normed: ir.Value) -> ir.Value:
    """What the experts of block `index`, whose tensors begin with `prefix`, add."""
    builder, module = parts.builder, mixture.names.module
    router = f"{prefix}{module}.gate"
    scores = parts.tables.product(router, normed, parts.kept[f"{router}.weight"])
    flat = builder.constant("constant.experts", np.array([-1, mixture.experts], np.int64))
    scores = builder.op("Reshape", f"{router}.flat", [scores, flat])[0]
    weights = None
    if not mixture.norms_scores:
        weights = builder.op("Softmax", f"{router}.softmax", [scores], attributes={"axis": -1})[0]
    layers = expert_layers(parts.plan, index)
    routed = parts.experts.add(f"{prefix}{module}.experts", normed, scores, weights, layers, mixture.used)
    if not mixture.shared:
        return routed
    return builder.op("Add", f"{prefix}{module}.sum", [routed, _shared(parts, mixture, prefix, normed)])[0]


def _shared(parts: DecoderParts, mixture: Mixture, prefix: str, normed: ir.Value) -> ir.Value:
    """The expert that every token goes through, times the sigmoid of a gate of its own."""
    builder, name = parts.builder, f"{mixture.names.module}.shared_expert"
    gate = f"{prefix}{name}_gate"
    score = parts.tables.product(gate, normed, parts.kept[f"{gate}.weight"])
    open_gate = builder.op("Sigmoid", f"{gate}.sigmoid", [score])
    network = gated_network(parts, prefix, name, mixture.names.parts, normed)
    return builder.op("Mul", f"{gate}.applied", [network, *open_gate])[0]
