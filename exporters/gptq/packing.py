"""The bits of a GPTQ checkpoint: packing and, beside it, unpacking. Lays out integers; never rounds, never clamps.

Dense little-endian bit stream (GPTQ, AutoGPTQ `qlinear`): code i of a column takes bits [i*b, (i+1)*b) of the words
below each other, lowest bits first. 32 codes fill exactly b words:

    b = 4   word 0   | c7  | c6  | c5  | c4  | c3  | c2  | c1  | c0 |          bit 31 ... bit 0
    b = 3   word 0   |c10 lo 2| c9 | c8 | ...                  | c0 |
            word 1   |c21 lo 1| c20 | ...                | c10 hi 1 |
            word 2   | c31 | c30 | ...                   | c21 hi 2 |

Tensors of one linear W [out, in], `b` bits, `G` groups of `g` inputs, W[o, i] = scales[i/g, o] * (q[i, o] - z[i/g, o]):

    qweight  int32 [in*b/32, out]    codes, packed along the inputs
    qzeros   int32 [G, out*b/32]     zero points, packed along the outputs; v1 stores z - 1, v2 stores z
    scales   fp16  [G, out]          signed scales are legal
    g_idx    int32 [in]              group of each input, i // g (always written: several readers need it)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from signround.grid import Grid
from signround.qtensor import QuantizedTensor

PARTS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)
BLOCK = 32
WORD = 32


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 [n, m] -> int32 [n * bits / 32, m], n a multiple of 32. Raises ValueError for a code that does not fit."""
    n, m = codes.shape
    if n % BLOCK:
        raise ValueError(f"{n} codes cannot be packed, the count must be a multiple of {BLOCK}")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    blocks = codes.numpy().reshape(n // BLOCK, BLOCK, m)
    words = np.zeros((n // BLOCK, bits, m), np.uint32)
    for index in range(BLOCK):
        word, shift = divmod(index * bits, WORD)
        code = blocks[:, index].astype(np.uint32)
        words[:, word] |= code << np.uint32(shift)
        if shift + bits > WORD:
            words[:, word + 1] |= code >> np.uint32(WORD - shift)
    return torch.from_numpy(words.reshape(-1, m).view(np.int32))


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """int32 [n * bits / 32, m] -> uint8 [n, m]; the inverse of `pack_bits`."""
    rows, m = packed.shape
    if rows % bits:
        raise ValueError(f"{rows} words do not hold whole blocks of {BLOCK} codes of {bits} bits")
    words = packed.numpy().view(np.uint32).reshape(rows // bits, bits, m)
    codes = np.empty((rows // bits, BLOCK, m), np.uint8)
    mask = np.uint32(2**bits - 1)
    for index in range(BLOCK):
        word, shift = divmod(index * bits, WORD)
        code = words[:, word] >> np.uint32(shift)
        if shift + bits > WORD:
            code = code | words[:, word + 1] << np.uint32(WORD - shift)
        codes[:, index] = code & mask
    return torch.from_numpy(codes.reshape(-1, m))


def layout(rows: int, columns: int, grid: Grid) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every part of a linear [rows = out, columns = in], in the order of PARTS."""
    groups = grid.groups_of(columns)
    return {
        "qweight": ((columns * grid.bits // WORD, rows), torch.int32),
        "qzeros": ((groups, rows * grid.bits // WORD), torch.int32),
        "scales": ((groups, rows), torch.float16),
        "g_idx": ((columns,), torch.int32),
    }


def pack_linear(tensor: QuantizedTensor, zero_offset: int) -> dict[str, Tensor]:
    """The parts of one linear; `zero_offset` is 1 for v1 (z - 1 is stored) and 0 for v2.

    Raises ValueError for a zero point below the offset: v1 has three incompatible encodings of it.
    """
    grid = tensor.grid
    columns = tensor.shape[1]
    zeros = _zeros(tensor)
    if int(zeros.min()) < zero_offset:
        raise ValueError(f"zero point {int(zeros.min())} cannot be stored, the lowest is {zero_offset}")
    return {
        "qweight": pack_bits(tensor.codes.T.contiguous(), grid.bits),
        "qzeros": pack_bits(zeros - zero_offset, grid.bits).T.contiguous(),
        "scales": tensor.fields["scale"].T.contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // grid.group_of(columns),
    }


def unpack_linear(parts: Mapping[str, Tensor], grid: Grid, zero_offset: int) -> QuantizedTensor:
    """The inverse of `pack_linear`. Raises ValueError when the file's zeros or g_idx contradict `grid`."""
    codes = unpack_bits(parts["qweight"], grid.bits).T.contiguous()
    columns = codes.shape[1]
    expected = torch.arange(columns, dtype=torch.int32) // grid.group_of(columns)
    if not torch.equal(parts["g_idx"], expected):
        raise ValueError("g_idx is not i // group_size (act-order is not supported)")
    zeros = unpack_bits(parts["qzeros"].T.contiguous(), grid.bits) + zero_offset
    fields = {"scale": parts["scales"].T.contiguous()}
    if grid.zero == "point":
        fields["zero_point"] = zeros
    elif not bool((zeros == grid.centre).all()):
        raise ValueError(f"a symmetric file must hold zero point {grid.centre} throughout")
    return QuantizedTensor(grid, codes, fields)


def _zeros(tensor: QuantizedTensor) -> Tensor:
    """uint8 [rows, groups]."""
    if tensor.grid.zero == "point":
        return tensor.fields["zero_point"]
    return torch.full_like(tensor.fields["scale"], tensor.grid.centre, dtype=torch.uint8)
