"""Rounding to nearest, and the search for the range whose rounding error is smallest.

`plain_range` is the baseline that every report calls "rounded". `searched_range` tries shrunk and stretched ranges of
each group and keeps the one with the least error weighted by the mean square of the layer's inputs; the weighting is
llama.cpp's importance matrix, the search that of SignRoundV2 (arXiv 2512.04746, section on scale initialisation).
"""

from __future__ import annotations

import torch
from torch import Tensor

from signround.grid import Grid, grouped
from signround.qtensor import QuantizedTensor

# Weights searched at once: bounds the temporary memory. On a processor the temporaries stay in its cache (5 times as
# fast as chunks of 2^20 to 2^22, whose pages come from the system anew each time); a GPU wants large kernels.
CHUNK_WEIGHTS = 1 << 18
CUDA_CHUNK_WEIGHTS = 1 << 22


def plain_range(grid: Grid, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value [rows, groups] of each group of `weight` [rows, columns], 0 included."""
    return _extremes(grouped(weight, grid.group_of(weight.shape[1])))


def rounded(grid: Grid, weight: Tensor) -> QuantizedTensor:
    """`weight` float32 [rows, columns] rounded to nearest over its plain range."""
    return QuantizedTensor.from_grid(grid, weight, grid.snap(*grid.fit(*plain_range(grid, weight))))


def searched_range(grid: Grid, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Range [rows, groups] of each group with the least weighted squared rounding error.

    `weight` float32 [rows, columns]; `importance` float32 [columns], the mean square of each input channel.
    """
    group = grid.group_of(weight.shape[1])
    chunk = CUDA_CHUNK_WEIGHTS if weight.device.type == "cuda" else CHUNK_WEIGHTS
    rows = max(1, chunk // weight.shape[1])
    weights = grouped(importance[None], group)  # [1, groups, group]
    starts = range(0, len(weight), rows)
    parts = [_search(grid, grouped(weight[start : start + rows], group), weights) for start in starts]
    return torch.cat([low for low, _ in parts]), torch.cat([high for _, high in parts])


def _extremes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)


def _search(grid: Grid, blocks: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    low, high = _extremes(blocks)
    best_low, best_high = low, high
    best = _error(grid, blocks, low, high, importance)
    for candidate_low, candidate_high in _candidates(grid, low, high):
        error = _error(grid, blocks, candidate_low, candidate_high, importance)
        better = error < best
        best = torch.where(better, error, best)
        best_low = torch.where(better, candidate_low, best_low)
        best_high = torch.where(better, candidate_high, best_high)
    return best_low, best_high


def _candidates(grid: Grid, low: Tensor, high: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Ranges to try. A symmetric full-range grid has one free number, its signed scale: stretch it both ways and also
    put the extreme on the other end; grids with a zero shrink both ends, each at its own pace."""
    if grid.zero == "centre" and not grid.code_min:
        extreme = torch.where(high > -low, high, low)
        top = 1.85 if grid.bits == 2 else 1.25
        factors = torch.linspace(0.5, top, 46).tolist()
        signed = [extreme * factor * sign for factor in factors for sign in (1.0, -1.0)]
        return [(value.clamp(max=0), value.clamp(min=0)) for value in signed]
    steps = torch.linspace(0.5, 1.0, 11).tolist()
    return [(low * below, high * above) for below in steps for above in steps if (below, above) != (1.0, 1.0)]


def _error(grid: Grid, blocks: Tensor, low: Tensor, high: Tensor, importance: Tensor) -> Tensor:
    fields = grid.snap(*grid.fit(low, high))
    difference = grid.decode(grid.codes(blocks, fields), fields) - blocks
    return (difference.square() * importance).sum(-1)
