"""Packing against the slow obvious packer and against an unpacker that goes through single bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporters.gptq.packing import BITS, PARTS, layout, pack_bits, pack_linear, unpack_bits, unpack_linear
from signround.formats import grid_for
from signround.grid import Grid
from signround.qtensor import QuantizedTensor

SCHEMES = ["w2g16", "w2g64", "w3g32", "w3gc", "w4g32", "w4g128", "w8g32", "w8gc", "q4_0", "q8_0"]
ASYMMETRIC = ["w2g32-asym", "w3g64-asym", "w4g32-asym", "w8gc-asym"]


def slowly_packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """One code after the other, with Python integers."""
    n, m = codes.shape
    packed = np.zeros((n * bits // 32, m), np.uint32)
    for column in range(m):
        stream = sum(int(code) << (bits * index) for index, code in enumerate(codes[:, column]))
        for word in range(len(packed)):
            packed[word, column] = stream >> (32 * word) & 0xFFFFFFFF
    return torch.from_numpy(packed.view(np.int32))


def unpacked_bit_by_bit(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Through the single bits of the little-endian bytes."""
    columns = np.ascontiguousarray(packed.numpy().T).view(np.uint8)
    single = np.unpackbits(columns, axis=1, bitorder="little").reshape(len(columns), -1, bits)
    return torch.from_numpy((single * (1 << np.arange(bits))).sum(-1).astype(np.uint8).T.copy())


@st.composite
def code_matrices(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits = draw(st.sampled_from(BITS))
    blocks, columns = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(0, 2**bits, (32 * blocks, columns), generator=generator, dtype=torch.uint8)
    extreme = draw(st.sampled_from([None, 0, 2**bits - 1]))
    return (codes if extreme is None else torch.full_like(codes, extreme)), bits


@given(code_matrices())
def test_packing_is_that_of_the_slow_packer(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    assert torch.equal(pack_bits(codes, bits), slowly_packed(codes, bits))


@given(code_matrices())
def test_an_independent_unpacker_and_ours_give_the_codes_back(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    packed = pack_bits(codes, bits)
    assert torch.equal(unpacked_bit_by_bit(packed, bits), codes)
    assert torch.equal(unpack_bits(packed, bits), codes)


def test_three_bit_fields_cross_words_as_documented() -> None:
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[10], codes[21] = 0b101, 0b011
    words = pack_bits(codes, 3)[:, 0].numpy().view(np.uint32).tolist()
    assert words == [0b01 << 30, 1 | 0b1 << 31, 0b01]


@pytest.mark.parametrize("bits", BITS)
def test_what_does_not_fit_is_an_error(bits: int) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        pack_bits(torch.zeros(31, 1, dtype=torch.uint8), bits)
    if bits < 8:
        with pytest.raises(ValueError, match=f"does not fit into {bits} bits"):
            pack_bits(torch.full((32, 1), 2**bits, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="whole blocks"):
        unpack_bits(torch.zeros(bits + 1, 1, dtype=torch.int32), bits)


def random_tensor(grid: Grid, rows: int, columns: int) -> QuantizedTensor:
    """Codes over the whole range, scales of both signs with zero among them, zero points over their whole range."""
    generator = torch.Generator().manual_seed(rows * columns + grid.bits)
    groups = grid.groups_of(columns)
    codes = torch.randint(grid.code_min, grid.code_max + 1, (rows, columns), generator=generator, dtype=torch.uint8)
    fields = {"scale": torch.randn(rows, groups, generator=generator).half()}
    fields["scale"][0, 0] = 0
    if grid.zero == "point":
        zeros = torch.randint(grid.zero_floor, grid.code_max + 1, (rows, groups), generator=generator)
        zeros[0, 0], zeros[-1, -1] = grid.zero_floor, grid.code_max
        fields["zero_point"] = zeros.to(torch.uint8)
    return QuantizedTensor(grid, codes, fields)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES + ASYMMETRIC)
@pytest.mark.parametrize(("rows", "columns"), [(32, 128), (96, 256)])
def test_linear_goes_through_unchanged(scheme: str, rows: int, columns: int, version: int) -> None:
    offset = 1 if version == 1 else 0
    tensor = random_tensor(grid_for(scheme, zero_floor=offset), rows, columns)
    parts = pack_linear(tensor, offset)
    assert tuple(parts) == PARTS
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == layout(rows, columns, tensor.grid)
    again = unpack_linear(parts, tensor.grid, offset)
    assert torch.equal(again.codes, tensor.codes)
    assert all(torch.equal(again.fields[name], field) for name, field in tensor.fields.items())
    assert torch.equal(decoded_by_definition(parts, tensor.grid, offset), tensor.decode())


def decoded_by_definition(parts: dict[str, torch.Tensor], grid: Grid, offset: int) -> torch.Tensor:
    """W[o, i] = scales[g_idx[i], o] * (q[i, o] - z[g_idx[i], o]), from the bits of the file."""
    codes = unpacked_bit_by_bit(parts["qweight"], grid.bits).float()
    zeros = unpacked_bit_by_bit(parts["qzeros"].T.contiguous(), grid.bits).T.float() + offset
    groups = parts["g_idx"].long()
    return (parts["scales"].float()[groups] * (codes - zeros[groups])).T


def test_symmetric_zero_words_are_the_ones_that_readers_know() -> None:
    tensor = random_tensor(grid_for("w4g32"), 32, 64)
    assert set(pack_linear(tensor, 1)["qzeros"].flatten().tolist()) == {0x77777777}
    assert set(pack_linear(tensor, 0)["qzeros"].numpy().view(np.uint32).flatten().tolist()) == {0x88888888}


def test_zero_point_zero_has_no_place_in_v1() -> None:
    tensor = random_tensor(grid_for("w4g32-asym"), 32, 64)
    with pytest.raises(ValueError, match="zero point 0 cannot be stored"):
        pack_linear(tensor, 1)
    assert torch.equal(
        unpack_linear(pack_linear(tensor, 0), tensor.grid, 0).fields["zero_point"][0, 0], torch.tensor(0)
    )


def test_contradictions_in_a_file_are_errors() -> None:
    grid = grid_for("w4g32")
    parts = pack_linear(random_tensor(grid, 32, 64), 1)
    with pytest.raises(ValueError, match="g_idx"):
        unpack_linear(parts | {"g_idx": parts["g_idx"].flip(0)}, grid, 1)
    with pytest.raises(ValueError, match="zero point 8 throughout"):
        unpack_linear(parts, grid, 0)
