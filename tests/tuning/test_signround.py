"""One step of sign descent, in the paper's symbols, and the limits of each published variant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from signround.formats import grid_for
from signround.recipes import settings_for
from signround.tuning.layer import TunedLayer
from signround.tuning.signround import SignDescent, descent_for
from signround.tuning.start import plain_start


def layer() -> TunedLayer:
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    grid = grid_for("w4g32")
    return TunedLayer(grid, weight, plain_start(grid, weight))


def gradients(descent: SignDescent, layers: list[TunedLayer]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(parameter.shape, generator=generator) for parameter in descent.parameters(layers)]


def test_a_step_is_the_sign_of_the_gradient_times_the_rate() -> None:
    layers = [layer(), layer()]
    descent = descent_for("signround", "search")
    given = gradients(descent, layers)
    given[0][0, 0, 0] = 0.0  # no gradient, no move
    before = [parameter.detach().clone() for parameter in descent.parameters(layers)]
    descent.step(layers, given, 0.125)
    for old, new, gradient in zip(before, descent.parameters(layers), given, strict=True):
        assert torch.equal(new.detach(), old - 0.125 * gradient.sign())
    assert layers[0].offset[0, 0, 0] == 0


def test_the_order_of_parameters() -> None:
    layers = [layer(), layer()]
    found = descent_for("signround", "range").parameters(layers)
    expected = [layers[0].offset, layers[1].offset, layers[0].shrink_high, layers[0].shrink_low,
                layers[1].shrink_high, layers[1].shrink_low]  # fmt: skip
    assert all(one is other for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("start", "highest"), [("range", 1.0), ("search", 2.0)])
def test_ranges_stay_within_their_limits(start: str, highest: float) -> None:
    layers = [layer()]
    descent = descent_for("signround", start)
    for sign in (1.0, -1.0):
        given = [torch.full_like(parameter, sign) for parameter in descent.parameters(layers)]
        for _ in range(8):
            descent.step(layers, given, 0.5)
        end = 0.0 if sign > 0 else highest
        for shrink in (layers[0].shrink_high, layers[0].shrink_low):
            assert torch.equal(shrink.detach(), torch.full_like(shrink, end))
    assert layers[0].offset.abs().max() <= 4.0  # V has no clip here ...


def test_offsets_of_the_last_version_stay_small_without_a_clip() -> None:
    """... because its rates add up to (T + 1) / 2T."""
    settings = settings_for(context=64, samples=8, seqlen=16, iters=200)
    rates = [settings.learning_rate * (1 - step / settings.iters) for step in range(settings.iters)]
    assert sum(rates) == pytest.approx(0.5025)


def test_the_draft_clips_offsets_and_leaves_ranges_alone() -> None:
    layers = [layer()]
    descent = descent_for("signround-400", "range")
    assert not descent.quantized_inputs  # its inputs come from the float chain
    assert [id(parameter) for parameter in descent.parameters(layers)] == [id(layers[0].offset)]
    given = gradients(descent, layers)
    for _ in range(5):
        descent.step(layers, given, 0.3)
    assert torch.equal(layers[0].offset.detach(), -0.5 * given[0].sign())
    assert torch.equal(layers[0].shrink_high.detach(), torch.ones_like(layers[0].shrink_high))


def test_published_settings() -> None:
    """arXiv 2309.05516 v5 and v1."""
    last = settings_for("signround", context=2048)
    assert (last.iters, last.learning_rate, last.batch_size) == (200, 1 / 200, 8)
    draft = settings_for("signround-400", context=2048)
    assert (draft.iters, draft.learning_rate) == (400, 2.5e-3)
