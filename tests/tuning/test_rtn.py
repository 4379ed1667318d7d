"""Rounding to nearest."""

from __future__ import annotations

import torch

from signround.formats import grid_for
from signround.tuning.rtn import rounded


def test_rounding_is_to_the_nearest_code() -> None:
    """Against all sixteen levels of each group, by brute force."""
    grid = grid_for("w4g32")
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    tensor = rounded(grid, weight)
    levels = tensor.fields["scale"].float()[..., None] * (torch.arange(16) - 8)  # [rows, groups, 16]
    distance = (weight.view(3, 2, 32, 1) - levels[:, :, None]).abs()
    nearest = distance.amin(-1).view(3, 64)
    assert torch.allclose((tensor.decode() - weight).abs(), nearest, atol=1e-6)
