"""The cosine and sine tables of rotary positions, in the float32 arithmetic of transformers' `modeling_rope_utils`.

A model has one table for each way in which its blocks rotate (Gemma 3: local and global). Positions stop at the model's
context, or where all tables together would pass TABLE_BYTES; the caller says so.

longrope has two sets of frequencies, and transformers takes the long one for every token of a text longer than the
original context. Both lie in one table, first the short rows of the original context, then the long rows of every
position; a graph chooses by adding `switch` to its positions, and copies no table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from signround.architecture import Architecture
from signround.positions import Rope

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TABLE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of `rope`, each float32 [rows, width]; `width` is half of what rotates of a head. With `switch`
    texts of more than so many tokens use rows from `switch` on: row switch + p for position p."""

    name: str
    rope: Rope
    width: int
    positions: int
    switch: int | None

    @property
    def rows(self) -> int:
        return self.positions + (self.switch or 0)

    def array(self, part: str) -> NDArray[np.float32]:
        """float32 [rows, width] of `part` "cos" or "sin"."""
        if self.switch is None:
            angles = _angles(self.positions, inverse_frequencies(self.rope, self.width, long=False))
        else:
            short = _angles(self.switch, inverse_frequencies(self.rope, self.width, long=False))
            angles = torch.cat([short, _angles(self.positions, inverse_frequencies(self.rope, self.width, long=True))])
        turned = angles.cos() if part == "cos" else angles.sin()
        table: NDArray[np.float32] = (turned * self.rope.attention_factor).numpy()
        return table


def rotary_tables(architecture: Architecture) -> dict[Rope, RotaryTable]:
    """The table of each rope that some block has."""
    positions = positions_of(architecture)
    return {
        rope: RotaryTable(
            f"rope.{index}" if index else "rope",
            rope,
            rope.dimensions(architecture.head_dim) // 2,
            positions,
            _switch(rope, positions),
        )
        for index, rope in enumerate(_ropes(architecture))
    }


def positions_of(architecture: Architecture) -> int:
    """Positions that the tables have: the context, capped at what TABLE_BYTES holds (131072 for heads of 128)."""
    bytes_a_position, bytes_before, switch = 0, 0, 0
    for rope in _ropes(architecture):
        row = rope.dimensions(architecture.head_dim) // 2 * 4 * 2
        longest = _switch(rope, architecture.context) or 0
        bytes_a_position, bytes_before, switch = (
            bytes_a_position + row,
            bytes_before + row * longest,
            max(switch, longest),
        )
    if not bytes_a_position:
        return architecture.context
    positions = (TABLE_BYTES - bytes_before) // bytes_a_position
    if positions <= switch:  # no room for texts that take the long factors, and no need of their rows
        positions = min(switch, TABLE_BYTES // bytes_a_position)
    return min(architecture.context, positions)


def inverse_frequencies(rope: Rope, width: int, *, long: bool = False) -> Tensor:
    """float32 [width]. `llama3`: long waves are slowed by `factor`, short ones kept, a ramp between
    (`_compute_llama3_parameters` of transformers); `longrope`: each divided by a factor of its own, `long` chooses the
    set (`_compute_longrope_parameters`)."""
    exponents = torch.arange(0, 2 * width, 2, dtype=torch.int64).float() / (2 * width)
    if rope.kind == "longrope":
        factors = torch.tensor(rope.long_factors if long else rope.short_factors, dtype=torch.float32)
        return 1.0 / (factors * rope.theta**exponents)
    inverse = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind != "llama3":
        return inverse
    wavelength = 2 * math.pi / inverse
    low_wavelength = rope.original_context / rope.low_freq_factor
    high_wavelength = rope.original_context / rope.high_freq_factor
    slowed = torch.where(wavelength > low_wavelength, inverse / rope.factor, inverse)
    ramp = (rope.original_context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = (1 - ramp) * slowed / rope.factor + ramp * slowed
    medium = ~(wavelength < high_wavelength) * ~(wavelength > low_wavelength)
    return torch.where(medium, smooth, slowed)


def _ropes(architecture: Architecture) -> list[Rope]:
    """The distinct ropes, in order of appearance."""
    return list(dict.fromkeys(rope for rope in architecture.ropes if rope is not None))


def _switch(rope: Rope, positions: int) -> int | None:
    """The length above which a text takes the long factors; None where no text of the table is so long."""
    return rope.original_context if rope.kind == "longrope" and positions > rope.original_context else None


def _angles(positions: int, frequencies: Tensor) -> Tensor:
    return torch.arange(positions).float()[:, None] * frequencies[None, :]
