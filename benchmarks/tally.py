"""What several files did on one text, beside the float model: sums that grow window by window."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Tally:
    """What one file did on one text, summed in float64 over float32 log-probabilities."""

    likelihood: float = 0.0
    reference_likelihood: float = 0.0
    divergence: float = 0.0
    agreed: int = 0
    positions: int = 0

    def add(self, logits: Tensor, reference: Tensor, following: Tensor) -> None:
        """Logits [positions, vocabulary] of the file, log-probabilities of the float model, the tokens that follow."""
        found = logits.log_softmax(-1)
        self.likelihood += found.gather(-1, following[:, None]).sum(dtype=torch.float64).item()
        self.reference_likelihood += reference.gather(-1, following[:, None]).sum(dtype=torch.float64).item()
        self.divergence += (reference.exp() * (reference - found)).sum(dtype=torch.float64).item()
        self.agreed += int((found.argmax(-1) == reference.argmax(-1)).sum())
        self.positions += len(following)

    def include(self, other: Tally) -> None:
        """Add what was counted elsewhere."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def figures(self) -> dict[str, float]:
        perplexity = math.exp(-self.likelihood / self.positions)
        return {
            "perplexity": perplexity,
            "perplexity_ratio": perplexity / math.exp(-self.reference_likelihood / self.positions),
            "mean_kl": self.divergence / self.positions,
            "top1": self.agreed / self.positions,
            "positions": self.positions,
        }
