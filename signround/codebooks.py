"""Codebooks: uneven levels that a code may name, and the way from real numbers to their ranks and back.

A code is a rank in ascending order. Knows no scales, rounds nothing and has no gradients: `grid.py` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# `iq4`: ggml's kvalues_iq4nl, the file's own index. `e2m1`: the values of OCP's FP4 times two, as ggml has them; the
# file's two zeros are one level here.
CODEBOOKS: dict[str, tuple[int, ...]] = {
    "iq4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "e2m1": (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12),
}
CELLS = 2  # table cells for a step of one: levels are whole numbers, so a cell lies on one side of every midpoint


@dataclass(frozen=True)
class Codebook:
    """Levels on a device: `values` float32 [levels], ascending; `slopes` [levels], how far one rank carries there (the
    mean of the gaps around it); `gaps` [levels - 1]. Tables by cell: the gap that holds it (int64) and the nearest rank
    (float32); looking up is ten times as fast as a binary search."""

    values: Tensor
    slopes: Tensor
    gaps: Tensor
    gap_of: Tensor
    nearest_of: Tensor

    def nearest(self, level: Tensor) -> Tensor:
        """Ranks (float, integral) of the levels nearest to real ones."""
        return _entries(self.nearest_of, self._cells(level))

    def ranks(self, level: Tensor) -> Tensor:
        """Where real levels lie among the ranks, linear between neighbours; beyond the ends it runs on."""
        below = _entries(self.gap_of, self._cells(level))
        return below + (level - _entries(self.values, below)) / _entries(self.gaps, below)

    def values_at(self, ranks: Tensor) -> Tensor:
        """The levels of integral ranks."""
        return _entries(self.values, ranks.long())

    def slope_at(self, ranks: Tensor) -> Tensor:
        """The slope at the nearest rank there is."""
        return _entries(self.slopes, ranks.clamp(0, len(self.values) - 1).long())

    def _cells(self, level: Tensor) -> Tensor:
        return ((level - self.values[0]) * CELLS).clamp(0, len(self.gap_of) - 1).long()


def _entries(table: Tensor, index: Tensor) -> Tensor:
    """table[index], which on a processor takes five times as long when written so."""
    return table.index_select(0, index.flatten()).view(index.shape)


@cache
def codebook(name: str, device: torch.device) -> Codebook:
    """A row of CODEBOOKS, usable under autograd whatever mode the first caller is in."""
    low, high = CODEBOOKS[name][0], CODEBOOKS[name][-1]
    with torch.inference_mode(False), torch.no_grad():
        values = torch.tensor(CODEBOOKS[name], dtype=torch.float32, device=device)
        gaps = values.diff()
        slopes = torch.cat([gaps[:1], (gaps[1:] + gaps[:-1]) / 2, gaps[-1:]])
        middles = low + (torch.arange(CELLS * (high - low), device=device) + 0.5) / CELLS
        gap_of = torch.bucketize(middles, values[1:-1])
        nearest_of = torch.bucketize(middles, (values[1:] + values[:-1]) / 2)
        return Codebook(values, slopes, gaps, gap_of, nearest_of.float())
