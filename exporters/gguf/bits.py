"""Small integers and fp16 numbers as bytes: what all of ggml's blocks are made of. Each `pack` has its `unpack`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Values = npt.NDArray[Any]


def pack_bits(values: Bytes, bits: int, apart: int) -> Bytes:
    """[n, m] -> [n, m * bits / 8]: the low `bits` (1, 2, 4) of each value, those of one byte `apart` places apart.

    Byte l of each run of 8 / bits * apart values = v[l] | v[l + apart] << bits | v[l + 2 apart] << 2 bits ...
    """
    places = 8 // bits
    runs = (values & np.uint8((1 << bits) - 1)).reshape(len(values), -1, places, apart)
    packed: Bytes = runs[:, :, 0].copy()
    for place in range(1, places):
        packed |= runs[:, :, place] << np.uint8(bits * place)
    return packed.reshape(len(values), -1)


def unpack_bits(raw: Bytes, bits: int, apart: int) -> Bytes:
    """The inverse of `pack_bits`: [n, m] -> [n, m * 8 / bits]."""
    places = 8 // bits
    runs = np.ascontiguousarray(raw).reshape(len(raw), -1, 1, apart)
    shifts = (np.arange(places, dtype=np.uint8) * np.uint8(bits)).reshape(-1, 1)
    values: Bytes = (runs >> shifts) & np.uint8((1 << bits) - 1)
    return values.reshape(len(raw), -1)


def pack_halves(values: Values) -> Bytes:
    """[n, 1] fp16 -> [n, 2], little endian."""
    return np.ascontiguousarray(values, dtype="<f2").view(np.uint8)


def unpack_halves(raw: Bytes) -> Values:
    """The inverse of `pack_halves`: [n, 2] -> [n, 1]."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float16)
