"""Bits of MatMulNBits: against a slow obvious packer, and there and back on odd shapes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.onnx.packing import (
    Packed,
    block_of,
    layout_of,
    pack,
    pack_bits,
    refusal_of,
    split,
    unpack,
    unpack_bits,
)
from signround.errors import FailedError
from signround.formats import grid_for, scheme_names
from signround.grid import Grid, SuperBlock
from signround.qtensor import QuantizedTensor

HELD = [scheme for scheme in scheme_names() if grid_for(scheme).plain and scheme not in ("q4_1", "q5_0", "q5_1")]


def random_tensor(grid: Grid, rows: int, columns: int, seed: int) -> QuantizedTensor:
    """Codes, zero points and scales anywhere in their ranges: zero, negative, subnormal and extreme scales included."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(grid.code_min, grid.code_max + 1, (rows, columns), generator=generator, dtype=torch.uint8)
    groups = grid.groups_of(columns)
    scale = torch.randn(rows, groups, generator=generator)
    special = torch.tensor([0.0, -0.0, 65504.0, -65504.0, 6e-8, -1e-5])
    chosen = torch.randint(12, (rows, groups), generator=generator)
    scale = torch.where(chosen < 6, special[chosen.clamp(max=5)], scale)
    fields = {"scale": scale.half()}
    if grid.zero == "point":
        fields["zero_point"] = torch.randint(grid.code_max + 1, (rows, groups), generator=generator, dtype=torch.uint8)
    return QuantizedTensor(grid, codes, fields)


def same(left: QuantizedTensor, right: QuantizedTensor) -> bool:
    fields = left.fields.items()  # compared as bytes: -0.0 is not 0.0
    return (
        left.grid == right.grid
        and torch.equal(left.codes, right.codes)
        and left.fields.keys() == right.fields.keys()
        and all(torch.equal(field.view(torch.uint8), right.fields[name].view(torch.uint8)) for name, field in fields)
    )


def slow_decode(packed: Packed, rows: int, columns: int, bits: int, block: int) -> np.ndarray:
    """The operator's documentation, one weight at a time."""
    weight = np.empty((rows, columns), np.float32)
    mask = 2**bits - 1
    for row in range(rows):
        for column in range(columns):
            index, inside = divmod(column, block)
            byte, shift = divmod(inside * bits, 8)
            code = int(packed.codes[row, index, byte]) >> shift & mask
            zero = 2 ** (bits - 1)
            if packed.zero_points is not None:
                byte, shift = divmod(index * bits, 8)
                zero = int(packed.zero_points[row, byte]) >> shift & mask
            weight[row, column] = np.float32(packed.scales[row, index]) * np.float32(code - zero)
    return weight


@pytest.mark.parametrize("scheme", HELD)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (3, 17), (5, 300)])
def test_packed_weight_decodes_as_documented(scheme: str, rows: int, columns: int) -> None:
    tensor = random_tensor(grid_for(scheme), rows, columns, seed=columns)
    packed = pack(tensor)
    layout = layout_of(tensor.grid, rows, columns)
    assert packed.codes.shape == layout.codes_shape
    assert packed.scales.shape == layout.scales_shape
    assert (packed.zero_points is not None) == layout.has_zero_points == scheme.endswith("asym")
    decoded = slow_decode(packed, rows, columns, layout.bits, layout.block)
    assert np.array_equal(decoded, tensor.decode().numpy())


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(HELD), st.integers(1, 9), st.integers(1, 600), st.integers(0, 2**31))
def test_unpack_undoes_pack(scheme: str, rows: int, columns: int, seed: int) -> None:
    tensor = random_tensor(grid_for(scheme), rows, columns, seed)
    packed = pack(tensor)
    assert same(unpack(packed, tensor.grid, columns), tensor)
    again = pack(tensor)
    assert np.array_equal(packed.codes, again.codes)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31))
def test_pack_bits_is_lsb_first(bits: int, rows: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, (rows, count), dtype=np.uint8)
    packed = pack_bits(values, bits)
    for row in range(rows):
        number = sum(int(value) << (index * bits) for index, value in enumerate(values[row]))
        assert packed[row].tobytes() == number.to_bytes(-(-count * bits // 8), "little")
    assert np.array_equal(unpack_bits(packed, bits)[:, :count], values)
    assert not unpack_bits(packed, bits)[:, count:].any()


@pytest.mark.parametrize("scheme", ["w4g32", "w3g32-asym", "w2g64-asym", "w8gc"])
def test_padding_decodes_to_zero(scheme: str) -> None:
    tensor = random_tensor(grid_for(scheme), 3, 70, seed=1)
    layout = layout_of(tensor.grid, 3, 70)
    width = layout.blocks * layout.block
    assert width > 70
    assert not slow_decode(pack(tensor), 3, width, layout.bits, layout.block)[:, 70:].any()


def test_weights_that_lie_row_below_row_come_apart() -> None:
    grid = grid_for("w2g32-asym")
    tensors = [random_tensor(grid, rows, 96, seed=rows) for rows in (3, 1, 4)]
    fields = {name: torch.cat([tensor.fields[name] for tensor in tensors]) for name in tensors[0].fields}
    whole = QuantizedTensor(grid, torch.cat([tensor.codes for tensor in tensors]), fields)
    parts = split(pack(whole), [3, 1, 4])
    assert all(same(unpack(part, grid, 96), tensor) for part, tensor in zip(parts, tensors, strict=True))


def test_blocks_are_ones_that_onnxruntime_runs_fast() -> None:
    assert block_of(grid_for("w2g256"), 1024) == 128
    assert block_of(grid_for("w4g256"), 1024) == 256
    assert block_of(grid_for("w2g16"), 1024) == 16
    assert [block_of(grid_for("w4gc"), columns) for columns in (1024, 192, 480, 100)] == [128, 64, 32, 32]


@pytest.mark.parametrize("scheme", ["q4_1", "q5_0", "q5_1", "iq4_nl", "mxfp4", "q4_k", "iq4_xs"])
def test_grids_without_a_place_are_refused(scheme: str) -> None:
    refusal = refusal_of(grid_for(scheme))
    assert refusal is not None
    assert "MatMulNBits cannot hold" in refusal.sentence()


def test_two_level_scales_and_odd_groups_are_refused() -> None:
    two_level = refusal_of(Grid(4, 32, super_block=SuperBlock(6, 8, signed=False)))
    assert two_level is not None
    assert "two-level" in two_level.problem
    odd = refusal_of(Grid(4, 48))
    assert odd is not None
    assert "groups of 48" in odd.problem
    assert all(refusal_of(grid_for(scheme)) is None for scheme in HELD)


def test_unpack_refuses_what_pack_cannot_have_written() -> None:
    tensor = random_tensor(grid_for("w3gc"), 2, 256, seed=3)
    packed = pack(tensor)
    uneven = packed.scales.copy()
    uneven[1, 1] += 1
    with pytest.raises(FailedError, match="different scales"):
        unpack(replace(packed, scales=uneven), tensor.grid, 256)
    with pytest.raises(FailedError, match="fp16"):
        unpack(replace(packed, scales=np.full_like(packed.scales, 1.0001)), tensor.grid, 256)
    with pytest.raises(FailedError, match="codes must lie"):
        unpack(replace(packed, codes=np.zeros_like(packed.codes)), tensor.grid, 256)
    with pytest.raises(FailedError, match="do not hold"):
        unpack(packed, tensor.grid, 128)
