"""GGUF block types: how the codes and fields of a QuantizedTensor lie in ggml's blocks, and back.

A block holds `elements` neighbouring weights of one row (`block_q4_0` and kin in llama.cpp's ggml-common.h). A grid
whose groups are longer than a block is stored with its scale repeated, so nothing is lost and the file grows. Numpy,
vectorised over all blocks; never rounds: a grid that no block holds is named by `obstacle`, not approximated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from signround.grid import Grid
from signround.qtensor import QuantizedTensor

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]
Parts = tuple[Bytes, tuple[Halves, ...]]

BLOCK = 32
FOUR, FIFTEEN, TOP_BIT = np.uint8(4), np.uint8(15), np.uint8(0x80)


def _halves(values: Halves) -> Bytes:
    """[n] fp16 -> [n, 2] bytes, little endian."""
    return np.ascontiguousarray(values, dtype="<f2").reshape(-1, 1).view(np.uint8)


def _half(raw: Bytes, start: int) -> Halves:
    """The fp16 at byte `start` of every block: [n, bytes] -> [n]."""
    return np.ascontiguousarray(raw[:, start : start + 2]).view("<f2").reshape(-1).astype(np.float16)


def low_nibbles(codes: Bytes) -> Bytes:
    low: Bytes = np.bitwise_and(codes, FIFTEEN)
    return low


def pack_nibbles(codes: Bytes) -> Bytes:
    """[n, 32] codes of 4 bits -> [n, 16]: byte j = c[j] | c[j + 16] << 4 (halves, not neighbours)."""
    joined: Bytes = np.bitwise_or(codes[:, :16], np.left_shift(codes[:, 16:], FOUR))
    return joined


def unpack_nibbles(raw: Bytes) -> Bytes:
    """The inverse of `pack_nibbles`: [n, 16] -> [n, 32]."""
    return np.concatenate([low_nibbles(raw), np.right_shift(raw, FOUR)], axis=1)


def pack_fifth_bits(codes: Bytes) -> Bytes:
    """[n, 32] codes of 5 bits -> [n, 4]: bit j of the little-endian word = bit 4 of c[j]."""
    return np.packbits(np.right_shift(codes, FOUR), axis=1, bitorder="little")


def unpack_fifth_bits(raw: Bytes) -> Bytes:
    """The inverse of `pack_fifth_bits`: [n, 4] -> [n, 32] holding 0 or 16."""
    return np.left_shift(np.unpackbits(raw, axis=1, bitorder="little"), FOUR)


def pack_q4_0(codes: Bytes, fields: tuple[Halves, ...]) -> Bytes:
    """[d f16][nibbles 16] = 18 bytes; w = d * (c - 8)."""
    return np.concatenate([_halves(fields[0]), pack_nibbles(codes)], axis=1)


def unpack_q4_0(raw: Bytes) -> Parts:
    return unpack_nibbles(raw[:, 2:]), (_half(raw, 0),)


def pack_q4_1(codes: Bytes, fields: tuple[Halves, ...]) -> Bytes:
    """[d f16][m f16][nibbles 16] = 20 bytes; w = d * c + m, m = -minimum."""
    return np.concatenate([_halves(fields[0]), _halves(-fields[1]), pack_nibbles(codes)], axis=1)


def unpack_q4_1(raw: Bytes) -> Parts:
    return unpack_nibbles(raw[:, 4:]), (_half(raw, 0), -_half(raw, 2))


def pack_q5_0(codes: Bytes, fields: tuple[Halves, ...]) -> Bytes:
    """[d f16][fifth bits 4][nibbles 16] = 22 bytes; w = d * (c - 16)."""
    return np.concatenate([_halves(fields[0]), pack_fifth_bits(codes), pack_nibbles(low_nibbles(codes))], axis=1)


def unpack_q5_0(raw: Bytes) -> Parts:
    return unpack_nibbles(raw[:, 6:]) | unpack_fifth_bits(raw[:, 2:6]), (_half(raw, 0),)


def pack_q5_1(codes: Bytes, fields: tuple[Halves, ...]) -> Bytes:
    """[d f16][m f16][fifth bits 4][nibbles 16] = 24 bytes; w = d * c + m, m = -minimum."""
    parts = [_halves(fields[0]), _halves(-fields[1]), pack_fifth_bits(codes), pack_nibbles(low_nibbles(codes))]
    return np.concatenate(parts, axis=1)


def unpack_q5_1(raw: Bytes) -> Parts:
    return unpack_nibbles(raw[:, 8:]) | unpack_fifth_bits(raw[:, 4:8]), (_half(raw, 0), -_half(raw, 2))


def pack_q8_0(codes: Bytes, fields: tuple[Halves, ...]) -> Bytes:
    """[d f16][int8 x 32] = 34 bytes; w = d * (c - 128), so code 0 is the byte -128 (legal: ggml multiplies in int)."""
    signed = np.bitwise_xor(codes, TOP_BIT)  # c - 128 as int8 is c with the top bit flipped
    return np.concatenate([_halves(fields[0]), signed], axis=1)


def unpack_q8_0(raw: Bytes) -> Parts:
    return np.bitwise_xor(raw[:, 2:], TOP_BIT), (_half(raw, 0),)


@dataclass(frozen=True)
class BlockType:
    """One row of the table: `code` is ggml's type id, `file_type` what `general.file_type` says of such a file.

    `pack` takes codes [n, elements] and one fp16 [n] per stored field, and gives [n, bytes]; `unpack` undoes it.
    """

    name: str
    code: int
    file_type: int
    elements: int
    bytes: int
    bits: int
    zero: str
    fields: tuple[str, ...]
    pack: Callable[[Bytes, tuple[Halves, ...]], Bytes]
    unpack: Callable[[Bytes], Parts]

    def row_bytes(self, columns: int) -> int:
        return columns // self.elements * self.bytes


BLOCK_TYPES = (
    BlockType("Q4_0", 2, 2, BLOCK, 18, 4, "centre", ("scale",), pack_q4_0, unpack_q4_0),
    BlockType("Q4_1", 3, 3, BLOCK, 20, 4, "minimum", ("scale", "minimum"), pack_q4_1, unpack_q4_1),
    BlockType("Q5_0", 6, 8, BLOCK, 22, 5, "centre", ("scale",), pack_q5_0, unpack_q5_0),
    BlockType("Q5_1", 7, 9, BLOCK, 24, 5, "minimum", ("scale", "minimum"), pack_q5_1, unpack_q5_1),
    BlockType("Q8_0", 8, 7, BLOCK, 34, 8, "centre", ("scale",), pack_q8_0, unpack_q8_0),
)


def obstacle(grid: Grid, columns: int) -> tuple[str, str] | None:
    """Why no block type holds this grid for rows of `columns` weights, as (problem, next step); None when one does."""
    if grid.super_block is not None:
        return "two-level scales (K-quants) are not written yet", "choose w4g32, w8g32 or q4_0 to q8_0"
    if grid.zero == "point":
        return (
            "an integer zero point has no exact place in GGUF (Q4_1 stores a float minimum, which would be rounded)",
            "choose the symmetric scheme (without -asym), or export to gptq or onnx",
        )
    if not any(kind.bits == grid.bits and kind.zero == grid.zero for kind in BLOCK_TYPES):
        return f"{grid.bits}-bit groups have no block type (there are 4, 5 and 8 bits)", "choose w4g32, w8g32 or q5_0"
    if grid.group is not None and grid.group % BLOCK:
        return f"a group of {grid.group} cuts through the blocks of {BLOCK}", "choose a group of 32, 64, 128 or 256"
    if columns % BLOCK:
        return f"rows of {columns} weights are not a multiple of {BLOCK}", "export this model to onnx or gptq instead"
    return None


def block_type_for(grid: Grid, columns: int) -> BlockType:
    """The block type that holds the grid exactly. Raises ValueError where `obstacle` has a reason."""
    reason = obstacle(grid, columns)
    if reason is not None:
        raise ValueError(reason[0])
    return next(kind for kind in BLOCK_TYPES if kind.bits == grid.bits and kind.zero == grid.zero)


def pack(tensor: QuantizedTensor) -> Bytes:
    """Codes and fields -> uint8 [rows, bytes a row]; a scale is repeated for every block of its group."""
    rows, columns = tensor.shape
    kind = block_type_for(tensor.grid, columns)
    blocks = columns // kind.elements
    repeats = -(-tensor.grid.group_of(columns) // kind.elements)
    fields = tuple(
        np.repeat(tensor.fields[name].numpy(), repeats, axis=1)[:, :blocks].reshape(-1) for name in kind.fields
    )
    return kind.pack(tensor.codes.numpy().reshape(-1, kind.elements), fields).reshape(rows, -1)


def unpack(raw: Bytes, grid: Grid, columns: int) -> QuantizedTensor:
    """The inverse of `pack`. Raises ValueError when scales differ within a group of the grid."""
    kind = block_type_for(grid, columns)
    rows, blocks = len(raw), columns // kind.elements
    codes, values = kind.unpack(raw.reshape(-1, kind.bytes))
    repeats = -(-grid.group_of(columns) // kind.elements)
    fields = {}
    for name, value in zip(kind.fields, values, strict=True):
        stored = value.reshape(rows, blocks)
        groups = np.ascontiguousarray(stored[:, ::repeats])
        if not np.array_equal(np.repeat(groups, repeats, axis=1)[:, :blocks].view(np.uint16), stored.view(np.uint16)):
            raise ValueError(f"{name} differs within a group of {grid.group_of(columns)}")
        fields[name] = torch.from_numpy(groups)
    return QuantizedTensor(grid, torch.from_numpy(np.ascontiguousarray(codes.reshape(rows, columns))), fields)
