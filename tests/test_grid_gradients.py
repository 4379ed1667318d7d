"""Gradients of the grid: finite everywhere, and those of the straight-through estimator.

The oracle is a float64 numpy copy of the four verbs in which every rounding is `x + residual` and every clamp is a
fixed mask, both recorded at the point where the gradient is taken. A straight-through gradient is by definition the
gradient of that smooth function, so central differences of it must agree with autograd.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from signround.codebooks import CODEBOOKS
from signround.grid import Grid, grouped
from tests.test_grid import GRIDS, cases

Array = np.ndarray[Any, Any]


def objective(
    grid: Grid, weight: torch.Tensor, learned: tuple[torch.Tensor, torch.Tensor, torch.Tensor], target: torch.Tensor
) -> torch.Tensor:
    alpha, beta, offset = learned
    blocks = grouped(weight, grid.group_of(weight.shape[1]))
    low, high = blocks.amin(-1).clamp(max=0) * alpha, blocks.amax(-1).clamp(min=0) * beta
    fields = grid.snap(*grid.fit(low, high))
    return (grid.decode(grid.codes(blocks, fields, offset), fields) * target).sum()


def differentiated(loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients; zeros for the ranges of power-of-two scales, which nothing moves."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if part is None else part for leaf, part in zip(leaves, found, strict=True)]


class Smooth:
    """The same function in float64 with frozen residuals. The first call records, later calls replay."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.tape: list[Array] = []
        self.recording = True
        self.position = 0

    def _next(self, fresh: Array) -> Array:
        if self.recording:
            self.tape.append(fresh)
            return fresh
        self.position += 1
        return self.tape[self.position - 1]

    def through(self, value: Array, rounded: Array) -> Array:
        return value + self._next(rounded - value)

    def clamp(self, value: Array, low: float, high: float) -> Array:
        inside = self._next((value >= low) & (value <= high))
        return np.where(inside, value, self._next(np.clip(value, low, high)))

    def half(self, value: Array) -> Array:
        value = self.clamp(value, -65504.0, 65504.0)
        return self.through(value, value.astype(np.float32).astype(np.float16).astype(np.float64))

    def integer(self, value: Array) -> Array:
        return self.through(value, np.rint(value))

    def level(self, value: Array) -> Array:
        level = self.grid.super_block
        if level is None:
            return self.half(value)
        blocks = value.reshape(*value.shape[:-1], -1, level.groups)
        size = np.abs(blocks) if level.signed else blocks
        extreme = np.take_along_axis(blocks, self._next(size.argmax(-1, keepdims=True)), -1)
        shared = self.half(extreme / (level.low if level.signed else level.high))
        small = self.clamp(self.integer(blocks / shared), level.low, level.high)
        return (shared * small).reshape(value.shape)

    def from_codebook(self, weight: Array, offset: Array, low: Array, high: Array) -> Array:
        """A level is the real one plus a residual; a step of the offset moves it by the mean gap at the level taken;
        both are frozen. Beyond half a gap outside the levels, the last one is taken and nothing moves it."""
        grid = self.grid
        levels = np.array(CODEBOOKS[str(grid.codebook)], dtype=np.float64)
        if grid.power_of_two:
            real = np.maximum(high, -low) / -levels[0]
            scale = self._next(np.exp2(np.rint(np.log2(real))))[..., None]
        else:
            scale = self.level(np.where(high > -low, high, low) / levels[0])[..., None]
        level = weight / scale
        padded = np.concatenate([[2 * levels[0] - levels[1]], levels, [2 * levels[-1] - levels[-2]]])
        rank = np.rint(np.interp(level, padded, np.arange(-1, len(levels) + 1)) + offset)
        taken = np.clip(rank, 0, len(levels) - 1).astype(int)
        slope = self._next((padded[taken + 2] - padded[taken]) / 2)
        moved = level + slope * offset
        inside = self._next(rank == taken)
        return scale * np.where(inside, moved + self._next(levels[taken] - moved), self._next(levels[taken]))

    def __call__(self, weight: Array, alpha: Array, beta: Array, offset: Array, target: Array) -> float:
        grid, self.position = self.grid, 0
        low = np.minimum(weight.min(-1), 0) * alpha
        high = np.maximum(weight.max(-1), 0) * beta
        top = grid.code_max
        if grid.codebook:
            value = self.from_codebook(weight, offset, low, high)
        elif grid.zero == "centre":
            real = np.maximum(high, -low) / (grid.centre - 1) if grid.code_min else None
            scale = self.level(np.where(high > -low, high, low) / -grid.centre if real is None else real)[..., None]
            codes = self.clamp(self.integer(weight / scale + offset) + grid.centre, grid.code_min, top)
            value = scale * (codes - grid.centre)
        elif grid.zero == "point":
            if grid.zero_floor:
                low = np.minimum(low, -high * grid.zero_floor / (top - grid.zero_floor))
            scale = self.level((high - low) / top)[..., None]
            zero = self.clamp(self.integer(-low[..., None] / scale), grid.zero_floor, top)
            codes = self.clamp(self.integer(weight / scale + offset) + zero, 0, top)
            value = scale * (codes - zero)
        else:
            scale, minimum = self.level((high - low) / top)[..., None], self.level(-low)[..., None]
            codes = self.clamp(self.integer((weight + minimum) / scale + offset), 0, top)
            value = scale * codes - minimum
        self.recording = False
        return float((value * target).sum())


@pytest.mark.parametrize("name", GRIDS)
def test_gradients_are_those_of_the_straight_through_estimator(name: str) -> None:
    grid = GRIDS[name]
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(2, 512, generator=generator) * 0.1
    blocks = grouped(weight, grid.group_of(512))
    alpha, beta = (0.8 + 0.15 * torch.rand(blocks.shape[:2], generator=generator) for _ in range(2))
    offset = 0.8 * torch.rand(blocks.shape, generator=generator) - 0.4
    target = torch.randn(blocks.shape, generator=generator)
    leaves = [part.requires_grad_() for part in (alpha, beta, offset)]
    loss = objective(grid, weight, (alpha, beta, offset), target)
    gradients = differentiated(loss, leaves)

    smooth = Smooth(grid)
    point = [part.detach().double().numpy() for part in leaves]
    fixed = blocks.double().numpy(), target.double().numpy()
    recorded = smooth(fixed[0], *point, fixed[1])
    assert recorded == pytest.approx(loss.item(), rel=1e-4, abs=1e-4), "the oracle is not the same function"
    directions = np.random.default_rng(12)
    for index, gradient in enumerate(gradients):
        for _ in range(8):
            direction = directions.standard_normal(point[index].shape)
            step = 1e-6 * direction
            ahead, behind = ([*point[:index], point[index] + sign * step, *point[index + 1 :]] for sign in (1, -1))
            difference = (smooth(fixed[0], *ahead, fixed[1]) - smooth(fixed[0], *behind, fixed[1])) / 2e-6
            expected = float((gradient.double().numpy() * direction).sum())
            size = float(np.abs(gradient.double().numpy() * direction).sum())
            assert difference == pytest.approx(expected, abs=2e-4 * size + 1e-9), ("alpha", "beta", "offset")[index]


@settings(max_examples=300)
@given(cases())
def test_gradients_are_finite_for_every_weight(case: tuple[Grid, torch.Tensor]) -> None:
    grid, weight = case
    shape = grouped(weight, grid.group_of(weight.shape[1])).shape
    alpha, beta = torch.full(shape[:2], 0.9, requires_grad=True), torch.full(shape[:2], 0.95, requires_grad=True)
    offset = torch.zeros(shape, requires_grad=True)
    loss = objective(grid, weight, (alpha, beta, offset), torch.full(shape, 0.5))
    for gradient in differentiated(loss, [alpha, beta, offset]):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", GRIDS)
def test_the_offset_of_a_zero_group_has_no_gradient(name: str) -> None:
    grid = GRIDS[name]
    weight = torch.zeros(1, 256)
    blocks = grouped(weight, grid.group_of(256))
    offset = torch.zeros(blocks.shape, requires_grad=True)
    fields = grid.snap(*grid.fit(blocks.amin(-1), blocks.amax(-1)))
    grid.decode(grid.codes(blocks, fields, offset), fields).sum().backward()
    assert offset.grad is not None
    # the smallest exponent is a scale far below anything a weight can feel, yet no zero
    assert (offset.grad.abs() <= (2.0**-120 if grid.power_of_two else 0.0)).all()
