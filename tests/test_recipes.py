"""Recipes: bounds, and flags that do not apply. The numbers themselves are chosen by measurement, not here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from signround.errors import RefusedError
from signround.recipes import (
    METHODS,
    RECIPES,
    TuningSettings,
    fit_to_memory,
    least_samples,
    settings_for,
    with_samples,
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("context", [32, 512, 131072])
def test_every_recipe_is_sane(method: str, recipe: str, context: int) -> None:
    settings = settings_for(method, recipe, "cpu", context=context)
    assert settings.seqlen <= context
    assert 0 <= settings.held_out < settings.samples
    assert 1 <= settings.batch_size <= settings.samples - settings.held_out
    assert TuningSettings(**settings.to_json()) == settings
    later = ("lookahead", "scale_iters", "scale_rate")
    earlier = TuningSettings(**{name: value for name, value in settings.to_json().items() if name not in later})
    assert (earlier.lookahead, earlier.scale_iters) == (0, 0)  # artifacts of before there were any
    assert settings.scale_iters == (-(-settings.iters // 2) if method == "signround" else 0)
    assert (settings.scale_rate > 0) == (settings.scale_iters > 0)
    if method == "rtn":
        assert (settings.iters, settings.held_out) == (0, 0)
    else:
        assert settings.iters > 0
        assert settings.held_out > 0
        assert settings.learning_rate > 0


def test_recipes_grow_in_effort() -> None:
    cost = [settings_for("signround", recipe, context=4096) for recipe in ("fast", "default", "best")]
    work = [settings.iters * settings.batch_size * settings.seqlen for settings in cost]
    assert work == sorted(work)
    assert work[0] < work[-1]


def test_the_draft_is_400_steps_at_its_rate_from_the_range() -> None:
    draft = settings_for("signround-400", context=512)
    assert (draft.iters, draft.learning_rate, draft.start) == (400, 2.5e-3, "range")


@pytest.mark.parametrize("iters", [1, 50, 200, 1000])
def test_the_rate_is_one_over_the_steps(iters: int) -> None:
    assert settings_for("signround", context=512, iters=iters).learning_rate == 1 / iters


def test_the_user_has_the_last_word() -> None:
    settings = settings_for("signround", "fast", context=512, samples=20, seqlen=40, iters=7, batch_size=3, seed=5)
    assert (settings.samples, settings.seqlen, settings.iters, settings.batch_size, settings.seed) == (20, 40, 7, 3, 5)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"method": "awq"}, "'awq'.*signround, signround-400, rtn"),
        ({"recipe": "slow"}, "'slow'.*fast, default, best"),
        ({"device": "tpu"}, "'tpu'.*cpu, cuda"),
        ({"method": "rtn", "iters": 10}, "--iters.*not apply"),
        ({"method": "rtn", "batch_size": 4}, "--batch-size.*not apply"),
        ({"samples": 1}, "--samples: 1 is too small"),
        ({"samples": 0}, "--samples"),
        ({"samples": -5}, "--samples"),
        ({"seqlen": 0}, "--seqlen"),
        ({"seqlen": 7}, "--seqlen"),
        ({"seqlen": 513}, "--seqlen: 513 tokens exceed the model's context of 512"),
        ({"iters": 0}, "--iters"),
        ({"iters": -1}, "--iters"),
        ({"batch_size": 0}, "--batch-size"),
        ({"method": "rtn", "samples": 0}, "--samples"),
    ],
)
def test_what_does_not_apply_or_is_out_of_bounds_is_refused(arguments: dict[str, Any], fragment: str) -> None:
    with pytest.raises(RefusedError, match=fragment):
        settings_for(**({"context": 512} | arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_device_is_refused_with_the_way_out() -> None:
    with pytest.raises(RefusedError, match="no CUDA device; use --device cpu"):
        settings_for(device="cuda", context=512)


def test_hidden_states_shrink_to_bf16_and_then_are_refused() -> None:
    settings = settings_for(context=512, samples=100, seqlen=100)
    least = least_samples(settings, 100)
    need = 3 * 100 * 100 * 64 * 4  # two chains and the targets of the next block, in float32
    assert fit_to_memory(settings, 64, 2 * need, least).hidden_states == "fp32"
    assert fit_to_memory(settings, 64, 2 * need - 2, least).hidden_states == "bf16"
    assert fit_to_memory(settings, 64, need, least).hidden_states == "bf16"
    with pytest.raises(RefusedError, match=r"100 samples x 100 tokens.*fewer --samples"):
        fit_to_memory(settings, 64, need - 2, least)


@pytest.mark.parametrize("recipe", ["fast", "default", "best"])
def test_a_recipe_makes_do_with_a_quarter_of_its_samples(recipe: str) -> None:
    """Half and half again, where memory has no room for more; what the user asked for stays, or is refused."""
    settings = settings_for("signround", recipe, context=4096)
    least = least_samples(settings, None)
    assert least == settings.samples // 4
    need = (2 + settings.lookahead) * settings.samples * settings.seqlen * 64 * 2  # in bfloat16
    half, quarter = (fit_to_memory(settings, 64, 2 * need // share, least) for share in (2, 4))
    assert [each.samples for each in (half, quarter)] == [settings.samples // 2, least]
    assert half.hidden_states == quarter.hidden_states == "bf16"
    assert quarter.held_out == settings.held_out  # what is left for the steps shrinks first
    for memory, fewest in ((2 * need // 4 - 2, least), (2 * need // 2, least_samples(settings, settings.samples))):
        with pytest.raises(RefusedError, match=f"of {fewest} samples"):
            fit_to_memory(settings, 64, memory, fewest)


def test_fewer_samples_leave_enough_for_a_step() -> None:
    settings = settings_for(context=512, batch_size=400)
    assert with_samples(settings, 408).samples == 408
    with pytest.raises(RefusedError, match=r"400 windows a step exceed the 120 windows .*128 samples, 8 of them"):
        with_samples(settings, 128)


def test_rounding_reads_few_windows() -> None:
    assert settings_for("rtn", context=512).samples == settings_for(context=512).samples // 4
