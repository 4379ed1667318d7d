"""The grid: which real numbers a quantised weight may take. The only rounding in the project.

Four verbs and no others, all differentiable through straight-through estimators:

    fit     range of each group          -> real scale (and minimum)
    snap    real scale (and minimum)     -> fields, each exactly what a file can hold
    codes   weight, fields, offset V     -> integer codes
    decode  codes, fields                -> weight, in the runtime's order of operations (bit-exact with it)

Three choices tell all grids apart: how scales are stored (`direct`: one fp16 a group; two-level: an integer a group
times one fp16 a super-block; power of two: an exponent a group), what zero means (`centre`: a constant; `point`: a
stored integer; `minimum`: a stored float that is subtracted), and where the levels lie (evenly, or by a codebook).
The grid knows neither file formats nor models.

Tensors inside the grid are grouped: a weight [rows, columns] becomes [rows, groups, group] (`grouped`), the last group
padded with zeros when the row is ragged. Fields travel as float32 tensors that hold exactly storable values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from signround.codebooks import CODEBOOKS, codebook

Zero = Literal["centre", "point", "minimum"]
Fields = Mapping[str, Tensor]
HALF_MAX = 65504.0
EXPONENT_BIAS = 128  # a power-of-two scale is 2^(exponent - 128): OCP's E8M0 (bias 127), halved for the doubled levels
EXPONENT_LOW, EXPONENT_HIGH = 2, 250  # within them neither the scale nor its reciprocal leaves float32's normal range


def straight_through(value: Tensor, stored: Tensor) -> Tensor:
    """`stored` in the forward pass, exactly, the gradient of `value` in the backward pass (both finite)."""
    # Not `value + (stored - value).detach()`: that sum is rounded, and a scale of 1e30 would become 0, not 65504.
    return stored.detach() + (value - value.detach())


def round_through(value: Tensor) -> Tensor:
    """Round half to even, with a straight-through gradient."""
    return straight_through(value, value.round())


def half_through(value: Tensor) -> Tensor:
    """Round to IEEE fp16 (subnormals kept), with a straight-through gradient; overflow saturates, without gradient."""
    value = value.clamp(-HALF_MAX, HALF_MAX)
    return straight_through(value, value.half().float())


def safe_reciprocal(value: Tensor) -> Tensor:
    """1 / value, and 0 where value is 0; unlike `where(d == 0, 0, 1 / d)` its gradient has no NaN."""
    zero = value == 0
    return torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, value))


def power_through(value: Tensor) -> tuple[Tensor, Tensor]:
    """(2^(exponent - 128), exponent) nearest to `value` >= 0 in the logarithm; no gradient: steps of two are too coarse
    for sign descent to walk."""
    with torch.no_grad():
        exponent = value.clamp(min=2.0**-126).log2().round() + EXPONENT_BIAS
        exponent = exponent.clamp(EXPONENT_LOW, EXPONENT_HIGH)
    return power_of(exponent), exponent


def power_of(exponent: Tensor) -> Tensor:
    """2^(exponent - 128), exact in float32."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.to(torch.int32) - EXPONENT_BIAS)


def grouped(weight: Tensor, group: int) -> Tensor:
    """[rows, columns] -> [rows, ceil(columns / group), group]; a ragged last group is padded with zeros."""
    rows, columns = weight.shape
    padding = -columns % group
    if padding:
        weight = torch.nn.functional.pad(weight, (0, padding))
    return weight.reshape(rows, -1, group)


def ungrouped(blocks: Tensor, columns: int) -> Tensor:
    """The inverse of `grouped`: [rows, groups, group] -> [rows, columns]."""
    return blocks.flatten(-2)[:, :columns]


@dataclass(frozen=True)
class SuperBlock:
    """Two-level scales: `groups` groups share one fp16, each keeps an integer of `bits` bits (signed or not)."""

    bits: int
    groups: int
    signed: bool

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


@dataclass(frozen=True)
class Grid:
    """A set of representable weights: `bits`-bit codes in groups of `group` inputs (None: one group a row).

    `code_min` is the lowest code in use (1 keeps q8_0 within -127..127); `zero_floor` the lowest stored zero point
    (1 for GPTQ v1, which cannot hold 0; research: three incompatible encodings of 0 exist). `codebook` names uneven
    levels (`CODEBOOKS`); `power_of_two` scales are stored as an exponent.
    """

    bits: int
    group: int | None
    zero: Zero = "centre"
    code_min: int = 0
    zero_floor: int = 0
    super_block: SuperBlock | None = None
    codebook: str | None = None
    power_of_two: bool = False

    # ---- shape

    @property
    def code_max(self) -> int:
        return len(CODEBOOKS[self.codebook]) - 1 if self.codebook else (1 << self.bits) - 1

    @property
    def centre(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def direct(self) -> bool:
        """Whether every group has an fp16 scale of its own."""
        return self.super_block is None and not self.power_of_two

    @property
    def plain(self) -> bool:
        """Whether levels are even and every group has an fp16 scale of its own: all that most formats can hold."""
        return self.direct and self.codebook is None

    def group_of(self, columns: int) -> int:
        """Inputs in one group for rows of `columns` weights."""
        return self.group or columns

    def groups_of(self, columns: int) -> int:
        return -(-columns // self.group_of(columns))

    def layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of every stored field, `codes` excluded."""
        groups = self.groups_of(columns)
        fields: dict[str, tuple[tuple[int, int], torch.dtype]] = {}
        floats = ("scale", "minimum") if self.zero == "minimum" else ("scale",)
        for name in floats:
            if self.power_of_two:
                fields["exponent"] = ((rows, groups), torch.uint8)
            elif self.super_block is None:
                fields[name] = ((rows, groups), torch.float16)
            else:
                integer = torch.int8 if self.super_block.signed else torch.uint8
                fields[f"{name}_super"] = ((rows, groups // self.super_block.groups), torch.float16)
                fields[f"{name}_sub"] = ((rows, groups), integer)
        if self.zero == "point":
            fields["zero_point"] = ((rows, groups), torch.uint8)
        return fields

    def bounds(self, field: str) -> tuple[int, int]:
        """Lowest and highest integer that `codes`, `zero_point` or a two-level `*_sub` may hold."""
        if field == "codes":
            return self.code_min, self.code_max
        if field == "zero_point":
            return self.zero_floor, self.code_max
        if field == "exponent":
            return EXPONENT_LOW, EXPONENT_HIGH
        assert self.super_block is not None
        return self.super_block.low, self.super_block.high

    def ragged(self, columns: int) -> bool:
        """Whether a row of `columns` weights leaves the last group (or super-block) incomplete."""
        block = self.group_of(columns) * (self.super_block.groups if self.super_block else 1)
        return columns % block != 0

    # ---- the four verbs

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Real scale and minimum that span [low, high] of each group; low <= 0 <= high, both [rows, groups].

        `centre`: full-range symmetric with a signed scale (SignRound's default, from llama.cpp's Q4_0): the end of
        larger magnitude lies exactly on code 0, whichever its sign, so all 2^bits codes are used.
        """
        if self.zero == "centre":
            if self.code_min or self.power_of_two:
                return torch.maximum(high, -low) / -self._lowest, None
            return torch.where(high > -low, high, low) / self._lowest, None
        if self.zero == "point" and self.zero_floor:
            # The lowest zero point must stay within the range, or the upper end would be clipped.
            low = torch.minimum(low, -high * self.zero_floor / (self.code_max - self.zero_floor))
        return (high - low) / self.code_max, -low

    def snap(self, scale: Tensor, minimum: Tensor | None, shared: Fields | None = None) -> dict[str, Tensor]:
        """Round real scale and minimum [rows, groups] to what a file can hold.

        `shared` gives a two-level grid its super-scales, `scale_super` and `minimum_super` [rows, super-blocks];
        without it the extreme group of each super-block sets them.
        """
        if self.power_of_two:
            return {"exponent": power_through(scale)[1]}
        fields = self._snap_level("scale", scale, shared)
        if self.zero == "minimum":
            assert minimum is not None
            fields |= self._snap_level("minimum", minimum, shared)
        elif self.zero == "point":
            assert minimum is not None
            zero = round_through(minimum * safe_reciprocal(fields["scale"]))
            fields["zero_point"] = zero.clamp(self.zero_floor, self.code_max)
        return fields

    def codes(self, weight: Tensor, fields: Fields, offset: Tensor | float = 0.0) -> Tensor:
        """Codes (float, integral) of a grouped weight; `offset` is V, added before rounding, in units of a step."""
        scale, zero = self._scale_and_zero(fields)
        inverse = safe_reciprocal(scale)
        level = (weight + zero) * inverse if self.zero == "minimum" else weight * inverse
        if self.codebook:
            return self._ranks(level, offset)
        rounded = round_through(level + offset)
        if self.zero != "minimum":
            rounded = rounded + zero
        return rounded.clamp(self.code_min, self.code_max)

    def decode(self, codes: Tensor, fields: Fields) -> Tensor:
        """Grouped codes -> grouped float32 weights, in the order of operations that the runtimes use."""
        scale, zero = self._scale_and_zero(fields)
        if self.codebook:
            return scale * self._level_of(codes)
        if self.zero == "minimum":
            return scale * codes - zero
        return scale * (codes - zero)

    # ---- parts

    @property
    def _lowest(self) -> int:
        """The level, in units of the scale, that code `code_min` of a centre grid stands for."""
        return CODEBOOKS[self.codebook][0] if self.codebook else self.code_min - self.centre

    def _ranks(self, level: Tensor, offset: Tensor | float) -> Tensor:
        """Codes of real levels of the codebook. The gradient divides by the slope that `_level_of` multiplies with, so
        that a decoded weight follows its level with slope one, as on an even grid. (With the slope of the gap instead,
        a quarter of the scales' gradients had the wrong sign on IQ4_NL.)"""
        assert self.codebook is not None
        levels = codebook(self.codebook, level.device)
        if isinstance(offset, float) and offset == 0.0 and not level.requires_grad:
            return levels.nearest(level)  # as below but for exact ties, several times as fast; searches come here
        with torch.no_grad():
            rounded = (levels.ranks(level) + offset).round()
            slope = levels.slope_at(rounded)
        return straight_through(level / slope + offset, rounded).clamp(self.code_min, self.code_max)

    def _level_of(self, codes: Tensor) -> Tensor:
        """The level of integral codes, exactly; the gradient is the slope there."""
        assert self.codebook is not None
        levels = codebook(self.codebook, codes.device)
        value = levels.values_at(codes.detach())
        if not codes.requires_grad:
            return value
        return value + levels.slope_at(codes.detach()) * (codes - codes.detach())

    def _snap_level(self, name: str, value: Tensor, shared: Fields | None) -> dict[str, Tensor]:
        level = self.super_block
        if level is None:
            return {name: half_through(value)}
        blocks = value.reshape(*value.shape[:-1], -1, level.groups)
        if shared is not None:
            extreme = shared[f"{name}_super"].unsqueeze(-1)
        elif level.signed:
            extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / level.low
        else:
            extreme = blocks.amax(-1, keepdim=True) / level.high
        top = half_through(extreme)
        small = round_through(blocks * safe_reciprocal(top)).clamp(level.low, level.high)
        return {f"{name}_super": top.squeeze(-1), f"{name}_sub": small.flatten(-2)}

    def _level(self, name: str, fields: Fields) -> Tensor:
        """The float32 value of a stored level, [rows, groups, 1]."""
        if self.power_of_two:
            return power_of(fields["exponent"]).unsqueeze(-1)
        if self.super_block is None:
            return fields[name].float().unsqueeze(-1)
        small = fields[f"{name}_sub"].float()
        small = small.reshape(*small.shape[:-1], -1, self.super_block.groups)
        level = fields[f"{name}_super"].float().unsqueeze(-1) * small
        return level.flatten(-2).unsqueeze(-1)

    def _scale_and_zero(self, fields: Fields) -> tuple[Tensor, Tensor]:
        scale = self._level("scale", fields)
        if self.zero == "minimum":
            return scale, self._level("minimum", fields)
        if self.zero == "point":
            return scale, fields["zero_point"].float().unsqueeze(-1)
        return scale, torch.full((), 0.0 if self.codebook else float(self.centre), device=scale.device)

    # ---- as a value

    def bits_per_weight(self, columns: int) -> float:
        """Stored bits a weight, fields included, before any container's padding."""
        stored = sum(
            shape[1] * torch.empty(0, dtype=dtype).element_size() * 8
            for name, (shape, dtype) in self.layout(1, columns).items()
            if not name.endswith(("_sub", "zero_point"))
        )
        groups = self.groups_of(columns)
        if self.super_block is not None:
            stored += self.super_block.bits * groups * (2 if self.zero == "minimum" else 1)
        if self.zero == "point":
            stored += self.bits * groups
        return self.bits + stored / columns

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Grid:
        """Inverse of `to_json`; unknown fields are errors (TypeError)."""
        level = data.get("super_block")
        return Grid(**{**data, "super_block": SuperBlock(**level) if level else None})
