"""ggml's blocks with one scale each (`block_q4_0` and kin in llama.cpp's ggml-common.h): packed, and back.

`codes` are [n, elements] uint8; `fields` one array [n, 1] per stored field of the grid, in the order of `Grid.layout`.
d, m are fp16, little endian; nibbles hold elements j and j + 16 of a block, not neighbours. Never rounds.
"""

from __future__ import annotations

import numpy as np

from exporters.gguf.bits import Bytes, Values, joined, pack_bits, pack_halves, unpack_bits, unpack_halves

Fields = tuple[Values, ...]
Parts = tuple[Bytes, Fields]

HALF_BLOCK = 16
THREE, FOUR, TOP_BIT = np.uint8(3), np.uint8(4), np.uint8(0x80)
# The file's FP4 is a sign bit and a magnitude index; a code of ours is the rank of the value (`CODEBOOKS["e2m1"]`).
NIBBLE_OF_RANK = np.array([15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7], dtype=np.uint8)
RANK_OF_NIBBLE = np.array([7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0], dtype=np.uint8)


def pack_nibbles(codes: Bytes) -> Bytes:
    """[n, 32] -> [n, 16]: byte j = (c[j] & 15) | (c[j + 16] & 15) << 4."""
    return pack_bits(codes, 4, HALF_BLOCK)


def unpack_nibbles(raw: Bytes) -> Bytes:
    return unpack_bits(raw, 4, HALF_BLOCK)


def pack_fifth_bits(codes: Bytes) -> Bytes:
    """[n, 32] codes of 5 bits -> [n, 4]: bit j of the little-endian word = bit 4 of c[j]."""
    return pack_bits(codes >> FOUR, 1, 1)


def unpack_fifth_bits(raw: Bytes) -> Bytes:
    """[n, 4] -> [n, 32] holding 0 or 16."""
    high: Bytes = unpack_bits(raw, 1, 1) << FOUR
    return high


def pack_q4_0(codes: Bytes, fields: Fields) -> Bytes:
    """[d 2][nibbles 16] = 18 bytes; w = d * (c - 8)."""
    return joined(pack_halves(fields[0]), pack_nibbles(codes))


def unpack_q4_0(raw: Bytes) -> Parts:
    return unpack_nibbles(raw[:, 2:]), (unpack_halves(raw[:, :2]),)


def pack_q4_1(codes: Bytes, fields: Fields) -> Bytes:
    """[d 2][m 2][nibbles 16] = 20 bytes; w = d * c + m, m = -minimum."""
    return joined(pack_halves(fields[0]), pack_halves(-fields[1]), pack_nibbles(codes))


def unpack_q4_1(raw: Bytes) -> Parts:
    return unpack_nibbles(raw[:, 4:]), (unpack_halves(raw[:, :2]), -unpack_halves(raw[:, 2:4]))


def pack_q5_0(codes: Bytes, fields: Fields) -> Bytes:
    """[d 2][fifth bits 4][nibbles 16] = 22 bytes; w = d * (c - 16)."""
    return joined(pack_halves(fields[0]), pack_fifth_bits(codes), pack_nibbles(codes))


def unpack_q5_0(raw: Bytes) -> Parts:
    return unpack_nibbles(raw[:, 6:]) | unpack_fifth_bits(raw[:, 2:6]), (unpack_halves(raw[:, :2]),)


def pack_q5_1(codes: Bytes, fields: Fields) -> Bytes:
    """[d 2][m 2][fifth bits 4][nibbles 16] = 24 bytes; w = d * c + m, m = -minimum."""
    head = pack_halves(fields[0]), pack_halves(-fields[1])
    return joined(*head, pack_fifth_bits(codes), pack_nibbles(codes))


def unpack_q5_1(raw: Bytes) -> Parts:
    codes = unpack_nibbles(raw[:, 8:]) | unpack_fifth_bits(raw[:, 4:8])
    return codes, (unpack_halves(raw[:, :2]), -unpack_halves(raw[:, 2:4]))


def pack_q8_0(codes: Bytes, fields: Fields) -> Bytes:
    """[d 2][int8 x 32] = 34 bytes; w = d * (c - 128), so code 0 is the byte -128 (legal: ggml multiplies in int)."""
    return joined(pack_halves(fields[0]), codes ^ TOP_BIT)  # c - 128 as int8 is c with the top bit flipped


def unpack_q8_0(raw: Bytes) -> Parts:
    return raw[:, 2:] ^ TOP_BIT, (unpack_halves(raw[:, :2]),)


def pack_q2_0(codes: Bytes, fields: Fields) -> Bytes:
    """[d 2][2 bits x 64] = 18 bytes, q = element j at bits 2 (j % 4) of byte j / 4; ggml decodes d * (q - 1).

    Our code means scale * (c - 2), which is -scale * (q - 1) with q = 3 - c: the same four levels, mirrored.
    """
    return joined(pack_halves(-fields[0]), pack_bits(THREE - codes, 2, 1))


def unpack_q2_0(raw: Bytes) -> Parts:
    return THREE - unpack_bits(raw[:, 2:], 2, 1), (-unpack_halves(raw[:, :2]),)


def pack_mxfp4(codes: Bytes, fields: Fields) -> Bytes:
    """[e 1][nibbles 16] = 17 bytes; w = 2^(e - 128) * level, a nibble is sign << 3 | index of the magnitude among
    0 1 2 3 4 6 8 12 (doubled E2M1). Never writes the second zero, nibble 8."""
    return joined(fields[0], pack_nibbles(NIBBLE_OF_RANK[codes]))


def unpack_mxfp4(raw: Bytes) -> Parts:
    return RANK_OF_NIBBLE[unpack_nibbles(raw[:, 1:])], (raw[:, :1],)
