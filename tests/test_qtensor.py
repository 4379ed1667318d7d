"""QuantizedTensor: what may be born, and that it says what the grid says."""

from __future__ import annotations

import pytest
import torch

from signround.formats import grid_for, scheme_names
from signround.grid import Grid, SuperBlock, grouped, ungrouped
from signround.qtensor import QuantizedTensor

GRID = Grid(bits=4, group=32, zero="point")


def parts() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    codes = torch.full((2, 64), 3, dtype=torch.uint8)
    return codes, {
        "scale": torch.full((2, 2), 0.5, dtype=torch.float16),
        "zero_point": torch.full((2, 2), 8, dtype=torch.uint8),
    }


def test_a_good_tensor_is_born_and_decodes() -> None:
    codes, fields = parts()
    tensor = QuantizedTensor(GRID, codes, fields)
    assert tensor.shape == (2, 64)
    assert torch.equal(tensor.decode(), torch.full((2, 64), -2.5))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 64, dtype=torch.int8), "codes must be uint8"),
        (torch.zeros(2, 64), "codes must be uint8"),
        (torch.zeros(128, dtype=torch.uint8), "codes must be uint8"),
        (torch.zeros(1, 2, 64, dtype=torch.uint8), "codes must be uint8"),
        (torch.full((2, 64), 16, dtype=torch.uint8), r"0\.\.15, got 16\.\.16"),
        (torch.zeros(2, 96, dtype=torch.uint8), "scale must be"),
        (torch.zeros(3, 64, dtype=torch.uint8), "scale must be"),
    ],
)
def test_bad_codes_are_refused(codes: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedTensor(GRID, codes, parts()[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.full((2, 2), 0.5)}, "scale must be torch.float16"),
        ({"scale": torch.full((4,), 0.5, dtype=torch.float16)}, r"scale must be torch.float16 \(2, 2\)"),
        ({"scale": torch.full((2, 2), torch.nan, dtype=torch.float16)}, "scale holds NaN or Inf"),
        ({"scale": torch.full((2, 2), -torch.inf, dtype=torch.float16)}, "scale holds NaN or Inf"),
        ({"zero_point": torch.full((2, 2), 8, dtype=torch.int8)}, "zero_point must be torch.uint8"),
        ({"minimum": torch.zeros(2, 2, dtype=torch.float16)}, "fields must be"),
    ],
)
def test_bad_fields_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    codes, fields = parts()
    with pytest.raises(ValueError, match=message):
        QuantizedTensor(GRID, codes, fields | change)


def test_a_missing_field_is_refused_by_name() -> None:
    codes, fields = parts()
    del fields["zero_point"]
    with pytest.raises(ValueError, match=r"fields must be \['scale', 'zero_point'\], got \['scale'\]"):
        QuantizedTensor(GRID, codes, fields)


@pytest.mark.parametrize("value", [16, 255])
def test_a_zero_point_beyond_the_bits_is_refused(value: int) -> None:
    codes, fields = parts()
    fields["zero_point"][1, 0] = value
    with pytest.raises(ValueError, match=r"zero_point must lie in 0\.\.15"):
        QuantizedTensor(GRID, codes, fields)


def test_a_zero_point_below_the_floor_is_refused() -> None:
    codes, fields = parts()
    fields["zero_point"][0, 1] = 0
    with pytest.raises(ValueError, match=r"zero_point must lie in 1\.\.15"):
        QuantizedTensor(Grid(bits=4, group=32, zero="point", zero_floor=1), codes, fields)


@pytest.mark.parametrize(("name", "value", "bounds"), [("scale", 64, r"0\.\.63"), ("minimum", 200, r"0\.\.63")])
def test_a_small_scale_beyond_its_bits_is_refused(name: str, value: int, bounds: str) -> None:
    """q4_k stores 6 bits a group in a uint8 field; 64 would spill into the neighbour when packed."""
    grid = Grid(bits=4, group=32, zero="minimum", super_block=SuperBlock(6, 8, signed=False))
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    fields = {
        f"{level}_{part}": torch.zeros(1, count, dtype=dtype)
        for level in ("scale", "minimum")
        for part, count, dtype in (("super", 1, torch.float16), ("sub", 8, torch.uint8))
    }
    QuantizedTensor(grid, codes, fields)
    fields[f"{name}_sub"][0, 3] = value
    with pytest.raises(ValueError, match=rf"{name}_sub must lie in {bounds}"):
        QuantizedTensor(grid, codes, fields)


def test_code_zero_of_q8_0_is_refused() -> None:
    codes = torch.full((1, 32), 128, dtype=torch.uint8)
    codes[0, 5] = 0
    with pytest.raises(ValueError, match=r"1\.\.255, got 0\.\.128"):
        QuantizedTensor(grid_for("q8_0"), codes, {"scale": torch.ones(1, 1, dtype=torch.float16)})


def test_it_cannot_be_changed() -> None:
    tensor = QuantizedTensor(GRID, *parts())
    with pytest.raises(AttributeError):
        tensor.grid = Grid(bits=4, group=32)  # type: ignore[misc]


@pytest.mark.parametrize("columns", [96, 100, 512])
@pytest.mark.parametrize("name", scheme_names())
def test_from_grid_and_decode_are_the_grid_verbs(name: str, columns: int) -> None:
    grid = grid_for(name)
    if grid.super_block and grid.ragged(columns):
        pytest.skip("two-level scales need whole super-blocks")
    generator = torch.Generator().manual_seed(31)
    weight = torch.randn(5, columns, generator=generator).bfloat16()
    blocks = grouped(weight.float(), grid.group_of(columns))
    offset = torch.rand(blocks.shape, generator=generator) - 0.5
    fields = grid.snap(*grid.fit(blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)))
    codes = grid.codes(blocks, fields, offset)
    tensor = QuantizedTensor.from_grid(grid, weight, fields, offset)
    assert torch.equal(tensor.codes.float(), ungrouped(codes, columns))
    assert torch.equal(tensor.decode(), ungrouped(grid.decode(codes, fields), columns))


def test_from_grid_cuts_the_graph() -> None:
    weight = torch.randn(2, 32)
    low = weight.amin(-1, keepdim=True).requires_grad_()
    tensor = QuantizedTensor.from_grid(
        grid_for("w4g32"), weight, grid_for("w4g32").snap(*grid_for("w4g32").fit(low, -low))
    )
    assert not tensor.fields["scale"].requires_grad
    assert not tensor.decode().requires_grad
