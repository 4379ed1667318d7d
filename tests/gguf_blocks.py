"""Slow, obvious packers of llama.cpp blocks for tests: one number at a time is the specification (ggml-common.h).

They share no code with the exporters, so that a test can tell which of the two is wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from signround.qtensor import QuantizedTensor

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def _half(values: Any) -> Bytes:
    """[...] floats -> [..., 2] bytes, little-endian fp16."""
    halves = np.asarray(values).astype("<f2")
    return np.ascontiguousarray(halves)[..., None].view(np.uint8)


def _blocks(tensor: QuantizedTensor, size: int) -> Bytes:
    """Codes as [rows, blocks, size]."""
    return tensor.codes.numpy().reshape(tensor.shape[0], -1, size)


def _nibbles(codes: Bytes) -> Bytes:
    """[..., 32] -> [..., 16]: element j in the low half of byte j, element j + 16 in the high half."""
    return (codes[..., :16] & 15) | (codes[..., 16:] & 15) << 4


def _fifth_bits(codes: Bytes) -> Bytes:
    """[..., 32] -> [..., 4]: bit j of the little-endian word is bit 4 of element j."""
    word = np.zeros(codes.shape[:-1], dtype="<u4")
    for j in range(32):
        word |= ((codes[..., j] >> 4) & 1).astype("<u4") << np.uint32(j)
    return word[..., None].view(np.uint8)


def _direct(tensor: QuantizedTensor) -> tuple[Bytes, Bytes, Bytes | None]:
    fields = {name: field.numpy() for name, field in tensor.fields.items()}
    minimum = _half(-fields["minimum"]) if "minimum" in fields else None  # the file adds what the grid subtracts
    return _blocks(tensor, 32), _half(fields["scale"]), minimum


def _crumbs(codes: Bytes) -> Bytes:
    """[..., 256] -> [..., 64]: in each half of 128, byte l holds the low 2 bits of elements l, l+32, l+64, l+96."""
    quarters = codes.reshape(*codes.shape[:-1], 2, 4, 32) & 3
    packed = quarters[..., 0, :] | quarters[..., 1, :] << 2 | quarters[..., 2, :] << 4 | quarters[..., 3, :] << 6
    return packed.reshape(*codes.shape[:-1], 64)


def _bit_planes(codes: Bytes, bit: int) -> Bytes:
    """[..., 256] -> [..., 32]: bit b of byte l is bit `bit` of element 32 b + l."""
    planes = (codes.reshape(*codes.shape[:-1], 8, 32) >> bit) & 1
    packed = np.zeros((*codes.shape[:-1], 32), dtype=np.uint8)
    for b in range(8):
        packed |= planes[..., b, :] << b
    return packed


def _six_bit_pairs(scales: Bytes, minima: Bytes) -> Bytes:
    """8 scales and 8 minima of 6 bits -> 12 bytes (get_scale_min_k4)."""
    packed = np.zeros((*scales.shape[:-1], 12), dtype=np.uint8)
    for j in range(4):
        packed[..., j] = scales[..., j] | (scales[..., j + 4] >> 4) << 6
        packed[..., j + 4] = minima[..., j] | (minima[..., j + 4] >> 4) << 6
        packed[..., j + 8] = (scales[..., j + 4] & 15) | (minima[..., j + 4] & 15) << 4
    return packed


def _two_level(tensor: QuantizedTensor) -> tuple[Bytes, dict[str, Any]]:
    level = tensor.grid.super_block
    assert level is not None
    parts: dict[str, Any] = {}
    for name, field in tensor.fields.items():
        values = field.numpy()
        parts[name] = _half(values) if name.endswith("super") else values.reshape(len(values), -1, level.groups)
    return _blocks(tensor, 256), parts


def pack(tensor: QuantizedTensor, kind: str) -> Bytes:
    """Bytes [rows, bytes a row] of a tensor on the grid of `kind` (a name of ggml's types in lower case)."""
    if kind == "mxfp4":
        parts = _pack_mxfp4(tensor)
    elif kind == "q2_0":
        parts = _pack_q2_0(tensor)
    else:
        parts = _pack_two_level(tensor, kind) if kind.endswith(("k", "xs")) else _pack_direct(tensor, kind)
    return np.concatenate(parts, -1).reshape(tensor.shape[0], -1)


def _pack_direct(tensor: QuantizedTensor, kind: str) -> list[Bytes]:
    codes, scale, minimum = _direct(tensor)
    if kind == "q8_0":
        return [scale, (codes.astype(np.int16) - 128).astype(np.int8).view(np.uint8)]
    head = [scale] if minimum is None else [scale, minimum]
    if kind.startswith("q5"):
        head.append(_fifth_bits(codes))
    return [*head, _nibbles(codes)]


def _pack_mxfp4(tensor: QuantizedTensor) -> list[Bytes]:
    """The exponent, then signed magnitudes: the file's index of each value is found by looking for it."""
    file_values = [0, 1, 2, 3, 4, 6, 8, 12, None, -1, -2, -3, -4, -6, -8, -12]  # 8 is a second zero
    ascending = sorted(value for value in file_values if value is not None)
    nibbles = np.array([file_values.index(value) for value in ascending], dtype=np.uint8)
    return [tensor.fields["exponent"].numpy()[..., None], _nibbles(nibbles[_blocks(tensor, 32)])]


def _pack_q2_0(tensor: QuantizedTensor) -> list[Bytes]:
    """ggml's level is q - 1, ours c - 2: turned round, -1 0 1 2 is 1 0 -1 -2, with the sign in the scale."""
    mirrored = 3 - _blocks(tensor, 64)
    packed = np.zeros((*mirrored.shape[:-1], 16), dtype=np.uint8)
    for j in range(64):
        packed[..., j // 4] |= mirrored[..., j] << (2 * (j % 4))
    return [_half(-tensor.fields["scale"].numpy()), packed]


def _pack_two_level(tensor: QuantizedTensor, kind: str) -> list[Bytes]:
    codes, parts = _two_level(tensor)
    scale, small = parts["scale_super"], parts["scale_sub"]
    if kind == "q2_k":
        return [small | parts["minimum_sub"] << 4, _crumbs(codes), scale, parts["minimum_super"]]
    if kind == "q3_k":
        unsigned = (small.astype(np.int16) + 32).astype(np.uint8)
        packed = np.zeros((*unsigned.shape[:-1], 12), dtype=np.uint8)
        for j in range(8):
            packed[..., j] = (unsigned[..., j] & 15) | (unsigned[..., j + 8] & 15) << 4
        for j in range(16):
            packed[..., 8 + j % 4] |= (unsigned[..., j] >> 4) << (2 * (j // 4))
        return [_bit_planes(codes, 2), _crumbs(codes), packed, scale]
    if kind == "q6_k":
        halves = codes.reshape(*codes.shape[:-1], 2, 4, 32)
        low = np.stack([halves[..., 0, :] & 15 | (halves[..., 2, :] & 15) << 4,
                        halves[..., 1, :] & 15 | (halves[..., 3, :] & 15) << 4], -2)  # fmt: skip
        high = _crumbs(codes >> 4)
        return [low.reshape(*codes.shape[:-1], 128), high, small.view(np.uint8), scale]
    if kind == "iq4_xs":
        unsigned = (small.astype(np.int16) + 32).astype(np.uint8)
        high = np.zeros((*unsigned.shape[:-1], 1), dtype="<u2")
        low = np.zeros((*unsigned.shape[:-1], 4), dtype=np.uint8)
        for j in range(8):
            high[..., 0] |= (unsigned[..., j] >> 4).astype("<u2") << (2 * j)
            low[..., j // 2] |= (unsigned[..., j] & 15) << (4 * (j % 2))
        body = _nibbles(codes.reshape(*codes.shape[:-1], 8, 32)).reshape(*codes.shape[:-1], 128)
        return [scale, high.view(np.uint8), low, body]
    head = [scale, parts["minimum_super"], _six_bit_pairs(small, parts["minimum_sub"])]
    chunks = codes.reshape(*codes.shape[:-1], 4, 2, 32) & 15
    body = (chunks[..., 0, :] | chunks[..., 1, :] << 4).reshape(*codes.shape[:-1], 128)
    return [*head, _bit_planes(codes, 4), body] if kind == "q5_k" else [*head, body]
