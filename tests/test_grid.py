"""The laws of every grid: bounds, exact zeros, idempotence, extremes, gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signround.codebooks import CODEBOOKS
from signround.formats import grid_for, scheme_names
from signround.grid import (
    Grid,
    grouped,
    half_through,
    round_through,
    safe_reciprocal,
    straight_through,
    ungrouped,
)
from signround.qtensor import QuantizedTensor
from tests.small_artifacts import rounded_tensor

SUPER = {name: grid_for(name) for name in scheme_names() if grid_for(name).super_block}
GRIDS = {name: grid_for(name) for name in scheme_names()}
GRIDS |= {f"{name} floor 1": grid_for(name, zero_floor=1) for name in scheme_names() if name.endswith("-asym")}
MAGNITUDES = (1e-8, 1e-6, 1e-3, 1.0, 300.0, 1e30)
EPSILON = 2.0**-10  # a scale rounded to fp16 is off by at most 2^-11 of itself, twice that through a quotient
SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda x: x,
    "positive": lambda x: x.abs() + 0.1,
    "negative": lambda x: -x.abs() - 0.1,
    "zero": torch.zeros_like,
    "zero rows": lambda x: x * (torch.arange(len(x)) % 2).unsqueeze(1),
    "sparse": lambda x: x * (x > 1.5),
    "equal": lambda x: torch.full_like(x, 0.7),
    "equal and negative": lambda x: torch.full_like(x, -0.7),
    "one outlier": lambda x: torch.cat([x[:, :1] + 50.0, x[:, 1:]], 1),
    "mixed magnitudes": lambda x: x * torch.logspace(-9, 3, x.shape[1]),
}


def fields_of(grid: Grid, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    blocks = grouped(weight, grid.group_of(weight.shape[1]))
    return grid.snap(*grid.fit(blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)))


def columns_for(grid: Grid) -> st.SearchStrategy[int]:
    """Whole super-blocks for two-level grids; for the others also ragged rows and rows shorter than a group."""
    if grid.super_block is not None:
        return st.sampled_from([256, 512])
    return st.sampled_from([1, 5, 32, 48, 96, 130, 300])


@st.composite
def cases(draw: st.DrawFn, grids: dict[str, Grid] = GRIDS) -> tuple[Grid, torch.Tensor]:
    grid = grids[draw(st.sampled_from(sorted(grids)))]
    columns = draw(columns_for(grid))
    noise = torch.randn(3, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    return grid, SHAPES[draw(st.sampled_from(sorted(SHAPES)))](noise) * draw(st.sampled_from(MAGNITUDES))


@settings(max_examples=600)
@given(cases())
def test_codes_stay_in_bounds_and_decode_to_finite_values(case: tuple[Grid, torch.Tensor]) -> None:
    grid, weight = case
    fields = fields_of(grid, weight)
    tensor = QuantizedTensor.from_grid(grid, weight, fields)  # checks bounds and finite fields at birth
    assert torch.isfinite(tensor.decode()).all()
    for name, (_, dtype) in grid.layout(*tensor.shape).items():
        assert torch.equal(fields[name].to(dtype).float(), fields[name]), f"{name} is not what the file holds"


@settings(max_examples=500)
@given(cases())
def test_rounding_is_idempotent(case: tuple[Grid, torch.Tensor]) -> None:
    grid, weight = case
    first = QuantizedTensor.from_grid(grid, weight, fields_of(grid, weight))
    again = QuantizedTensor.from_grid(grid, first.decode(), first.fields)
    assert torch.equal(first.codes, again.codes)


@settings(max_examples=200)
@given(cases(), st.integers(0, 10**6))
def test_offsets_of_up_to_one_step_keep_the_bounds(case: tuple[Grid, torch.Tensor], seed: int) -> None:
    grid, weight = case
    blocks = grouped(weight, grid.group_of(weight.shape[1]))
    offset = 2 * torch.rand(blocks.shape, generator=torch.Generator().manual_seed(seed)) - 1
    tensor = QuantizedTensor.from_grid(grid, weight, fields_of(grid, weight), offset)
    plain = QuantizedTensor.from_grid(grid, weight, fields_of(grid, weight))
    assert (tensor.codes.int() - plain.codes.int()).abs().max() <= 1
    assert torch.isfinite(tensor.decode()).all()


@pytest.mark.parametrize("name", GRIDS)
def test_a_zero_group_decodes_to_exact_zeros_beside_a_full_one(name: str) -> None:
    grid = GRIDS[name]
    columns = 512 if grid.super_block else 2 * (grid.group or 64)
    weight = torch.randn(4, columns, generator=torch.Generator().manual_seed(1))
    group = grid.group_of(columns)
    weight[1] = 0.0
    weight[2, :group] = 0.0
    decoded = rounded_tensor(weight, grid).decode()
    assert (decoded[1] == 0).all()
    assert (decoded[2, :group] == 0).all()
    assert (decoded[0] != 0).any()


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_all_equal_group_is_kept_up_to_the_rounding_of_its_scale(name: str, sign: float) -> None:
    grid = GRIDS[name]
    weight = torch.full((2, 256), sign * 0.7)
    # a two-level scale is a small integer of its super-block: all groups are equal here, so it is exact too
    tolerance = 1 - 2**-0.5 if grid.power_of_two else 2 * EPSILON
    torch.testing.assert_close(rounded_tensor(weight, grid).decode(), weight, rtol=tolerance, atol=0)


@given(cases({name: GRIDS[name] for name in GRIDS if GRIDS[name].power_of_two}))
def test_a_power_of_two_is_within_a_factor_of_sqrt_2_of_the_fitted_scale(case: tuple[Grid, torch.Tensor]) -> None:
    grid, weight = case
    blocks = grouped(weight, grid.group_of(weight.shape[1]))
    real, _ = grid.fit(blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0))
    exponent = grid.snap(real, None)["exponent"].double()
    inside = (real > 2.0**-120) & (real < 2.0**120)
    ratio = (2.0 ** (exponent - 128) / real.double())[inside]
    assert ((ratio > 2**-0.5001) & (ratio < 2**0.5001)).all()
    low, high = grid.bounds("exponent")
    assert (exponent[real <= 2.0**-127] == low).all()
    assert int(exponent.max()) <= high


@st.composite
def codebook_cases(draw: st.DrawFn) -> tuple[Grid, torch.Tensor, dict[str, torch.Tensor]]:
    """Weights under any storable scale, of both signs, not only the one that fits them."""
    grid = GRIDS[draw(st.sampled_from(sorted(name for name in GRIDS if GRIDS[name].codebook)))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    blocks = torch.randn(4, 8, 32, generator=generator) * draw(st.sampled_from([0.1, 1.0, 30.0, 500.0]))
    fields: dict[str, torch.Tensor] = {}
    for name, (shape, dtype) in grid.layout(4, 256).items():
        if dtype.is_floating_point:
            fields[name] = torch.randn(shape, generator=generator).half().float()
        else:
            low, high = (118, 138) if name == "exponent" else grid.bounds(name)
            fields[name] = torch.randint(low, high + 1, shape, generator=generator).float()
    return grid, blocks, fields


@settings(max_examples=200)
@given(codebook_cases())
def test_a_codebook_takes_the_nearest_level(case: tuple[Grid, torch.Tensor, dict[str, torch.Tensor]]) -> None:
    grid, blocks, fields = case
    error = (grid.decode(grid.codes(blocks, fields), fields) - blocks).abs()
    choices = [grid.decode(torch.full_like(blocks, code), fields) for code in range(grid.code_max + 1)]
    best = (torch.stack(choices) - blocks).abs().amin(0)
    assert (error <= best + 1e-5 * blocks.abs()).all()


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if grid.codebook])
def test_codebooks_ascend_and_codes_are_their_ranks(name: str) -> None:
    grid = GRIDS[name]
    levels = CODEBOOKS[str(grid.codebook)]
    assert list(levels) == sorted(set(levels))
    assert grid.code_max == len(levels) - 1 <= 2**grid.bits - 1
    weight = torch.tensor([levels[rank % len(levels)] for rank in range(256)]).float().reshape(1, -1)
    tensor = rounded_tensor(weight, grid)
    assert torch.equal(tensor.codes, torch.arange(256).reshape(1, -1).remainder(len(levels)).to(torch.uint8))


@pytest.mark.parametrize(
    "name", [name for name, grid in GRIDS.items() if not (grid.super_block or grid.codebook or grid.power_of_two)]
)
def test_plain_rounding_is_within_half_a_step(name: str) -> None:
    """Half a step, save for what a centre grid clips: its end of smaller magnitude may lie a whole step off."""
    grid = GRIDS[name]
    weight = torch.randn(8, 300, generator=torch.Generator().manual_seed(2))
    tensor = rounded_tensor(weight, grid)
    blocks = grouped(weight, grid.group_of(300))
    step = tensor.fields["scale"].float().abs().unsqueeze(-1)
    error = (grouped(tensor.decode(), grid.group_of(300)) - blocks).abs()
    codes = grouped(tensor.codes.float(), grid.group_of(300))
    clipped = (codes == grid.code_max) if grid.zero == "centre" else torch.zeros_like(codes, dtype=torch.bool)
    slack = 1 + grid.code_max * 2 * EPSILON  # the scale's own rounding, over the whole range
    assert (error <= 0.5 * step * slack)[~clipped].all()
    assert (error <= step * slack).all()


@settings(max_examples=200)
@given(cases(SUPER), st.sampled_from([0.5, 0.9, 1.0, 1.5, -1.0]))
def test_given_super_scales_are_kept_and_the_small_ones_are_the_nearest(
    case: tuple[Grid, torch.Tensor], factor: float
) -> None:
    """`shared` may be any fp16 number, also one that cannot reach the extreme group, or of the other sign."""
    grid, weight = case
    blocks = grouped(weight, grid.group_of(weight.shape[1]))
    real = grid.fit(blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0))
    free = grid.snap(*real)
    shared = {name: half_through(field * factor) for name, field in free.items() if name.endswith("_super")}
    fields = grid.snap(*real, shared)
    level = grid.super_block
    assert level is not None
    for name, wanted in (("scale", real[0]), ("minimum", real[1])):
        if wanted is None:
            continue
        assert torch.equal(fields[f"{name}_super"], shared[f"{name}_super"])
        top = shared[f"{name}_super"].double().unsqueeze(-1)
        small = fields[f"{name}_sub"].double().reshape(len(weight), -1, level.groups)
        target = wanted.double().reshape(small.shape)
        assert (small == small.round()).all()
        error = (top * small - target).abs()
        for other in (small - 1, small + 1):
            allowed = (other >= level.low) & (other <= level.high)
            assert (error <= (top * other - target).abs() * (1 + 1e-5) + 1e-6 * target.abs())[allowed].all()
    assert torch.isfinite(QuantizedTensor.from_grid(grid, weight, fields).decode()).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_larger_end_lies_on_code_zero_and_all_codes_are_used(bits: int, sign: float) -> None:
    grid = Grid(bits=bits, group=None)
    half = grid.centre
    ramp = sign * torch.linspace(-(half - 1) / half, 1.0, 8 * grid.code_max).unsqueeze(0) * 0.37
    tensor = rounded_tensor(ramp, grid)
    scale = tensor.fields["scale"].item()
    assert (scale < 0) == (sign > 0)
    assert set(tensor.codes.flatten().tolist()) == set(range(2**bits))
    assert tensor.codes[0, -1] == 0
    assert tensor.decode()[0, -1].item() == -half * scale
    assert tensor.decode()[0, -1].item() == pytest.approx(sign * 0.37, rel=2.0**-11)


def test_q8_0_keeps_off_code_zero() -> None:
    grid = grid_for("q8_0")
    ramp = torch.linspace(-1, 1, 320).reshape(1, -1)
    tensor = rounded_tensor(ramp, grid)
    assert int(tensor.codes.min()) == 1
    assert int(tensor.codes.max()) == 255
    assert (tensor.fields["scale"] >= 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("floor", [0, 1])
def test_zero_floor_holds_and_does_not_clip_a_positive_group(bits: int, floor: int) -> None:
    grid = Grid(bits=bits, group=32, zero="point", zero_floor=floor)
    weight = torch.rand(64, 256, generator=torch.Generator().manual_seed(3)) + 0.05
    tensor = rounded_tensor(weight, grid)
    assert int(tensor.fields["zero_point"].min()) == floor
    assert int(tensor.fields["zero_point"].max()) == floor
    blocks, decoded = grouped(weight, 32), grouped(tensor.decode(), 32)
    assert int(tensor.codes.max()) == grid.code_max
    torch.testing.assert_close(decoded.amax(-1), blocks.amax(-1), rtol=2 * EPSILON, atol=0)


@pytest.mark.parametrize("floor", [0, 1])
def test_a_zero_group_of_an_asymmetric_grid_keeps_the_floor(floor: int) -> None:
    tensor = rounded_tensor(torch.zeros(1, 32), Grid(bits=4, group=32, zero="point", zero_floor=floor))
    assert tensor.fields["zero_point"].tolist() == [[floor]]


def test_a_scale_beyond_fp16_saturates() -> None:
    value = torch.tensor([1e30, -1e30, 3e38, 65505.0, 1e-8, 6e-8])
    assert half_through(value).tolist() == [65504.0, -65504.0, 65504.0, 65504.0, 0.0, 2.0**-24]
    weight = torch.tensor([[1e30, -3e29] + [0.0] * 30])
    decoded = rounded_tensor(weight, grid_for("w4g32")).decode()
    assert decoded[0, 0] == 8 * 65504.0
    assert (decoded[0, 2:] == 0).all()


@pytest.mark.parametrize("value", [1e30, 12345.678, 0.5, 1.5, -2.5, 1e-30])
def test_straight_through_rounding_is_exact_in_the_forward_pass(value: float) -> None:
    x = torch.tensor(value, requires_grad=True)
    rounded = round_through(x)
    assert rounded.item() == torch.tensor(value).round().item()
    rounded.backward()
    assert x.grad is not None
    assert x.grad.item() == 1.0


def test_straight_through_gives_the_stored_value_however_far_it_is() -> None:
    value, stored = torch.tensor([1e30, -3.0, 0.1]), torch.tensor([65504.0, 1e-20, -7e8])
    assert torch.equal(straight_through(value, stored), stored)


def test_the_reciprocal_of_zero_is_zero_and_has_a_finite_gradient() -> None:
    x = torch.tensor([0.0, 2.0, -0.0], requires_grad=True)
    inverse = safe_reciprocal(x)
    inverse.sum().backward()
    assert inverse.tolist() == [0.0, 0.5, 0.0]
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, -0.25, 0.0]


@given(st.integers(1, 5), st.integers(1, 70), st.integers(1, 70))
def test_grouping_is_undone_and_pads_with_zeros(rows: int, columns: int, group: int) -> None:
    weight = torch.arange(1.0, rows * columns + 1).reshape(rows, columns)
    blocks = grouped(weight, group)
    assert blocks.shape == (rows, -(-columns // group), group)
    assert torch.equal(ungrouped(blocks, columns), weight)
    assert (blocks.flatten(1)[:, columns:] == 0).all()


@pytest.mark.parametrize("name", ["w4g32", "w4g32-asym", "q4_1", "w4gc", "w8gc-asym"])
def test_the_padding_of_a_ragged_row_does_not_move_its_codes(name: str) -> None:
    """A row of 80 in groups of 32 rounds as its three pieces do alone."""
    grid = grid_for(name)
    weight = torch.randn(3, 80, generator=torch.Generator().manual_seed(4))
    pieces = [rounded_tensor(piece, grid) for piece in (weight.split(32, 1) if grid.group else [weight])]
    whole = rounded_tensor(weight, grid)
    assert torch.equal(whole.codes, torch.cat([piece.codes for piece in pieces], 1))
    assert torch.equal(whole.fields["scale"], torch.cat([piece.fields["scale"] for piece in pieces], 1))
    assert grid.ragged(80) == (grid.group is not None)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("q4_0", 4.5),
        ("q4_1", 5.0),
        ("q5_0", 5.5),
        ("q5_1", 6.0),
        ("q8_0", 8.5),
        ("w4g128", 4.125),
        ("w2g64-asym", 2 + 18 / 64),
        ("w4gc", 4 + 16 / 1024),
        ("q2_k", 2.625),
        ("q3_k", 3.4375),
        ("q4_k", 4.5),
        ("q5_k", 5.5),
        ("q6_k", 6.5625),
        ("iq4_nl", 4.5),
        ("iq4_xs", 4.25),
        ("mxfp4", 4.25),
        ("q2_0", 2.25),
    ],
)
def test_bits_per_weight_are_those_of_the_format(name: str, bits: float) -> None:
    assert GRIDS[name].bits_per_weight(1024) == pytest.approx(bits)


@pytest.mark.parametrize("name", GRIDS)
def test_json_round_trip(name: str) -> None:
    assert Grid.from_json(GRIDS[name].to_json()) == GRIDS[name]


def test_unknown_json_fields_are_errors() -> None:
    with pytest.raises(TypeError, match="colour"):
        Grid.from_json({"bits": 4, "group": 32, "colour": "red"})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 32, None])
def test_full_range_symmetric_rounding_agrees_with_numpy(bits: int, group: int | None) -> None:
    """An independent implementation, element by element, of the docstring of `Grid.fit` for `centre`."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(6, 50, generator=generator)
    weight[2, 16:32] = 0.0
    half = 2 ** (bits - 1)
    expected = np.zeros((6, 50), dtype=np.uint8)
    values = np.zeros((6, 50), dtype=np.float32)
    for row, line in enumerate(weight.numpy()):
        size = group or 50
        for start in range(0, 50, size):
            piece = line[start : start + size]
            largest = piece.min() if piece.max() <= -piece.min() else piece.max()
            scale = np.float32(np.float16(largest / np.float32(-half)))
            level = np.rint(piece * (np.float32(1) / scale)) if scale else np.zeros_like(piece)
            codes = np.clip(level + half, 0, 2 * half - 1)
            expected[row, start : start + size] = codes
            values[row, start : start + size] = scale * (codes.astype(np.float32) - np.float32(half))
    tensor = rounded_tensor(weight, Grid(bits=bits, group=group))
    assert np.array_equal(tensor.codes.numpy(), expected)
    assert np.array_equal(tensor.decode().numpy(), values)
