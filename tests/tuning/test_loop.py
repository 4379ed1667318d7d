"""The loop over one block: what it may choose, what it must fall back to, and what decides its batches."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from signround.formats import grid_for
from signround.tuning import loop, scales
from signround.tuning import problem as problem_room
from signround.tuning.layer import TunedLayer
from signround.tuning.loop import BlockOutcome, tune_block
from signround.tuning.problem import BlockProblem
from signround.tuning.rtn import rounded
from signround.tuning.signround import descent_for
from signround.tuning.start import Start, plain_start
from tests.tuning.problems import LINEAR, decoded, layers_of, problem_of, settings


def quiet(done: int, total: int) -> None:
    """No progress."""


def tuned(problem: BlockProblem, method: str = "signround", scheme: str = "w3g32") -> BlockOutcome:
    chosen = settings(method)
    layers = layers_of(problem, grid_for(scheme))
    return tune_block(problem, layers, chosen, descent_for(method, chosen.start), quiet)


def float64_loss(problem: BlockProblem, weights: Mapping[str, Tensor]) -> float:
    """Mean squared error on the held-out samples, computed apart from the loop."""
    block = problem.blocks.block(problem.index)
    with torch.no_grad():
        for name, weight in weights.items():
            block.get_parameter(name).copy_(weight)
        outputs = problem.blocks.run(block, problem.inputs[-problem.held_out :], problem.index)
    return (outputs.double() - problem.targets[-problem.held_out :].double()).square().mean().item()


@pytest.mark.parametrize("method", ["signround", "signround-400"])
def test_tuning_beats_rounding_and_says_the_truth(llama_folder: Path, method: str) -> None:
    problem = problem_of(llama_folder, settings(method))
    outcome = tuned(problem, method)
    assert outcome.loss_tuned < 0.97 * outcome.loss_rounded
    assert "tuned" in outcome.kept.values()
    assert float64_loss(problem, decoded(outcome.tensors)) == pytest.approx(outcome.loss_tuned, rel=1e-4)
    plain = {name: rounded(tensor.grid, problem.block.get_parameter(name)) for name, tensor in outcome.tensors.items()}
    assert float64_loss(problem, decoded(plain)) == pytest.approx(outcome.loss_rounded, rel=1e-4)


def test_the_block_itself_is_left_alone(llama_folder: Path) -> None:
    problem = problem_of(llama_folder, settings())
    before = {name: value.clone() for name, value in problem.block.state_dict().items()}
    tuned(problem)
    assert all(torch.equal(value, before[name]) for name, value in problem.block.state_dict().items())


def test_the_same_seed_gives_the_same_integers(llama_folder: Path) -> None:
    problem = problem_of(llama_folder, settings())
    first, again = tuned(problem), tuned(problem)
    assert first.kept == again.kept
    assert all(torch.equal(first.tensors[name].codes, again.tensors[name].codes) for name in first.tensors)


def test_a_layer_that_tuning_harms_falls_back_and_is_recorded(llama_folder: Path) -> None:
    """One layer starts from a range ten times too wide, with no steps to mend it: plain rounding must take its place,
    and only its."""
    chosen = settings(iters=1, learning_rate=0.0)
    problem = problem_of(llama_folder, chosen)
    layers = layers_of(problem, grid_for("w4g32"))
    wide = layers[LINEAR].start
    layers[LINEAR].start = Start(wide.low * 10, wide.high * 10)
    outcome = tune_block(problem, layers, chosen, descent_for("signround", "range"), quiet)
    expected = rounded(layers[LINEAR].grid, problem.block.get_parameter(LINEAR))
    assert outcome.kept[LINEAR] == "rounded"
    assert torch.equal(outcome.tensors[LINEAR].codes, expected.codes)
    assert outcome.loss_tuned <= outcome.loss_rounded


def test_a_start_that_tuning_spoils_is_kept(llama_folder: Path) -> None:
    """Steps that always go uphill: the best point seen is the start itself, never a later one."""
    chosen = settings(learning_rate=0.5)
    problem = problem_of(llama_folder, chosen)
    grid = grid_for("w4g32")
    layers = layers_of(problem, grid)
    descent = descent_for("signround", "range")

    class Uphill(type(descent)):  # type: ignore[misc]
        def step(self, layers: list[TunedLayer], gradients: list[Tensor], rate: float) -> None:
            super().step(layers, [-gradient for gradient in gradients], rate)

    outcome = tune_block(problem, layers, chosen, Uphill(**vars(descent)), quiet)
    for name, tensor in outcome.tensors.items():
        assert torch.equal(tensor.codes, rounded(grid, problem.block.get_parameter(name)).codes), name


@pytest.mark.parametrize("scheme", ["w2g64", "w4g32-asym", "q8_0"])
@pytest.mark.parametrize("steps", [1, 7])
def test_the_end_is_never_above_rounding(llama_folder: Path, scheme: str, steps: int) -> None:
    """Whatever the starts: here every layer begins at a random range."""
    chosen = settings(iters=steps, learning_rate=1 / steps)
    problem = problem_of(llama_folder, chosen)
    layers = layers_of(problem, grid_for(scheme))
    generator = torch.Generator().manual_seed(steps)
    for layer in layers.values():
        low = layer.start.low * (0.2 + 1.6 * torch.rand(layer.start.low.shape, generator=generator))
        high = layer.start.high * (0.2 + 1.6 * torch.rand(layer.start.high.shape, generator=generator))
        layer.start = Start(low, high)
    outcome = tune_block(problem, layers, chosen, descent_for("signround", "range"), quiet)
    assert outcome.loss_tuned <= outcome.loss_rounded
    assert float64_loss(problem, decoded(outcome.tensors)) <= outcome.loss_rounded * (1 + 1e-5)


def doubled(start: Start) -> Start:
    return Start(2 * start.low, 2 * start.high)


def test_plain_rounding_of_everything_is_a_candidate(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer no replacement helps, all of them together do: losses are scripted to say so."""
    problem = problem_of(llama_folder, settings())
    grid = grid_for("w4g32")
    names = list(layers_of(problem, grid))
    plain = {name: rounded(grid, problem.block.get_parameter(name)) for name in names}
    wide = {
        name: TunedLayer(grid, layer.weight, doubled(plain_start(grid, layer.weight))).frozen()
        for name, layer in ((name, problem.block.get_submodule(name.removesuffix(".weight"))) for name in names)
    }
    candidates = {name: {"tuned": wide[name], "start": wide[name], "rounded": plain[name]} for name in names}

    def scripted(self: BlockProblem, weights: Mapping[str, Tensor], batch: int) -> Tensor:
        at_plain = sum(torch.equal(weights[name], plain[name].decode()) for name in names)
        return torch.tensor({0: 2.0, len(names): 1.0}.get(at_plain, 3.0))

    monkeypatch.setattr(BlockProblem, "held_out_loss", scripted)
    outcome = loop._best_of(problem, candidates, settings())
    assert set(outcome.kept.values()) == {"rounded"}
    assert outcome.loss_tuned == outcome.loss_rounded == 1.0


def test_held_out_samples_are_never_trained_on() -> None:
    chosen = settings(iters=40, scale_iters=10)
    picks = loop._batches(chosen, 0)
    assert picks.shape == (50, 4)
    assert set(picks.flatten().tolist()) == set(range(12))  # 16 samples, the last 4 held out
    counts = torch.bincount(picks.flatten())
    assert counts.max() - counts.min() <= 1  # each as often as the others


def test_batches_depend_on_seed_and_block_alone() -> None:
    """Or a resumed run would go another way."""
    chosen = settings()
    expected = loop._batches(chosen, 3)
    more = loop._batches(replace(chosen, scale_iters=2 * chosen.scale_iters), 3)
    assert torch.equal(more[: len(expected)], expected)  # the rounding sees the same, whatever follows it
    torch.manual_seed(99)
    torch.rand(5)
    assert torch.equal(loop._batches(replace(chosen, recipe="best"), 3), expected)
    assert not torch.equal(loop._batches(chosen, 4), expected)
    assert not torch.equal(loop._batches(replace(chosen, seed=1), 3), expected)


def test_the_held_out_loss_is_the_same_in_any_batch(llama_folder: Path) -> None:
    problem = problem_of(llama_folder, settings())
    weights = {name: layer.fake_quantized().detach() for name, layer in layers_of(problem, grid_for("w2g32")).items()}
    losses = [problem.held_out_loss(weights, batch).item() for batch in (1, 3, 4, 100)]
    assert losses == pytest.approx([float64_loss(problem, weights)] * 4, rel=1e-5)


def test_the_step_loop_never_waits_for_the_device() -> None:
    """Reading one number on the host stops a GPU's queue: no such call stands in the loop or in what it calls."""
    waits = {"item", "tolist", "cpu", "numpy", "synchronize", "bool", "float", "int", "nonzero", "equal", "allclose"}
    functions = {
        node.name: node
        for module in (problem_room, loop, scales)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.FunctionDef)
    }
    (steps,) = [
        node
        for node in ast.walk(functions["_descend"])
        if isinstance(node, ast.For) and "step" in ast.dump(node.target)
    ]
    called_by_steps = ("_held_out", "held_out_loss", "loss", "step")
    for node in (steps, *(functions[name] for name in called_by_steps)):
        called = {
            call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            for call in ast.walk(node)
            if isinstance(call, ast.Call)
        }
        assert not called & waits
        for branch in ast.walk(node):
            if isinstance(branch, ast.If):
                assert "loss <" not in ast.unparse(branch.test)  # a tensor in a condition waits too


def test_each_check_is_reported(llama_folder: Path) -> None:
    chosen = settings()
    problem = problem_of(llama_folder, chosen)
    seen: list[tuple[int, int]] = []
    tune_block(
        problem, layers_of(problem, grid_for("w4g32")), chosen, descent_for("signround", "range"),
        lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert chosen.scale_iters == 10
    assert seen == [(step, 30) for step in [*range(0, 21, 2), *range(20, 31)]]
