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
    if apart == 1:
        return _pack_neighbours(values, bits)
    places = 8 // bits
    word = np.dtype("<u8" if apart % WORD == 0 else np.uint8)  # no bit leaves its byte: a word is bytes side by side
    low, shift = word.type(0x0101010101010101 * ((1 << bits) - 1) & np.iinfo(word).max), word.type(bits)
    runs = np.ascontiguousarray(values).view([(str(place), f"V{apart}") for place in range(places)])

    def all_of(place: int) -> Values:
        """Copied first: numpy is slow along short rows, and copies items of any size fast."""
        found: Values = runs[str(place)].copy().reshape(-1).view(word)
        found &= low
        return found

    packed = all_of(places - 1)
    for place in range(places - 2, -1, -1):
        packed <<= shift
        packed |= all_of(place)
    return packed.view(np.uint8).reshape(len(values), values.shape[1] // places)


def _pack_neighbours(values: Bytes, bits: int) -> Bytes:
    """`pack_bits` of neighbours: those of one byte are one integer, whose parts move down into its lowest byte."""
    places = 8 // bits
    words = np.ascontiguousarray(values).view(f"<u{places}") & int.from_bytes(bytes([(1 << bits) - 1]) * places)
    packed = words.copy()
    for place in range(1, places):
        packed |= words >> (8 - bits) * place
    return packed.astype(np.uint8)


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
