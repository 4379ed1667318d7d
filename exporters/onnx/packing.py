"""The bits of com.microsoft::MatMulNBits: QuantizedTensor <-> B, scales and zero_points. Lays out; never rounds.

B is uint8 [rows, blocks, block * bits / 8], least significant bits first along the inputs:

    8 bits   byte i = code i
    4 bits   byte i = code 2i | code 2i+1 << 4
    2 bits   byte i = code 4i | code 4i+1 << 2 | code 4i+2 << 4 | code 4i+3 << 6

scales are float32 [rows, blocks]; zero_points are packed like B, uint8 [rows, ceil(blocks * bits / 8)], each row padded
to a byte, and are left out for `centre` grids: the operator's default is then 2^(bits-1).
Source: schema of com.microsoft::MatMulNBits 1 in onnxruntime, and its CPU kernel, which takes 2, 4 and 8 bits only and
blocks of 16, 32, 64, 128 or 256 inputs. 3-bit codes therefore travel in 4-bit fields: `centre` codes are shifted by 4
so that their zero meets the default 8, `point` codes and zero points stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from signround.errors import FailedError, Refusal
from signround.grid import Grid
from signround.qtensor import QuantizedTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]

Item = TypeVar("Item", bound=np.generic)

BLOCKS = (16, 32, 64, 128, 256)
FAST_2_BIT_BLOCKS = (32, 64, 128)  # the others dequantise the whole weight on every call
CONTAINER = {2: 2, 3: 4, 4: 4, 8: 8}


@dataclass(frozen=True)
class Layout:
    """How a weight [rows, columns] of some grid lies in a MatMulNBits node."""

    rows: int
    columns: int
    bits: int
    block: int
    has_zero_points: bool

    @property
    def blocks(self) -> int:
        return -(-self.columns // self.block)

    @property
    def codes_shape(self) -> tuple[int, int, int]:
        return self.rows, self.blocks, self.block * self.bits // 8

    @property
    def flat_shape(self) -> tuple[int, int]:
        """The codes of a table that rows are gathered from."""
        return self.rows, self.blocks * self.block * self.bits // 8

    @property
    def scales_shape(self) -> tuple[int, int]:
        return self.rows, self.blocks

    @property
    def zero_points_shape(self) -> tuple[int, int]:
        return self.rows, -(-self.blocks * self.bits // 8)


@dataclass(frozen=True)
class Packed:
    """The constant inputs of a MatMulNBits node."""

    codes: Bytes
    scales: Floats
    zero_points: Bytes | None

    def arrays(self) -> list[Bytes | Floats]:
        return [self.codes, self.scales, *([] if self.zero_points is None else [self.zero_points])]


def refusal_of(grid: Grid) -> Refusal | None:
    """Why MatMulNBits cannot hold this grid, or None."""
    if grid.zero == "minimum" or not grid.plain or grid.bits not in CONTAINER:
        kind = f"{grid.bits} bits, zero as {grid.zero}"
        if not grid.plain:
            kind = "two-level scales" if grid.super_block else "uneven levels"
        return Refusal(
            f"MatMulNBits cannot hold this grid ({kind}); it holds 2, 3, 4 or 8 bits with one scale a group, symmetric "
            "or with an integer zero point",
            "choose a scheme such as w4g32, w4g128-asym, q4_0 or q8_0",
            "onnx",
        )
    if grid.group is not None and grid.group not in BLOCKS:
        return Refusal(
            f"groups of {grid.group} are not possible in MatMulNBits; allowed are "
            f"{', '.join(map(str, BLOCKS))} and whole rows",
            "choose one of them",
            "onnx",
        )
    return None


def block_of(grid: Grid, columns: int) -> int:
    """Inputs in one MatMulNBits block. Whole rows, and 256 inputs at 2 bits (no fast kernel), repeat their scale over
    smaller blocks: 128 where it divides the row, as the fastest that costs little (0.25 bits a weight)."""
    if grid.group is None:
        return next((block for block in (128, 64, 32) if columns % block == 0), 32)
    if CONTAINER[grid.bits] == 2 and grid.group > max(FAST_2_BIT_BLOCKS):
        return max(FAST_2_BIT_BLOCKS)
    return grid.group


def has_float_kernel(grid: Grid) -> bool:
    """Whether onnxruntime multiplies float activations with the codes as they lie; 2 and 8 bits it decodes first, on
    every call."""
    return CONTAINER[grid.bits] == 4


def layout_of(grid: Grid, rows: int, columns: int, block: int | None = None) -> Layout:
    """The layout of a weight [rows, columns] of a grid that `refusal_of` lets pass; `block` None takes `block_of`'s,
    any other must divide the groups."""
    return Layout(rows, columns, CONTAINER[grid.bits], block or block_of(grid, columns), grid.zero == "point")


def pack(tensor: QuantizedTensor, block: int | None = None) -> Packed:
    """Lay out one weight, `block` as in `layout_of`. The padding of a ragged last block holds its zero point: whatever
    a kernel does with it, it decodes to 0."""
    grid = tensor.grid
    layout = layout_of(grid, *tensor.shape, block)
    stored_zero = 2 ** (layout.bits - 1)
    codes = tensor.codes.numpy() + np.uint8(_shift(grid))
    zeros = None
    if layout.has_zero_points:
        zeros = _repeated(tensor.fields["zero_point"].numpy(), grid, layout)
    padding = layout.blocks * layout.block - layout.columns
    if padding:
        last = np.full((layout.rows, 1), stored_zero, np.uint8) if zeros is None else zeros[:, -1:]
        codes = np.concatenate([codes, np.repeat(last, padding, axis=1)], axis=1)
    return Packed(
        pack_bits(codes, layout.bits).reshape(layout.codes_shape),
        _repeated(tensor.fields["scale"].numpy(), grid, layout).astype(np.float32),
        None if zeros is None else pack_bits(zeros, layout.bits),
    )


def empty(layout: Layout) -> Packed:
    """Arrays of this layout, to be filled."""
    zeros = np.empty(layout.zero_points_shape, np.uint8) if layout.has_zero_points else None
    return Packed(np.empty(layout.codes_shape, np.uint8), np.empty(layout.scales_shape, np.float32), zeros)


def unpack(packed: Packed, grid: Grid, columns: int, block: int | None = None) -> QuantizedTensor:
    """The inverse of `pack`. Raises FailedError when the arrays do not hold a weight of this grid."""
    rows = packed.codes.shape[0]
    layout = layout_of(grid, rows, columns, block)
    if (packed.codes.shape, packed.scales.shape) != (layout.codes_shape, layout.scales_shape):
        raise FailedError(
            f"MatMulNBits inputs of shapes {packed.codes.shape} and {packed.scales.shape} do not hold a [{rows}, "
            f"{columns}] weight of {grid.bits} bits; export the artifact again."
        )
    codes = unpack_bits(packed.codes.reshape(rows, -1), layout.bits)[:, :columns] - np.uint8(_shift(grid))
    fields = {"scale": torch.from_numpy(_half(_first_of(packed.scales, grid, layout)))}
    if packed.zero_points is not None:
        zeros = unpack_bits(packed.zero_points, layout.bits)[:, : layout.blocks]
        fields["zero_point"] = torch.from_numpy(_first_of(zeros, grid, layout))
    try:
        return QuantizedTensor(grid, torch.from_numpy(np.ascontiguousarray(codes)), fields)
    except ValueError as error:
        raise FailedError(f"the file holds no weight of its grid ({error}); export the artifact again.") from error


def split(packed: Packed, rows: Sequence[int]) -> list[Packed]:
    """Weights that lie row below row, taken apart."""
    ends = np.cumsum(rows)
    return [
        Packed(
            packed.codes[end - count : end],
            packed.scales[end - count : end],
            None if packed.zero_points is None else packed.zero_points[end - count : end],
        )
        for end, count in zip(ends, rows, strict=True)
    ]


def pack_bits(values: Bytes, bits: int) -> Bytes:
    """uint8 [rows, n] below 2^bits -> uint8 [rows, ceil(n * bits / 8)], LSB first; the last byte is padded with 0."""
    per_byte = 8 // bits
    rows, count = values.shape
    if count % per_byte:
        values = np.pad(values, ((0, 0), (0, -count % per_byte)))
    fields = values.reshape(rows, -1, per_byte)
    packed = fields[:, :, 0].copy()
    for index in range(1, per_byte):
        packed |= fields[:, :, index] << np.uint8(index * bits)
    return packed


def unpack_bits(packed: Bytes, bits: int) -> Bytes:
    """The inverse of `pack_bits`, padding included: uint8 [rows, n] -> uint8 [rows, n * 8 / bits]."""
    rows, count = packed.shape
    per_byte = 8 // bits
    values = np.empty((rows, count, per_byte), np.uint8)
    for index in range(per_byte):
        values[:, :, index] = (packed >> np.uint8(index * bits)) & np.uint8(2**bits - 1)
    return values.reshape(rows, -1)


def _shift(grid: Grid) -> int:
    """What is added to codes so that the constant zero of a `centre` grid meets the container's default."""
    if grid.zero == "point":
        return 0
    return int(2 ** (CONTAINER[grid.bits] - 1)) - grid.centre


def _repeats(grid: Grid, layout: Layout) -> int:
    return layout.blocks if grid.group is None else grid.group // layout.block


def _repeated(field: NDArray[Item], grid: Grid, layout: Layout) -> NDArray[Item]:
    """[rows, groups] -> [rows, blocks]: one value a group becomes one value a block."""
    return np.repeat(field, _repeats(grid, layout), axis=1)[:, : layout.blocks]


def _first_of(field: NDArray[Item], grid: Grid, layout: Layout) -> NDArray[Item]:
    """The inverse of `_repeated`; all blocks of a group must agree."""
    first = np.ascontiguousarray(field[:, :: _repeats(grid, layout)])
    if not np.array_equal(_repeated(first, grid, layout), field):
        raise FailedError("blocks of one group hold different scales or zero points; export the artifact again.")
    return first


def _half(scales: Floats) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        stored = scales.astype(np.float16)
    if not np.array_equal(stored.astype(np.float32), scales):
        raise FailedError("the file holds scales that are not fp16 values; export the artifact again.")
    return stored
