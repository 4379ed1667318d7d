"""Rounding to nearest over the plain range: the baseline that every report calls "rounded"."""

from __future__ import annotations

from torch import Tensor

from signround.grid import Grid
from signround.qtensor import QuantizedTensor
from signround.tuning.start import plain_start


def rounded(grid: Grid, weight: Tensor) -> QuantizedTensor:
    """`weight` float32 [rows, columns] rounded to nearest over its plain range."""
    return QuantizedTensor.from_grid(grid, weight, plain_start(grid, weight).fields(grid))
