"""SignRound: sign-gradient descent on rounding offsets and group ranges. arXiv 2309.05516.

    minimise over V, alpha, beta of one block:   || B(W, X) - B(W^(V, alpha, beta), X') ||^2
    W^ = s * (clamp(round(W / s + V) + z) - z),  s and z from the range [beta * min W, alpha * max W] of each group
    p <- p - lr_t * sign(dL / dp),               lr_t = lr * (1 - t / T)

`signround` is the last version of the paper (v3 to v5, EMNLP Findings 2024): T = 200, lr = 1 / T for V, alpha and
beta, batch 8, X' from the chain of already quantised blocks. Since the learning rates add up to (T + 1) / 2T, |V|
stays within 0.5025 without a clip; alpha and beta are clamped before use.
`signround-400` is the first draft (v1): T = 400, lr = 2.5e-3, |V| clipped to 0.5, no ranges, X' = X (float inputs).
Sources: AutoRound's `sign_sgd.py` and `wrapper.py` (0.16), Neural Compressor's release for the draft.

Ours, in both: the best step is chosen on a fixed held-out subset (the reference compares losses of different random
batches). `signround` may look one block ahead (`ahead.py`) and may start from a searched scale: then alpha and beta may
also stretch it, up to 2. They learn on symmetric grids of one level alone (`TunedLayer.ranges`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from signround.tuning.layer import TunedLayer


@dataclass(frozen=True)
class SignDescent:
    """One published variant. `offset_limit` clips |V|, `range_limit` is the highest alpha and beta."""

    tunes_ranges: bool
    quantized_inputs: bool
    offset_limit: float | None
    range_limit: float

    def parameters(self, layers: Sequence[TunedLayer]) -> list[Tensor]:
        """The tensors that learn, in a fixed order."""
        parameters = [layer.offset for layer in layers]
        if self.tunes_ranges:
            parameters += [tensor for layer in layers for tensor in layer.ranges()]
        return parameters

    def step(self, layers: Sequence[TunedLayer], gradients: Sequence[Tensor], rate: float) -> None:
        """One update in place, without a look at any value on the host."""
        with torch.no_grad():
            parameters = self.parameters(layers)
            torch._foreach_add_(parameters, torch._foreach_sign(list(gradients)), alpha=-rate)
            offsets, ranges = parameters[: len(layers)], parameters[len(layers) :]
            if self.offset_limit is not None:
                torch._foreach_clamp_min_(offsets, -self.offset_limit)
                torch._foreach_clamp_max_(offsets, self.offset_limit)
            if ranges:
                torch._foreach_clamp_min_(ranges, 0.0)
                torch._foreach_clamp_max_(ranges, self.range_limit)


def descent_for(method: str, start: str) -> SignDescent:
    """The variant behind `--method`; `start` is "range" or "search" (`recipes.TuningSettings`)."""
    if method == "signround-400":
        return SignDescent(tunes_ranges=False, quantized_inputs=False, offset_limit=0.5, range_limit=1.0)
    return SignDescent(
        tunes_ranges=True, quantized_inputs=True, offset_limit=None, range_limit=2.0 if start == "search" else 1.0
    )
