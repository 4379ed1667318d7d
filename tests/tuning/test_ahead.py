"""What follows a block while it is tuned: its loss, its gradients, and when there is anything at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from signround.architecture import Scales
from signround.blocks import DecoderBlocks, Head
from signround.checkpoint import SourceCheckpoint
from signround.formats import grid_for
from signround.recipes import settings_for
from signround.tuning import ahead as ahead_room
from signround.tuning.ahead import NextBlock, NextHead, relative_error
from signround.tuning.loop import tune_block
from signround.tuning.problem import BlockProblem
from signround.tuning.signround import descent_for
from tests.tuning.problems import decoded, layers_of, problem_of, settings

ALL = torch.arange(16)


def with_next_block(folder: Path) -> BlockProblem:
    problem = problem_of(folder, settings())
    block, targets = problem.blocks.block(1), problem.targets.clone()
    problem.blocks.run_all(block, targets, 1)
    return replace(problem, ahead=NextBlock(problem.blocks, block, 1, targets))


def noisy(targets: Tensor) -> Tensor:
    noise = torch.randn(targets.shape, generator=torch.Generator().manual_seed(5))
    return (targets + 0.1 * noise).requires_grad_()


def test_an_exact_block_leaves_no_error_behind_the_next_one(llama_folder: Path) -> None:
    problem = with_next_block(llama_folder)
    assert problem.ahead is not None
    assert problem.ahead.loss(problem.targets, problem.targets, ALL, fast=False).item() < 1e-12
    outputs = noisy(problem.targets)
    loss = problem.ahead.loss(outputs, problem.targets, ALL, fast=False)
    assert loss.item() > 1e-4
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert gradient.abs().min(-1).values.max() > 0  # of all tokens but those that nothing reads
    assert all(parameter.grad is None for parameter in problem.block.parameters())


def test_the_targets_follow_the_samples(llama_folder: Path) -> None:
    problem = with_next_block(llama_folder)
    assert problem.ahead is not None
    picks = torch.tensor([3, 1])
    assert problem.ahead.loss(problem.targets[picks], problem.targets[picks], picks, fast=False).item() < 1e-12
    assert problem.ahead.loss(problem.targets[picks], problem.targets[picks], picks.flip(0), fast=False).item() > 1e-3


@pytest.mark.parametrize("scales", [Scales(1.0), Scales(1.0, logits=3.0), Scales(1.0, logits_cap=5.0)])
@pytest.mark.parametrize("tokens_at_once", [1, 7, 1000])
def test_the_divergence_in_slices_is_the_whole_one(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, scales: Scales, tokens_at_once: int
) -> None:
    problem = problem_of(llama_folder, settings())
    head = replace(problem.blocks.head(), scales=scales)
    monkeypatch.setattr(ahead_room, "LOGIT_BYTES", tokens_at_once * head.weight.shape[0] * 4)
    outputs = noisy(problem.targets)
    found = NextHead(problem.blocks, head).loss(outputs, problem.targets, ALL, fast=False)
    found_gradient = torch.autograd.grad(3 * found, outputs)[0]
    wanted = whole_divergence(head, outputs, problem.targets)
    wanted_gradient = torch.autograd.grad(3 * wanted, outputs)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found_gradient, wanted_gradient, rtol=1e-3, atol=1e-8)


def test_steps_are_those_of_autocast(llama_folder: Path) -> None:
    """The weight is converted once, not slice by slice; to the bit the same."""
    problem = problem_of(llama_folder, settings())
    checkpoint = SourceCheckpoint(llama_folder)
    blocks = DecoderBlocks(checkpoint.config, checkpoint.read, compute="bf16")
    head, outputs = blocks.head(), noisy(problem.targets)
    found = NextHead(blocks, head).loss(outputs, problem.targets, ALL, fast=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted: Tensor = ahead_room._MeanDivergence.apply(outputs, problem.targets, head)
    assert torch.equal(found, wanted)
    assert torch.equal(torch.autograd.grad(found, outputs)[0], torch.autograd.grad(wanted, outputs)[0])
    exact = NextHead(blocks, head).loss(outputs, problem.targets, ALL, fast=False)
    assert not torch.equal(found, exact)


def whole_divergence(head: Head, outputs: Tensor, targets: Tensor) -> Tensor:
    """The textbook's formula over all logits at once, in float64."""

    def probabilities(hidden: Tensor) -> Tensor:
        logits = nn.functional.linear(head.norm(hidden), head.weight).double() / head.scales.logits
        if head.scales.logits_cap is not None:
            logits = head.scales.logits_cap * torch.tanh(logits / head.scales.logits_cap)
        return logits.softmax(-1)

    reference = probabilities(targets).detach()
    divergence: Tensor = (reference * (reference / probabilities(outputs)).log()).sum(-1).mean()
    return divergence.float()


def test_without_gradients_nothing_is_kept_for_them(llama_folder: Path) -> None:
    problem = problem_of(llama_folder, settings())
    with torch.no_grad():
        loss = NextHead(problem.blocks, problem.blocks.head()).loss(
            noisy(problem.targets), problem.targets, ALL, fast=False
        )
    assert loss.item() > 0
    assert not loss.requires_grad


def test_tokens_count_alike_and_zeros_do_not_divide() -> None:
    wanted = torch.tensor([[[3.0, 4.0]], [[300.0, 400.0]], [[0.0, 0.0]]])
    found = wanted * torch.tensor([1.1, 1.3, 1.0])[:, None, None]
    assert relative_error(found, wanted).item() == pytest.approx((0.01 + 0.09) / 3, rel=1e-3)


def test_tuning_lowers_what_is_left_further_on(llama_folder: Path) -> None:
    problem = with_next_block(llama_folder)
    chosen = settings(lookahead=1)
    layers = layers_of(problem, grid_for("w2g32"))
    outcome = tune_block(problem, layers, chosen, descent_for("signround", chosen.start), lambda *_: None)
    assert problem.ahead is not None
    held_out = ALL[-4:]

    def left(weights: dict[str, Tensor]) -> float:
        assert problem.ahead is not None
        outputs, targets = problem.outputs(weights, held_out, fast=False)
        return problem.ahead.loss(outputs, targets, held_out, fast=False).item()

    start = {name: layer.frozen().decode() for name, layer in layers_of(problem, grid_for("w2g32")).items()}
    assert left(decoded(outcome.tensors)) < 0.97 * left(start)


def test_who_looks_ahead() -> None:
    assert settings_for("signround", "default", context=64).lookahead == 1
    assert settings_for("signround", "best", context=64).lookahead == 1
    assert settings_for("signround", "fast", context=64).lookahead == 0
    assert settings_for("signround", "default", context=64, experts=True).lookahead == 0
    assert settings_for("signround-400", "default", context=64).lookahead == 0
    assert settings_for("rtn", "default", context=64).lookahead == 0
