"""The cosine and sine tables of rotary positions, in the float32 arithmetic of transformers' `modeling_rope_utils`.

Positions stop at the model's context, or where both tables together would pass TABLE_BYTES; the caller says so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from signround.architecture import Architecture
from signround.positions import Rope

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TABLE_BYTES = 64 * 2**20


def positions_of(architecture: Architecture) -> int:
    """Rows of the tables: the context, capped at what TABLE_BYTES holds (131072 positions for heads of 128)."""
    return min(architecture.context, TABLE_BYTES // (architecture.head_dim // 2 * 4 * 2))


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """float32 [head_dim / 2]. `llama3`: long waves are slowed by `factor`, short ones kept, a ramp between
    (`_compute_llama3_parameters` of transformers)."""
    inverse = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
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


def rotary_table(architecture: Architecture, part: str) -> NDArray[np.float32]:
    """float32 [positions, head_dim / 2] of `part` "cos" or "sin"."""
    positions = torch.arange(positions_of(architecture)).float()
    angles = positions[:, None] * inverse_frequencies(architecture.rope, architecture.head_dim)[None, :]
    table: NDArray[np.float32] = (angles.cos() if part == "cos" else angles.sin()).numpy()
    return table
