"""Scales that learn after the rounding: what is tuned is what the file decodes to, and nothing but scales moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from signround.formats import grid_for
from signround.tuning import loop
from signround.tuning.loop import tune_block
from signround.tuning.scales import ScaleDescent, ScaledLayer
from signround.tuning.signround import descent_for
from tests.tuning.problems import layers_of, problem_of, settings
from tests.tuning.test_layer import GRIDS, layer_of

CPU = torch.device("cpu")
ONE_LEVEL = sorted(name for name, grid in GRIDS.items() if grid.super_block is None and not grid.power_of_two)


@pytest.mark.parametrize("name", GRIDS)
def test_untouched_factors_change_nothing(name: str) -> None:
    tensor = layer_of(GRIDS[name]).frozen()
    layer = ScaledLayer(tensor, CPU)
    assert torch.equal(layer.decoded().detach(), tensor.decode())
    assert all(torch.equal(field, tensor.fields[key]) for key, field in layer.frozen().fields.items())


@pytest.mark.parametrize("name", GRIDS)
@given(spread=st.sampled_from([1e-4, 0.05, 0.9, 1e6]), seed=st.integers(0, 9))
def test_the_decoded_weight_is_the_file_s(name: str, spread: float, seed: int) -> None:
    """Whatever the factors: scales that overflow fp16 or vanish in it, signs that turn."""
    tensor = layer_of(GRIDS[name]).frozen()
    layer = ScaledLayer(tensor, CPU)
    with torch.no_grad():
        for factor in layer.factors.values():
            factor.add_(spread * torch.randn(factor.shape, generator=torch.Generator().manual_seed(seed)))
    frozen = layer.frozen()
    assert torch.equal(layer.decoded().detach(), frozen.decode())
    assert torch.equal(frozen.codes, tensor.codes)
    integers = {key for key, field in tensor.fields.items() if not field.dtype.is_floating_point}
    assert all(torch.equal(frozen.fields[key], tensor.fields[key]) for key in integers)


@pytest.mark.parametrize("name", ONE_LEVEL)
def test_gradients_are_finite_and_reach_every_factor(name: str) -> None:
    layer = ScaledLayer(layer_of(GRIDS[name]).frozen(), CPU)
    gradients = torch.autograd.grad(layer.decoded().square().sum(), list(layer.factors.values()))
    assert gradients
    for gradient in gradients:
        assert bool(torch.isfinite(gradient).all())
        assert bool((gradient != 0).any())


@pytest.mark.parametrize("name", sorted(set(GRIDS) - set(ONE_LEVEL)))
def test_super_scales_and_exponents_stay(name: str) -> None:
    assert ScaledLayer(layer_of(GRIDS[name]).frozen(), CPU).factors == {}


def test_a_block_of_super_scales_passes_the_steps_on_scales_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed plans have steps on the scales, and blocks without a scale that could move: nothing is made for them."""
    monkeypatch.setattr(loop, "ScaledLayer", None)
    tensors = {"weight": layer_of(GRIDS["q4_k"]).frozen()}
    picks = torch.zeros(3, 4, dtype=torch.int64)
    assert loop._learn_scales(None, tensors, settings(), picks, lambda _: None) is tensors  # type: ignore[arg-type]


@pytest.mark.parametrize("unit", [1.0, 1e-9])
def test_the_steps_go_to_the_best_scale_whatever_the_loss_is_measured_in(unit: float) -> None:
    """One scale a row, 3 % off: the least squares of the row is where it must end."""
    grid = grid_for("w4gc")
    tensor = layer_of(grid, 64).frozen()
    off = replace(tensor, fields={"scale": (tensor.fields["scale"].float() * 1.03).half()})
    layer = ScaledLayer(off, CPU)
    target = tensor.decode()
    descent = ScaleDescent([layer], 2e-3)
    for step in range(100):
        loss = (layer.decoded() - target).square().mean() * unit
        descent.step(torch.autograd.grad(loss, descent.parameters), 1 - step / 100)
    moved = tensor.fields["scale"].abs() > 1e-4  # the others are subnormal: fp16 has no 3 % there
    ratio = layer.frozen().fields["scale"].float() / tensor.fields["scale"].float()
    assert bool(moved.any())
    assert bool(((ratio - 1).abs()[moved] < 2e-3).all())


@pytest.mark.parametrize("scheme", ["w2g64", "w4g32-asym"])
def test_scales_lower_the_loss_and_leave_the_codes(llama_folder: Path, scheme: str) -> None:
    chosen = settings(scale_iters=20)
    problem = problem_of(llama_folder, chosen)
    descent = descent_for("signround", "range")
    without = tune_block(
        problem, layers_of(problem, grid_for(scheme)), replace(chosen, scale_iters=0), descent, lambda *_: None
    )
    outcome = tune_block(problem, layers_of(problem, grid_for(scheme)), chosen, descent, lambda *_: None)
    assert outcome.loss_tuned < 0.998 * without.loss_tuned
    tuned = [name for name in outcome.tensors if outcome.kept[name] == without.kept[name] == "tuned"]
    assert tuned
    assert all(torch.equal(outcome.tensors[name].codes, without.tensors[name].codes) for name in tuned)


def test_an_expert_without_tokens_stays() -> None:
    """Zero gradients from the first step on move nothing."""
    layer = ScaledLayer(layer_of(grid_for("w4g32")).frozen(), CPU)
    descent = ScaleDescent([layer], 0.01)
    for _ in range(3):
        descent.step([torch.zeros_like(parameter) for parameter in descent.parameters], 1.0)
    assert all(torch.equal(factor, torch.ones_like(factor)) for factor in layer.factors.values())
