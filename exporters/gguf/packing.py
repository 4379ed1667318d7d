"""GGUF block types: which of ggml's blocks holds a grid exactly, and a QuantizedTensor as such blocks, and back.

A block holds neighbouring weights of one row. A grid whose groups are longer than a block is stored with its scale
repeated, so nothing is lost and the file grows. Numpy, vectorised over all blocks; never rounds: a grid that no block
holds is named by `obstacle`, not approximated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from exporters.gguf import blocks_single as single
from exporters.gguf import blocks_super as super_blocks
from exporters.gguf.bits import Bytes, Values
from exporters.gguf.blocks_single import Fields, Parts
from signround.formats import GROUPS, grid_for
from signround.grid import Grid
from signround.qtensor import QuantizedTensor

CHUNK = 1 << 20  # weights packed at a time: large beside the cost of a call, well below a slice


@dataclass(frozen=True)
class BlockType:
    """One row of the table: `code` is ggml's type id, `file_type` what `general.file_type` says of a file in which
    every matrix has this type (llama.cpp's `llama_ftype`; of the K-quants that is the "small" one).

    `pack` takes codes [n, elements] and fields [n, values a block] in the order of the grid's layout, and gives
    [n, bytes]; `unpack` undoes it.
    """

    name: str
    code: int
    file_type: int
    bytes: int
    pack: Callable[[Bytes, Fields], Bytes]
    unpack: Callable[[Bytes], Parts]

    @property
    def grid(self) -> Grid:
        """The grid with exactly the groups of this block."""
        return grid_for(self.name.lower())

    @property
    def elements(self) -> int:
        group, level = self.grid.group, self.grid.super_block
        assert group is not None
        return group * level.groups if level else group

    def row_bytes(self, columns: int) -> int:
        return columns // self.elements * self.bytes


BLOCK_TYPES = (
    BlockType("Q4_0", 2, 2, 18, single.pack_q4_0, single.unpack_q4_0),
    BlockType("Q4_1", 3, 3, 20, single.pack_q4_1, single.unpack_q4_1),
    BlockType("Q5_0", 6, 8, 22, single.pack_q5_0, single.unpack_q5_0),
    BlockType("Q5_1", 7, 9, 24, single.pack_q5_1, single.unpack_q5_1),
    BlockType("Q8_0", 8, 7, 34, single.pack_q8_0, single.unpack_q8_0),
    BlockType("Q2_K", 10, 21, 84, super_blocks.pack_q2_k, super_blocks.unpack_q2_k),
    BlockType("Q3_K", 11, 11, 110, super_blocks.pack_q3_k, super_blocks.unpack_q3_k),
    BlockType("Q4_K", 12, 14, 144, super_blocks.pack_q4_k, super_blocks.unpack_q4_k),
    BlockType("Q5_K", 13, 16, 176, super_blocks.pack_q5_k, super_blocks.unpack_q5_k),
    BlockType("Q6_K", 14, 18, 210, super_blocks.pack_q6_k, super_blocks.unpack_q6_k),
    BlockType("IQ4_NL", 20, 25, 18, single.pack_q4_0, single.unpack_q4_0),  # nibbles are indices of the codebook
    BlockType("IQ4_XS", 23, 30, 136, super_blocks.pack_iq4_xs, super_blocks.unpack_iq4_xs),
    BlockType("MXFP4", 39, 38, 17, single.pack_mxfp4, single.unpack_mxfp4),
    BlockType("Q2_0", 42, 41, 18, single.pack_q2_0, single.unpack_q2_0),
)


def _levels(grid: Grid) -> Grid:
    """The grid without what a block type need not match: how long its groups are (a scale can be repeated, unless it
    is one of a super-block's), and which codes and zero points it keeps off."""
    return replace(grid, group=grid.group if grid.super_block else None, code_min=0, zero_floor=0)


_BY_LEVELS = {_levels(kind.grid): kind for kind in BLOCK_TYPES}


def obstacle(grid: Grid, columns: int) -> tuple[str, str] | None:
    """Why no block type holds this grid for rows of `columns` weights, as (problem, next step); None when one does."""
    if grid.zero == "point":
        return (
            "an integer zero point has no exact place in GGUF (Q4_1 stores a float minimum, which would be rounded)",
            "choose the symmetric scheme (without -asym), or export to gptq or onnx",
        )
    kind = _BY_LEVELS.get(_levels(grid))
    if kind is None:
        near = [f"q{grid.bits}_k"] if f"Q{grid.bits}_K" in {known.name for known in BLOCK_TYPES} else ["w4g32", "w8g32"]
        problem = f"{grid.bits}-bit groups of one fp16 scale have no block type (there are 2, 4, 5 and 8 bits)"
        return problem, f"choose {' or '.join(near)}"
    if grid.super_block is None and grid.group is not None and grid.group % kind.elements:
        longer = " or ".join(str(group) for group in GROUPS if group % kind.elements == 0)
        return f"a group of {grid.group} cuts through the blocks of {kind.elements}", f"choose a group of {longer}"
    if columns % kind.elements:
        problem = f"rows of {columns} weights are not a multiple of {kind.elements}, the block of {kind.name}"
        if columns % 32:
            return problem, "export this model to onnx or gptq instead"
        return problem, "choose iq4_nl or w4g32, whose blocks are 32 long"
    return None


def block_type_for(grid: Grid, columns: int) -> BlockType:
    """The block type that holds the grid exactly. Raises ValueError where `obstacle` has a reason."""
    reason = obstacle(grid, columns)
    if reason is not None:
        raise ValueError(reason[0])
    return _BY_LEVELS[_levels(grid)]


def pack(tensor: QuantizedTensor) -> Bytes:
    """Codes and fields -> uint8 [rows, bytes a row]; a scale is repeated for every block of its group."""
    rows, columns = tensor.shape
    kind = block_type_for(tensor.grid, columns)
    blocks, repeats = columns // kind.elements, _repeats(tensor.grid, columns, kind)

    def of_blocks(name: str) -> Values:
        stored = tensor.fields[name].numpy()
        if repeats > 1:  # a field of a single-scale block
            stored = np.repeat(stored, repeats, axis=1)[:, :blocks]
        return stored.reshape(rows * blocks, -1)

    fields = tuple(of_blocks(name) for name in kind.grid.layout(1, kind.elements))
    codes = tensor.codes.numpy().reshape(-1, kind.elements)
    packed = np.empty((len(codes), kind.bytes), dtype=np.uint8)
    step = CHUNK // kind.elements
    for start in range(0, len(codes), step):
        part = slice(start, start + step)
        packed[part] = kind.pack(codes[part], tuple(field[part] for field in fields))
    return packed.reshape(rows, -1)


def unpack(raw: Bytes, grid: Grid, columns: int) -> QuantizedTensor:
    """The inverse of `pack`. Raises ValueError when scales differ within a group of the grid."""
    kind = block_type_for(grid, columns)
    rows, blocks, repeats = len(raw), columns // kind.elements, _repeats(grid, columns, kind)
    codes, values = kind.unpack(raw.reshape(-1, kind.bytes))
    fields = {}
    for name, value in zip(kind.grid.layout(1, kind.elements), values, strict=True):
        stored = value.reshape(rows, -1)
        groups = np.ascontiguousarray(stored[:, ::repeats])
        if repeats > 1 and np.repeat(groups, repeats, axis=1)[:, :blocks].tobytes() != stored.tobytes():
            raise ValueError(f"{name} differs within a group of {grid.group_of(columns)}")
        fields[name] = torch.from_numpy(groups)
    return QuantizedTensor(grid, torch.from_numpy(np.ascontiguousarray(codes.reshape(rows, columns))), fields)


def _repeats(grid: Grid, columns: int, kind: BlockType) -> int:
    """Blocks that share one scale; 1 for super-blocks, which hold theirs."""
    return 1 if grid.super_block else -(-grid.group_of(columns) // kind.elements)
