"""Judging an expert by its own tokens is judging it by the whole block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from signround.experts import is_expert, unit_of
from signround.formats import grid_for
from signround.qtensor import QuantizedTensor
from signround.tuning.expert_choice import choose_experts
from signround.tuning.problem import BlockProblem
from tests.small_artifacts import rounded_tensor
from tests.small_models import MIXTURES, write_small_model
from tests.tuning.problems import problem_of, settings

GRID = grid_for("w4g32")
BATCH = 3  # does not divide the held-out samples


def random_candidates(problem: BlockProblem) -> dict[str, dict[str, QuantizedTensor]]:
    """Three roundings of each linear; for every second expert the "tuned" one is the worst."""
    flips = torch.Generator().manual_seed(5)
    candidates = {}
    for index in problem.blocks.architecture.block_linears(0):
        name = index.removeprefix("model.layers.0.")
        weight = problem.original(name)
        plain, flipped = rounded_tensor(weight, GRID), rounded_tensor(weight, GRID, flips)
        bad = is_expert(name) and int(name.partition(".experts.")[2].partition(".")[0]) % 2 == 0
        candidates[name] = {
            "tuned": flipped if bad else plain,
            "start": plain if bad else flipped,
            "rounded": rounded_tensor(weight, GRID, flips),
        }
    return candidates


@pytest.mark.parametrize("family", MIXTURES)
def test_choices_are_those_of_the_whole_block(family: str, tmp_path: Path) -> None:
    problem = problem_of(write_small_model(tmp_path, family), settings())
    candidates = random_candidates(problem)
    units: dict[str, list[str]] = {}
    for name in filter(is_expert, candidates):
        units.setdefault(unit_of(name), []).append(name)
    weights = {name: options["tuned"].decode() for name, options in candidates.items()}

    expected = dict(weights)
    lowest = float(problem.held_out_loss(expected, BATCH))
    wanted = {}
    for names in units.values():
        for choice in ("start", "rounded"):
            trial = expected | {name: candidates[name][choice].decode() for name in names}
            loss = float(problem.held_out_loss(trial, BATCH))
            if loss < lowest:
                expected, lowest = trial, loss
                wanted |= dict.fromkeys(names, choice)

    assert choose_experts(problem, units.values(), candidates, weights, BATCH) == wanted
    assert set(wanted.values()) >= {"start"}
    assert set(units) - {unit_of(name) for name in wanted}  # some stayed tuned
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert float(problem.held_out_loss(weights, BATCH)) == pytest.approx(lowest, rel=1e-6)
