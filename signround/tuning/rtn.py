"""Rounding to nearest over the plain range: the baseline that every report calls "rounded"."""

from __future__ import annotations

import torch
from torch import Tensor

from signround.grid import Grid
from signround.qtensor import QuantizedTensor
from signround.tuning.start import plain_start, searched_start


def rounded(grid: Grid, weight: Tensor) -> QuantizedTensor:
    """`weight` float32 [rows, columns] rounded to nearest over its plain range."""
    return QuantizedTensor.from_grid(grid, weight, plain_start(grid, weight).fields(grid))


def rounded_unseen(grid: Grid, weight: Tensor) -> QuantizedTensor:
    """`weight` rounded where nothing is known of its inputs: over the ranges with the least squared error of the
    weights themselves. Two bits with one scale a group stay with the plain range: there the search shrinks it further
    than outputs like (docs/decisions.md)."""
    if grid.bits == 2 and grid.super_block is None:
        return rounded(grid, weight)
    start = searched_start(grid, weight, torch.ones(weight.shape[1], device=weight.device))
    return QuantizedTensor.from_grid(grid, weight, start.fields(grid))
