"""Rounding to nearest, and the search for a better range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from signround.formats import grid_for
from signround.grid import Grid
from signround.qtensor import QuantizedTensor
from signround.tuning import rtn
from signround.tuning.rtn import plain_range, rounded, searched_range

SCHEMES = ["w2g64", "w3g32", "w4g32", "w4gc", "w8g128", "w2g32-asym", "w4g128-asym", "q4_1", "q5_1", "q8_0"]


def problem(columns: int = 256) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, columns, generator=generator)
    weight[0, 0] = 9.0  # an outlier: shrinking its group pays
    weight[1] = 0
    return weight, torch.rand(columns, generator=generator).square() + 1e-3


def group_errors(grid: Grid, weight: Tensor, importance: Tensor, ranges: tuple[Tensor, Tensor]) -> Tensor:
    """Weighted squared error [rows, groups], from the integers that a file would hold, in float64."""
    tensor = QuantizedTensor.from_grid(grid, weight, grid.snap(*grid.fit(*ranges)))
    error = (tensor.decode().double() - weight.double()).square() * importance.double()
    group = grid.group_of(weight.shape[1])
    padded = torch.nn.functional.pad(error, (0, -weight.shape[1] % group))
    return padded.view(len(weight), -1, group).sum(-1)


@pytest.mark.parametrize("columns", [256, 200])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_search_never_loses_in_any_group(scheme: str, columns: int) -> None:
    grid = grid_for(scheme)
    weight, importance = problem(columns)
    plain = group_errors(grid, weight, importance, plain_range(grid, weight))
    searched = group_errors(grid, weight, importance, searched_range(grid, weight, importance))
    assert bool((searched <= plain * (1 + 1e-5) + 1e-12).all())
    if grid.bits < 8:
        assert searched.sum() < 0.97 * plain.sum()  # and it gains overall


@pytest.mark.parametrize("scheme", ["w4g32", "w2g32-asym"])
def test_chunks_do_not_change_a_search(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = problem()
    whole = searched_range(grid_for(scheme), weight, importance)
    monkeypatch.setattr(rtn, "CHUNK_WEIGHTS", 3 * 256)
    parts = searched_range(grid_for(scheme), weight, importance)
    assert all(torch.equal(part, expected) for part, expected in zip(parts, whole, strict=True))


def test_importance_decides() -> None:
    """Where only one input matters, its weight is met at the expense of all others."""
    grid = grid_for("w2g32")
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(4)).clamp(-1.9, 1.9)
    weight[0, 0], weight[0, 5] = 2.0, 1.3
    importance = torch.full((32,), 1e-6)
    importance[5] = 1.0
    ranges = searched_range(grid, weight, importance)
    found = QuantizedTensor.from_grid(grid, weight, grid.snap(*grid.fit(*ranges))).decode()
    assert abs(found[0, 5] - weight[0, 5]) < 0.05 * abs(weight[0, 5])


def test_ranges_hold_zero() -> None:
    low, high = plain_range(grid_for("w4g32-asym"), torch.full((1, 32), 2.0))
    assert low.tolist() == [[0.0]]
    assert high.tolist() == [[2.0]]


def test_rounding_is_to_the_nearest_code() -> None:
    """Against all sixteen levels of each group, by brute force."""
    grid = grid_for("w4g32")
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    tensor = rounded(grid, weight)
    levels = tensor.fields["scale"].float()[..., None] * (torch.arange(16) - 8)  # [rows, groups, 16]
    distance = (weight.view(3, 2, 32, 1) - levels[:, :, None]).abs()
    nearest = distance.amin(-1).view(3, 64)
    assert torch.allclose((tensor.decode() - weight).abs(), nearest, atol=1e-6)
