"""What is tuned is what the file will decode to, bit for bit, whatever the learned tensors hold."""

from __future__ import annotations

import pytest
import torch

from signround.formats import grid_for, scheme_names
from signround.grid import Grid, SuperBlock
from signround.tuning.layer import TunedLayer
from signround.tuning.rtn import rounded
from signround.tuning.start import plain_start

GRIDS = {name: grid_for(name, zero_floor) for name in scheme_names() for zero_floor in (0,)} | {
    "w4g128-asym, zero point >= 1": grid_for("w4g128-asym", 1),
    "q4_k": Grid(4, 32, "minimum", super_block=SuperBlock(6, 8, signed=False)),
    "q6_k": Grid(6, 16, super_block=SuperBlock(8, 16, signed=True)),
}


def layer_of(grid: Grid, columns: int = 512) -> TunedLayer:
    """Learned tensors far from their start, a group of zeros, a group of one sign, and a subnormal group."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, columns, generator=generator)
    weight[1, :256] = 0
    weight[2] = weight[2].abs()
    weight[3, :256] *= 1e-7
    layer = TunedLayer(grid, weight, plain_start(grid, weight))
    with torch.no_grad():
        layer.offset.uniform_(-0.6, 0.6, generator=generator)
        layer.shrink_high.uniform_(0.3, 1.5, generator=generator)
        layer.shrink_low.uniform_(0.3, 1.5, generator=generator)
        layer.shrink_high[0, 0] = layer.shrink_low[0, 0] = 0.0  # a range may shrink to nothing
    return layer


@pytest.mark.parametrize("name", GRIDS)
def test_the_fake_quantised_weight_is_the_decoded_one(name: str) -> None:
    layer = layer_of(GRIDS[name])
    assert torch.equal(layer.fake_quantized().detach(), layer.frozen().decode())


@pytest.mark.parametrize("scheme", ["w4g32", "w4g64-asym", "w2gc"])
def test_ragged_rows_too(scheme: str) -> None:
    layer = layer_of(grid_for(scheme), columns=272)
    assert layer.fake_quantized().shape == (6, 272)
    assert torch.equal(layer.fake_quantized().detach(), layer.frozen().decode())


@pytest.mark.parametrize("name", GRIDS)
def test_gradients_are_finite_and_reach_everything(name: str) -> None:
    layer = layer_of(GRIDS[name])
    parameters = [layer.offset, *layer.ranges()]
    gradients = torch.autograd.grad(layer.fake_quantized().square().sum(), parameters)
    for gradient in gradients:
        assert bool(torch.isfinite(gradient).all())
        assert bool((gradient != 0).any())


@pytest.mark.parametrize("name", GRIDS)
def test_ranges_learn_beside_nothing_else(name: str) -> None:
    """On symmetric grids of one level: all of these names, and no other."""
    symmetric = (name.startswith("w") and "asym" not in name) or name in ("q2_0", "q4_0", "q5_0", "q8_0")
    assert len(layer_of(GRIDS[name]).ranges()) == (2 if symmetric else 0)


@pytest.mark.parametrize("name", GRIDS)
def test_a_fresh_layer_is_plain_rounding(name: str) -> None:
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    grid = GRIDS[name]
    frozen, plain = TunedLayer(grid, weight, plain_start(grid, weight)).frozen(), rounded(grid, weight)
    assert torch.equal(frozen.codes, plain.codes)
    assert all(torch.equal(frozen.fields[field], plain.fields[field]) for field in plain.fields)
