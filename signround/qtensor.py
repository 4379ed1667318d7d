"""QuantizedTensor: the integers and stored fields of one weight. Checked once, at birth, and never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from signround.grid import Fields, Grid, grouped, ungrouped


@dataclass(frozen=True)
class QuantizedTensor:
    """`codes` uint8 [rows, columns] (rows = out_features, columns = in_features) and `fields` in their stored dtypes
    (`Grid.layout`). Raises ValueError when a shape, a dtype or a code is out of bounds."""

    grid: Grid
    codes: Tensor
    fields: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.ndim != 2:
            raise ValueError(f"codes must be uint8 [rows, columns], got {self.codes.dtype} {tuple(self.codes.shape)}")
        rows, columns = self.codes.shape
        layout = self.grid.layout(rows, columns)
        if set(layout) != set(self.fields):
            raise ValueError(f"fields must be {sorted(layout)}, got {sorted(self.fields)}")
        for name, (shape, dtype) in layout.items():
            field = self.fields[name]
            if tuple(field.shape) != shape or field.dtype != dtype:
                raise ValueError(f"{name} must be {dtype} {shape}, got {field.dtype} {tuple(field.shape)}")
            if not dtype.is_floating_point:
                self._check_bounds(name, field)
            elif not bool(torch.isfinite(field).all()):
                raise ValueError(f"{name} holds NaN or Inf")
        self._check_bounds("codes", self.codes)

    def _check_bounds(self, name: str, integers: Tensor) -> None:
        """A uint8 holds more than the bits of a code, a zero point or a small scale; the rest would spill in a file."""
        if not integers.numel():
            return
        least, most = self.grid.bounds(name)
        low, high = int(integers.min()), int(integers.max())
        if low < least or high > most:
            raise ValueError(f"{name} must lie in {least}..{most}, got {low}..{high}")

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    @staticmethod
    def from_grid(grid: Grid, weight: Tensor, fields: Fields, offset: Tensor | float = 0.0) -> QuantizedTensor:
        """Round `weight` [rows, columns] for good: `fields` as `Grid.snap` gives them, `offset` V grouped."""
        rows, columns = weight.shape
        blocks = grouped(weight.float(), grid.group_of(columns))
        codes = ungrouped(grid.codes(blocks, fields, offset), columns)
        layout = grid.layout(rows, columns)
        stored = {name: fields[name].detach().to(dtype).cpu().contiguous() for name, (_, dtype) in layout.items()}
        return QuantizedTensor(grid, codes.detach().to(torch.uint8).cpu().contiguous(), stored)

    def decode(self) -> Tensor:
        """The weight that the runtime computes with, float32 [rows, columns]."""
        _, columns = self.shape
        blocks = grouped(self.codes.float(), self.grid.group_of(columns))
        return ungrouped(self.grid.decode(blocks, self.fields), columns)
