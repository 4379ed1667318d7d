"""The search for the ranges where tuning starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from signround.formats import grid_for
from signround.grid import Grid
from signround.qtensor import QuantizedTensor
from signround.tuning import start
from signround.tuning.start import Start, plain_start, searched_start

SCHEMES = [
    "w2g64",
    "w3g32",
    "w4g32",
    "w4gc",
    "w8g128",
    "w2g32-asym",
    "w4g128-asym",
    "q4_1",
    "q5_1",
    "q8_0",
    "iq4_nl",
    "mxfp4",
]
TWO_LEVELS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"]


def problem(columns: int = 256) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, columns, generator=generator)
    weight[0, 0] = 9.0  # an outlier: shrinking its group pays
    weight[1] = 0
    return weight, torch.rand(columns, generator=generator).square() + 1e-3


def group_errors(grid: Grid, weight: Tensor, importance: Tensor, ranges: Start) -> Tensor:
    """Weighted squared error [rows, groups], from the integers that a file would hold, in float64."""
    tensor = QuantizedTensor.from_grid(grid, weight, ranges.fields(grid))
    error = (tensor.decode().double() - weight.double()).square() * importance.double()
    group = grid.group_of(weight.shape[1])
    padded = torch.nn.functional.pad(error, (0, -weight.shape[1] % group))
    return padded.view(len(weight), -1, group).sum(-1)


@pytest.mark.parametrize("columns", [256, 200])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_search_never_loses_in_any_group(scheme: str, columns: int) -> None:
    grid = grid_for(scheme)
    weight, importance = problem(columns)
    plain = group_errors(grid, weight, importance, plain_start(grid, weight))
    searched = group_errors(grid, weight, importance, searched_start(grid, weight, importance))
    assert bool((searched <= plain * (1 + 1e-5) + 1e-12).all())
    if grid.bits < 8:
        assert searched.sum() < 0.97 * plain.sum()  # and it gains overall


@pytest.mark.parametrize("shape", ["normal", "zero", "outliers", "equal", "tiny", "negative"])
@pytest.mark.parametrize("scheme", TWO_LEVELS)
def test_a_search_of_two_levels_never_loses_in_any_super_block(scheme: str, shape: str) -> None:
    grid = grid_for(scheme)
    weight, importance = problem(512)
    weight = {
        "normal": weight,
        "zero": torch.zeros_like(weight),
        "outliers": weight * (weight.abs() > 2) * 50,
        "equal": torch.full_like(weight, -0.3),
        "tiny": weight * 1e-6,
        "negative": -weight.abs(),
    }[shape]
    plain, searched = (
        group_errors(grid, weight, importance, ranges).unflatten(1, (2, -1)).sum(-1)
        for ranges in (plain_start(grid, weight), searched_start(grid, weight, importance))
    )
    assert bool((searched <= plain * (1 + 1e-5) + 1e-12 * weight.square().max()).all())
    if shape == "normal":
        assert searched.sum() < 0.8 * plain.sum()


@pytest.mark.parametrize("scheme", ["w4g32", "w2g32-asym", "q4_k"])
def test_chunks_do_not_change_a_search(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = problem()
    whole = searched_start(grid_for(scheme), weight, importance)
    monkeypatch.setattr(start, "CHUNK_WEIGHTS", 3 * 256)
    parts = searched_start(grid_for(scheme), weight, importance)
    assert torch.equal(parts.low, whole.low)
    assert torch.equal(parts.high, whole.high)
    assert (parts.shared or {}).keys() == (whole.shared or {}).keys()
    assert all(torch.equal(field, (whole.shared or {})[name]) for name, field in (parts.shared or {}).items())


def test_importance_decides() -> None:
    """Where only one input matters, its weight is met at the expense of all others."""
    grid = grid_for("w2g32")
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(4)).clamp(-1.9, 1.9)
    weight[0, 0], weight[0, 5] = 2.0, 1.3
    importance = torch.full((32,), 1e-6)
    importance[5] = 1.0
    ranges = searched_start(grid, weight, importance)
    found = QuantizedTensor.from_grid(grid, weight, ranges.fields(grid)).decode()
    assert abs(found[0, 5] - weight[0, 5]) < 0.05 * abs(weight[0, 5])


def test_ranges_hold_zero() -> None:
    plain = plain_start(grid_for("w4g32-asym"), torch.full((1, 32), 2.0))
    assert plain.low.tolist() == [[0.0]]
    assert plain.high.tolist() == [[2.0]]


@pytest.mark.parametrize("magnitude", [1e10, 1e18, 1e30, 1e37])
@pytest.mark.parametrize("scheme", [*SCHEMES, *TWO_LEVELS])
def test_weights_whose_squares_overflow_are_searched_without_harm(scheme: str, magnitude: float) -> None:
    """Sums become inf, and NaN once an importance is 0; what is stored stays finite."""
    grid = grid_for(scheme)
    weight, importance = problem(512)
    importance[::3] = 0.0
    ranges = searched_start(grid, weight * magnitude, importance)
    QuantizedTensor.from_grid(grid, weight * magnitude, ranges.fields(grid))  # raises on NaN and Inf
