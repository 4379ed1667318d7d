"""Where tuning starts: the range of each group whose rounding error, weighted by the layer's inputs, is smallest.

The weight of a column is the mean square of its input: llama.cpp's importance matrix, and the diagonal of the layer's
Hessian. A group's real scale (and minimum) comes from codes of many stretched ranges, each refitted by weighted least
squares (the idea of ggml's `make_qkx3_quants`; SignRoundV2, arXiv 2512.04746, starts from stretched scales too). Two
levels couple the groups of a super-block, so there the search goes on, judged by what the file would decode to:

    1. super-scales: the extreme group's, stretched and shrunk
    2. the small integers of each group: their neighbours
    3. super-scales again: weighted least squares for the codes found, and back to 2

Nothing here is differentiable, and nothing is decided for good: the loop tunes on from here. A search never ends worse
than the plain range, group by group (or super-block by super-block).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from signround.grid import Fields, Grid, grouped, half_through, safe_reciprocal

# Weights searched at once: bounds the temporary memory. On a processor the temporaries stay in its cache (5 times as
# fast as chunks of 2^20 to 2^22, whose pages come from the system anew each time); a GPU wants large kernels.
CHUNK_WEIGHTS = 1 << 18
CUDA_CHUNK_WEIGHTS = 1 << 22
POINT_STRETCHES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
SUPER_STRETCHES = (0.85, 0.9, 0.95, 1.05, 1.1, 1.15)
NEIGHBOURS = {"scale": (-1, 0, 1), "minimum": (-2, -1, 0, 1, 2)}
ROUNDS = 2


@dataclass(frozen=True)
class Start:
    """`low`, `high` [rows, groups]: the range that `Grid.fit` takes. `shared`: the super-scales of a two-level grid
    (fields `*_super`), None where the extreme group sets them."""

    low: Tensor
    high: Tensor
    shared: Fields | None = None

    def fields(self, grid: Grid) -> dict[str, Tensor]:
        """What rounding over this range stores."""
        return grid.snap(*grid.fit(self.low, self.high), self.shared)


def plain_start(grid: Grid, weight: Tensor) -> Start:
    """Lowest and highest value of each group of `weight` [rows, columns], 0 included."""
    return Start(*_extremes(grouped(weight, grid.group_of(weight.shape[1]))))


def searched_start(grid: Grid, weight: Tensor, importance: Tensor) -> Start:
    """The start with the least weighted squared rounding error that the search finds.

    `weight` float32 [rows, columns]; `importance` float32 [columns], the mean square of each input channel.
    """
    group = grid.group_of(weight.shape[1])
    chunk = CUDA_CHUNK_WEIGHTS if weight.device.type == "cuda" else CHUNK_WEIGHTS
    rows = max(1, chunk // weight.shape[1])
    columns = grouped(importance[None], group)  # [1, groups, group]
    pieces = (grouped(weight[start : start + rows], group) for start in range(0, len(weight), rows))
    parts = [_searched(grid, blocks, columns) for blocks in pieces]
    names = parts[0].shared or ()
    return Start(
        torch.cat([part.low for part in parts]),
        torch.cat([part.high for part in parts]),
        {name: torch.cat([(part.shared or {})[name] for part in parts]) for name in names} or None,
    )


def _extremes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)


def _searched(grid: Grid, blocks: Tensor, importance: Tensor) -> Start:
    plain = Start(*_extremes(blocks))
    if grid.power_of_two:
        neighbours = [Start(plain.low * factor, plain.high * factor) for factor in (0.5, 2.0)]
        return _best(grid, blocks, importance, [plain, *neighbours])
    if grid.zero == "point":
        return _best(grid, blocks, importance, [plain, *_around_points(grid, blocks, importance, plain)])
    found = _as_start(grid, *_least_squares(grid, blocks, importance, plain))
    if grid.super_block is None:
        return _best(grid, blocks, importance, [plain, found])
    return _two_levels(grid, blocks, importance, plain, found)


def _error(grid: Grid, blocks: Tensor, fields: Fields, importance: Tensor) -> Tensor:
    """Weighted squared error of each group, [rows, groups]."""
    difference = grid.decode(grid.codes(blocks, fields), fields) - blocks
    return (difference.square() * importance).sum(-1)


def _best(grid: Grid, blocks: Tensor, importance: Tensor, candidates: list[Start]) -> Start:
    """The best of several ranges, group by group."""
    best = candidates[0]
    lowest = _error(grid, blocks, best.fields(grid), importance)
    for candidate in candidates[1:]:
        error = _error(grid, blocks, candidate.fields(grid), importance)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        best = Start(torch.where(better, candidate.low, best.low), torch.where(better, candidate.high, best.high))
    return best


def _around_points(grid: Grid, blocks: Tensor, importance: Tensor, plain: Start) -> Iterator[Start]:
    """For an integer zero point: both ends stretched, each at its own pace; and each such range again with the scale
    refitted to the codes and the zero point that it gives."""
    for below, above in product(POINT_STRETCHES, POINT_STRETCHES):
        stretched = Start(plain.low * below, plain.high * above)
        yield stretched
        fields = stretched.fields(grid)
        zero = fields["zero_point"]
        units = grid.codes(blocks, fields) - zero.unsqueeze(-1)
        scale, _ = _refit(units, blocks, importance, with_minimum=False)
        yield Start(-zero * scale, (grid.code_max - zero) * scale)


def _as_start(grid: Grid, scale: Tensor, minimum: Tensor | None) -> Start:
    """The range whose `fit` is this real scale (and minimum)."""
    if minimum is not None:
        return Start(-minimum, scale * grid.code_max - minimum)
    one, _ = grid.fit(torch.zeros_like(scale), torch.ones_like(scale))
    extreme = scale / one
    return Start(extreme.clamp(max=0), extreme.clamp(min=0))


# ---- the real scale (and minimum) of each group


def _least_squares(grid: Grid, blocks: Tensor, importance: Tensor, plain: Start) -> tuple[Tensor, Tensor | None]:
    """Of many ranges: the codes they give, refitted; the refit with the least error, [rows, groups] each."""
    direct = replace(grid, super_block=None)
    best_scale, best_minimum = direct.fit(plain.low, plain.high)  # what stays where products overflow
    lowest = torch.full_like(plain.low, torch.inf)
    for scale, minimum in _candidates(direct, plain):
        units = _units(direct, blocks, scale, minimum)
        fitted = _refit(units, blocks, importance, with_minimum=grid.zero == "minimum")
        difference = fitted[0].unsqueeze(-1) * units - fitted[1].unsqueeze(-1) - blocks
        error = (difference.square() * importance).sum(-1)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        best_scale = torch.where(better, fitted[0], best_scale)
        if best_minimum is not None:
            best_minimum = torch.where(better, fitted[1], best_minimum)
    return best_scale, best_minimum


def _candidates(grid: Grid, plain: Start) -> Iterator[tuple[Tensor, Tensor]]:
    """Real scale and minimum to start a refit from. A symmetric grid has one free number, its signed scale: stretch it
    and also put the extreme on the other end; a minimum and its scale are stretched apart."""
    if grid.zero == "minimum":
        for below, above in product((0.6, 0.75, 0.9, 1.0, 1.1), torch.linspace(0.5, 1.2, 15).tolist()):
            scale, minimum = grid.fit(plain.low * below, plain.high * above)
            assert minimum is not None
            yield scale, minimum
        return
    scale, _ = grid.fit(plain.low, plain.high)
    top = 1.85 if grid.bits == 2 else 1.25
    for factor in torch.linspace(0.5, top, 24).tolist():
        yield scale * factor, torch.zeros_like(scale)
        if not grid.code_min:
            yield scale * -factor, torch.zeros_like(scale)


def _units(direct: Grid, blocks: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """What the codes of this scale and minimum stand for in units of the scale, the minimum left out; grouped."""
    codes = direct.codes(blocks, {"scale": scale, "minimum": minimum})
    return direct.decode(codes, {"scale": torch.ones_like(scale), "minimum": torch.zeros_like(minimum)})


def _refit(units: Tensor, blocks: Tensor, importance: Tensor, *, with_minimum: bool) -> tuple[Tensor, Tensor]:
    """Weighted least squares of `blocks` = scale * units - minimum, minimum >= 0 (its stored form has no sign)."""
    weighted = importance * units
    square, product_sum = (weighted * units).sum(-1), (weighted * blocks).sum(-1)
    alone = product_sum * safe_reciprocal(square)
    if not with_minimum:
        return alone, torch.zeros_like(alone)
    total, sum_units = importance.sum(-1).expand_as(square), weighted.sum(-1)
    sum_blocks = (importance * blocks).sum(-1)
    inverse = safe_reciprocal(total * square - sum_units.square())
    scale = (total * product_sum - sum_units * sum_blocks) * inverse
    minimum = (sum_units * product_sum - square * sum_blocks) * inverse
    usable = (minimum > 0) & (scale > 0)
    return torch.where(usable, scale, alone.clamp(min=0)), torch.where(usable, minimum, 0.0)


# ---- two levels


def _two_levels(grid: Grid, blocks: Tensor, importance: Tensor, plain: Start, found: Start) -> Start:
    names = ("scale", "minimum") if grid.zero == "minimum" else ("scale",)
    fields = found.fields(grid)
    for name in names:
        fields = _stretched_super(grid, blocks, importance, fields, found, name)
    for _ in range(ROUNDS):
        fields = _neighbours(grid, blocks, importance, fields)
        fields = _refitted_super(grid, blocks, importance, fields)
    fields = _better_super_blocks(grid, blocks, importance, [plain.fields(grid), fields])
    real = [_real(grid, fields, name) for name in names]
    start = _as_start(grid, real[0], real[1] if len(real) > 1 else None)
    return Start(start.low, start.high, {name: field for name, field in fields.items() if name.endswith("_super")})


def _real(grid: Grid, fields: Fields, name: str) -> Tensor:
    """Super-scale times small integer, [rows, groups]."""
    assert grid.super_block is not None
    return fields[f"{name}_super"].repeat_interleave(grid.super_block.groups, -1) * fields[f"{name}_sub"]


def _better_super_blocks(
    grid: Grid, blocks: Tensor, importance: Tensor, candidates: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The best of several sets of fields, super-block by super-block."""
    assert grid.super_block is not None
    groups = grid.super_block.groups
    errors = [_by_super_block(_error(grid, blocks, fields, importance), groups).sum(-1) for fields in candidates]
    # Errors of huge weights overflow to inf, times an importance of 0 to NaN, which `argmin` would take for the least.
    choice = torch.stack(errors).nan_to_num(nan=torch.inf).argmin(0)  # [rows, super-blocks]
    best = candidates[0]
    for index, fields in enumerate(candidates[1:], 1):
        chosen = choice == index
        each = {True: chosen, False: chosen.repeat_interleave(groups, -1)}
        best = {name: torch.where(each[name.endswith("_super")], fields[name], best[name]) for name in best}
    return best


def _by_super_block(values: Tensor, length: int) -> Tensor:
    """[rows, super-blocks * length] -> [rows, super-blocks, length]."""
    return values.reshape(len(values), -1, length)


def _stretched_super(
    grid: Grid, blocks: Tensor, importance: Tensor, fields: dict[str, Tensor], real: Start, name: str
) -> dict[str, Tensor]:
    supers = {key: field for key, field in fields.items() if key.endswith("_super")}
    key = f"{name}_super"
    scale, minimum = grid.fit(real.low, real.high)
    stretched = [grid.snap(scale, minimum, supers | {key: supers[key] * factor}) for factor in SUPER_STRETCHES]
    return _better_super_blocks(grid, blocks, importance, [fields, *stretched])


def _neighbours(grid: Grid, blocks: Tensor, importance: Tensor, fields: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the small integers of each group to their best neighbours."""
    level = grid.super_block
    assert level is not None
    subs = [name for name in fields if name.endswith("_sub")]
    best, lowest = fields, _error(grid, blocks, fields, importance)
    for moves in product(*(NEIGHBOURS[name.removesuffix("_sub")] for name in subs)):
        moved = {sub: (fields[sub] + move).clamp(level.low, level.high) for sub, move in zip(subs, moves, strict=True)}
        error = _error(grid, blocks, fields | moved, importance)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        best = best | {sub: torch.where(better, moved[sub], best[sub]) for sub in subs}
    return best


def _refitted_super(grid: Grid, blocks: Tensor, importance: Tensor, fields: dict[str, Tensor]) -> dict[str, Tensor]:
    """Super-scales by weighted least squares for the codes and small integers at hand, where that is better."""
    assert grid.super_block is not None
    groups = grid.super_block.groups
    codes = grid.codes(blocks, fields)
    direct = replace(grid, super_block=None)
    subs = {name: fields[f"{name}_sub"] for name in ("scale", "minimum") if f"{name}_sub" in fields}
    nothing = torch.zeros_like(subs["scale"])
    units = direct.decode(codes, {"scale": subs["scale"], "minimum": nothing})
    units = _by_super_block(units.flatten(-2), groups * blocks.shape[-1])
    wide = _by_super_block(importance.expand_as(blocks).flatten(-2), groups * blocks.shape[-1])
    values = _by_super_block(blocks.flatten(-2), groups * blocks.shape[-1])

    def total(left: Tensor, right: Tensor) -> Tensor:
        return (wide * left * right).sum(-1)

    if grid.zero != "minimum":
        refitted = {"scale_super": total(units, values) * safe_reciprocal(total(units, units))}
    else:
        below = -_by_super_block(subs["minimum"].repeat_interleave(blocks.shape[-1], -1), groups * blocks.shape[-1])
        aa, bb, ab = total(units, units), total(below, below), total(units, below)
        ax, bx = total(units, values), total(below, values)
        inverse = safe_reciprocal(aa * bb - ab.square())
        refitted = {"scale_super": (bb * ax - ab * bx) * inverse, "minimum_super": (aa * bx - ab * ax) * inverse}
    stored = {name: half_through(value.nan_to_num()) for name, value in refitted.items()}  # NaN: sums overflowed
    return _better_super_blocks(grid, blocks, importance, [fields, fields | stored])
