"""Small integers and fp16 numbers as bytes: what all of ggml's blocks are made of. Each `pack` has its `unpack`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Values = npt.NDArray[Any]

WORD = 8  # bytes


def pack_bits(values: Bytes, bits: int, apart: int) -> Bytes:
    """[n, m] -> [n, m * bits / 8]: the low `bits` (1, 2, 4) of each value, those of one byte `apart` places apart.

    Byte l of each run of 8 / bits * apart values = v[l] | v[l + apart] << bits | v[l + 2 apart] << 2 bits ...
    """
    if apart % WORD == 0:
        return _pack_words(values, bits, apart // WORD)
    places = 8 // bits
    runs = (values & np.uint8((1 << bits) - 1)).reshape(len(values), -1, places, apart)
    packed: Bytes = runs[:, :, 0].copy()
    for place in range(1, places):
        packed |= runs[:, :, place] << np.uint8(bits * place)
    return packed.reshape(len(values), -1)


def _pack_words(values: Bytes, bits: int, apart: int) -> Bytes:
    """`pack_bits` on eight bytes at a time, `apart` in words: no bit leaves its byte, so a word is eight bytes side by
    side. The n rows are turned to lie along the inner axis, because numpy is slow along short rows."""
    low, shift = np.uint64(0x0101010101010101 * ((1 << bits) - 1)), np.uint64(bits)
    words = np.ascontiguousarray(np.ascontiguousarray(values).view("<u8").T) & low
    runs = words.reshape(-1, 8 // bits, apart, len(values))
    packed = runs[:, -1] << shift
    for place in range(runs.shape[1] - 2, 0, -1):
        packed |= runs[:, place]
        packed <<= shift
    packed |= runs[:, 0]
    return np.ascontiguousarray(packed.reshape(-1, len(values)).T).view(np.uint8)


def joined(*parts: Bytes) -> Bytes:
    """[n, a], [n, b], ... -> [n, a + b + ...]: `np.concatenate(parts, axis=1)`, copied by parts and not by rows."""
    fields = [(f"part{index}", f"V{part.shape[1]}") for index, part in enumerate(parts)]
    rows = np.empty(len(parts[0]), dtype=np.dtype(fields))
    for (name, kind), part in zip(fields, parts, strict=True):
        rows[name] = np.ascontiguousarray(part).view(kind)[:, 0]
    return rows.view(np.uint8).reshape(len(rows), -1)


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
