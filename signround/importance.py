"""How much each input of a weight matters: its mean square over the calibration text, as importance matrices hold it.

llama.cpp keeps two numbers for every weight (`tools/imatrix`): the sum of the squares of each input over all tokens
that reached the weight, and how many tokens those were. This module holds them under checkpoint names; it reads and
writes no files (an exporter that is an `ImportanceFiles` does) and measures nothing (the calibration pass does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from signround.plan import ModelPlan


@dataclass(frozen=True)
class InputSquares:
    """`sums` float32 [experts, columns]: squares of each input, summed over the tokens that reached the expert;
    `counts` int64 [experts]: how many those were. An ordinary linear is one expert.

    Raises ValueError when shapes or dtypes differ, a sum is negative or not finite, or there are sums of no tokens. An
    expert of its own that no token reached has zeros in both.
    """

    sums: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        if self.sums.ndim != 2 or self.sums.dtype != torch.float32:
            raise ValueError(f"sums must be float32 [experts, columns], got {self.sums.dtype} {list(self.sums.shape)}")
        if self.counts.shape != self.sums.shape[:1] or self.counts.dtype != torch.int64:
            raise ValueError(f"counts must be int64 [experts], got {self.counts.dtype} {list(self.counts.shape)}")
        if not bool(torch.isfinite(self.sums).all()):
            raise ValueError("it holds NaN or Inf")
        if bool((self.sums < 0).any()):
            raise ValueError("it holds a negative sum of squares")
        nothing = not bool((self.counts > 0).any()) and bool(self.sums.any())
        if bool((self.counts < 0).any()) or nothing:
            raise ValueError("no token reached the weight (all counts are zero or negative)")

    @property
    def unseen(self) -> list[int]:
        """The experts that no token reached."""
        return (self.counts == 0).nonzero().flatten().tolist()

    def means(self) -> Tensor:
        """float32 [experts, columns]: the mean square of each input, divided in float32 as `llama-quantize` does.

        An unseen expert has ones: all its inputs matter alike, as `llama-quantize` has it.
        """
        counts = self.counts.to(torch.float32)[:, None]
        return torch.where(counts > 0, self.sums / counts.clamp(min=1), 1.0)


@dataclass(frozen=True)
class Importance:
    """Checkpoint weight name -> squares of its inputs, measured on `dataset`: `chunks` windows of `chunk_size` tokens.

    The head's inputs stand under the weight that multiplies them: `lm_head.weight`, or the embedding when it is tied.
    """

    squares: Mapping[str, InputSquares]
    dataset: str
    chunks: int
    chunk_size: int

    def means(self, name: str) -> Tensor | None:
        """`InputSquares.means` of a weight, None where nothing was measured (heads, as a rule)."""
        return self.squares[name].means() if name in self.squares else None


@runtime_checkable
class ImportanceFiles(Protocol):
    """An exporter whose runtime has files of importance matrices."""

    def write_importance(self, importance: Importance, path: Path, plan: ModelPlan) -> None:
        """Whole or absent; equal input gives equal bytes. Experts of the plan that were not measured are unseen."""
        ...

    def read_importance(self, path: Path, plan: ModelPlan) -> Importance:
        """The inputs of every weight of the plan. Raises RefusedError, with every reason, when the file is no
        importance matrix, or not one of this model."""
        ...
