"""ggml's super-blocks of 256 weights (`block_q2_K` ... `block_iq4_xs` in llama.cpp's ggml-common.h): packed, and back.

`codes` are [n, 256] uint8; `fields` are the super-scales [n, 1] fp16 and the small scales [n, groups], in the order
of `Grid.layout`. In the drawings c is a code, s a small scale, m a small minimum, d and dmin the super-scales (fp16,
little endian), a number of bytes stands after a comma, and `apart k` is the order of `pack_bits`. Never rounds.
"""

from __future__ import annotations

import numpy as np

from exporters.gguf.bits import Bytes, Values, joined, pack_bits, pack_halves, unpack_bits, unpack_halves
from exporters.gguf.blocks_single import Fields, Parts

TWO, FOUR, SIX, FIFTEEN = np.uint8(2), np.uint8(4), np.uint8(6), np.uint8(15)
SIX_BITS = np.uint8(63)
TWO_OF_EACH, FOUR_OF_EACH = np.uint32(0x03030303), np.uint32(0x0F0F0F0F)  # the low bits of four bytes
SIGN_OFFSET = np.uint8(32)  # a signed 6-bit scale is stored plus 32


def _unsigned(small: Values) -> Bytes:
    """int8 scales of -32..31 -> 0..63."""
    return small.view(np.uint8) + SIGN_OFFSET


def _signed(stored: Bytes) -> Values:
    """The inverse of `_unsigned`."""
    return (stored - SIGN_OFFSET).view(np.int8)


def pack_six_bit_pairs(scales: Bytes, minima: Bytes) -> Bytes:
    """8 scales and 8 minima of 6 bits -> 12 bytes (`get_scale_min_k4`), k = 0..3:

    byte k = s[k] | (s[k + 4] >> 4) << 6
    byte 4 + k = m[k] | (m[k + 4] >> 4) << 6
    byte 8 + k = (s[k + 4] & 15) | (m[k + 4] & 15) << 4

    Four bytes at a time: numpy is slow along short rows.
    """
    (s0, s4), (m0, m4) = (np.ascontiguousarray(small).view("<u4").T for small in (scales, minima))
    first = s0 | (s4 >> np.uint32(4) & TWO_OF_EACH) << np.uint32(6)
    second = m0 | (m4 >> np.uint32(4) & TWO_OF_EACH) << np.uint32(6)
    third = (s4 & FOUR_OF_EACH) | (m4 & FOUR_OF_EACH) << np.uint32(4)
    return np.stack([first, second, third], axis=1).view(np.uint8)


def unpack_six_bit_pairs(raw: Bytes) -> tuple[Bytes, Bytes]:
    """The inverse of `pack_six_bit_pairs`."""
    first, second, third = raw[:, :4], raw[:, 4:8], raw[:, 8:12]
    scales = np.concatenate([first & SIX_BITS, (third & FIFTEEN) | (first >> SIX) << FOUR], axis=1)
    minima = np.concatenate([second & SIX_BITS, (third >> FOUR) | (second >> SIX) << FOUR], axis=1)
    return scales, minima


def pack_q2_k(codes: Bytes, fields: Fields) -> Bytes:
    """[s | m << 4, 16][c: 2 bits apart 32, 64][d 2][dmin 2] = 84 bytes; w = d * s * c - dmin * m, groups of 16."""
    shared, small, shared_minimum, minima = fields
    parts = [small | minima << FOUR, pack_bits(codes, 2, 32), pack_halves(shared), pack_halves(shared_minimum)]
    return joined(*parts)


def unpack_q2_k(raw: Bytes) -> Parts:
    small, minima = raw[:, :16] & FIFTEEN, raw[:, :16] >> FOUR
    fields = (unpack_halves(raw[:, 80:82]), small, unpack_halves(raw[:, 82:84]), minima)
    return unpack_bits(raw[:, 16:80], 2, 32), fields


def pack_q3_k(codes: Bytes, fields: Fields) -> Bytes:
    """[c >> 2: 1 bit apart 32, 32][c: 2 bits apart 32, 64][s + 32: low nibbles apart 8, 8; high 2 bits apart 4, 4][d 2]
    = 110 bytes; w = d * s * (c - 4), groups of 16."""
    shared, small = fields[0], _unsigned(fields[1])
    scales = [pack_bits(small, 4, 8), pack_bits(small >> FOUR, 2, 4)]
    parts = [pack_bits(codes >> TWO, 1, 32), pack_bits(codes, 2, 32), *scales, pack_halves(shared)]
    return joined(*parts)


def unpack_q3_k(raw: Bytes) -> Parts:
    codes = unpack_bits(raw[:, 32:96], 2, 32) | unpack_bits(raw[:, :32], 1, 32) << TWO
    small = unpack_bits(raw[:, 96:104], 4, 8) | unpack_bits(raw[:, 104:108], 2, 4) << FOUR
    return codes, (unpack_halves(raw[:, 108:110]), _signed(small))


def pack_q4_k(codes: Bytes, fields: Fields) -> Bytes:
    """[d 2][dmin 2][s and m, 12][c: 4 bits apart 32, 128] = 144 bytes; w = d * s * c - dmin * m, groups of 32."""
    shared, small, shared_minimum, minima = fields
    head = [pack_halves(shared), pack_halves(shared_minimum), pack_six_bit_pairs(small, minima)]
    return joined(*head, pack_bits(codes, 4, 32))


def unpack_q4_k(raw: Bytes) -> Parts:
    return unpack_bits(raw[:, 16:], 4, 32), _pair_fields(raw)


def pack_q5_k(codes: Bytes, fields: Fields) -> Bytes:
    """[d 2][dmin 2][s and m, 12][c >> 4: 1 bit apart 32, 32][c: 4 bits apart 32, 128] = 176 bytes; as Q4_K."""
    shared, small, shared_minimum, minima = fields
    head = [pack_halves(shared), pack_halves(shared_minimum), pack_six_bit_pairs(small, minima)]
    return joined(*head, pack_bits(codes >> FOUR, 1, 32), pack_bits(codes, 4, 32))


def unpack_q5_k(raw: Bytes) -> Parts:
    codes = unpack_bits(raw[:, 48:], 4, 32) | unpack_bits(raw[:, 16:48], 1, 32) << FOUR
    return codes, _pair_fields(raw)


def _pair_fields(raw: Bytes) -> Fields:
    """The fields at the head of Q4_K and Q5_K."""
    small, minima = unpack_six_bit_pairs(raw[:, 4:16])
    return unpack_halves(raw[:, :2]), small, unpack_halves(raw[:, 2:4]), minima


def pack_q6_k(codes: Bytes, fields: Fields) -> Bytes:
    """[c: 4 bits apart 64, 128][c >> 4: 2 bits apart 32, 64][s int8 x 16][d 2] = 210 bytes; w = d * s * (c - 32)."""
    parts = [pack_bits(codes, 4, 64), pack_bits(codes >> FOUR, 2, 32), fields[1].view(np.uint8), pack_halves(fields[0])]
    return joined(*parts)


def unpack_q6_k(raw: Bytes) -> Parts:
    codes = unpack_bits(raw[:, :128], 4, 64) | unpack_bits(raw[:, 128:192], 2, 32) << FOUR
    return codes, (unpack_halves(raw[:, 208:210]), raw[:, 192:208].view(np.int8))


def pack_iq4_xs(codes: Bytes, fields: Fields) -> Bytes:
    """[d 2][s + 32: high 2 bits apart 1, 2; low nibbles apart 1, 4][c: 4 bits apart 16, 128] = 136 bytes;
    w = d * s * level[c], groups of 32."""
    shared, small = fields[0], _unsigned(fields[1])
    head = [pack_halves(shared), pack_bits(small >> FOUR, 2, 1), pack_bits(small, 4, 1)]
    return joined(*head, pack_bits(codes, 4, 16))


def unpack_iq4_xs(raw: Bytes) -> Parts:
    small = unpack_bits(raw[:, 4:8], 4, 1) | unpack_bits(raw[:, 2:4], 2, 1) << FOUR
    return unpack_bits(raw[:, 8:], 4, 16), (unpack_halves(raw[:, :2]), _signed(small))
