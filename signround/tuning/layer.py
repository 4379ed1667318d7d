"""One linear while it is tuned: the weight in groups, its start range, and the tensors that learn.

In the paper's symbols (arXiv 2309.05516): V the rounding offset, alpha and beta the shrink of each group's upper and
lower end. The fake-quantised weight is exactly what the file will decode to, fp16 scales included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from signround.grid import Grid, grouped, ungrouped
from signround.qtensor import QuantizedTensor
from signround.tuning.start import Start


class TunedLayer:
    """`weight` float32 [rows, columns] on the tuning device; `start` the ranges where tuning starts."""

    def __init__(self, grid: Grid, weight: Tensor, start: Start) -> None:
        self.grid = grid
        self.columns = weight.shape[1]
        self.blocks = grouped(weight, grid.group_of(self.columns))  # [rows, groups, group]
        self.start = start
        self.offset = torch.zeros_like(self.blocks, requires_grad=True)  # V
        self.shrink_high = torch.ones_like(start.high, requires_grad=True)  # alpha
        self.shrink_low = torch.ones_like(start.low, requires_grad=True)  # beta

    def ranges(self) -> tuple[Tensor, ...]:
        """alpha and beta, where they gain something: even levels and one scale a group, nothing beside it. Zero points,
        minima, two-level scales and codebooks are best left where the search put them (docs/decisions.md)."""
        tuned = self.grid.plain and self.grid.zero == "centre"
        return (self.shrink_high, self.shrink_low) if tuned else ()

    def fake_quantized(self) -> Tensor:
        """Decoded weight [rows, columns] with straight-through gradients to V, alpha and beta."""
        fields = self._fields()
        codes = self.grid.codes(self.blocks, fields, self.offset)
        return ungrouped(self.grid.decode(codes, fields), self.columns)

    def frozen(self) -> QuantizedTensor:
        """The integers and fields for good."""
        with torch.no_grad():
            return QuantizedTensor.from_grid(
                self.grid, ungrouped(self.blocks, self.columns), self._fields(), self.offset
            )

    def _fields(self) -> dict[str, Tensor]:
        start = self.start
        fitted = self.grid.fit(start.low * self.shrink_low, start.high * self.shrink_high)
        return self.grid.snap(*fitted, start.shared)
