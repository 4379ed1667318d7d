"""The loop over one block: sample, step, keep the best on a fixed held-out subset, fall back to rounding.

Nothing in the step loop waits for the device: the best parameters are kept by `where`, and losses are read afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from signround.experts import is_expert, unit_of
from signround.qtensor import QuantizedTensor
from signround.recipes import TuningSettings
from signround.tuning.expert_choice import choose_experts
from signround.tuning.layer import TunedLayer
from signround.tuning.problem import BlockProblem, Problem
from signround.tuning.rtn import rounded
from signround.tuning.signround import SignDescent

CHECKS = 10  # times that the held-out subset is looked at


@dataclass(frozen=True)
class BlockOutcome:
    """What a block ended as. `kept` says for each layer: tuned, start (untuned search) or rounded."""

    tensors: dict[str, QuantizedTensor]
    kept: dict[str, str]
    loss_rounded: float
    loss_tuned: float


def tune_block(
    problem: Problem,
    layers: Mapping[str, TunedLayer],
    settings: TuningSettings,
    descent: SignDescent,
    on_step: Callable[[int, int], None],
) -> BlockOutcome:
    """Tune `layers` (by their weight names within the block) and choose, layer by layer, the best candidate."""
    if not layers:  # all of the block is kept, by the user's word or because no token reached its experts
        unchanged = problem.held_out_loss({}, settings.batch_size).item()
        return BlockOutcome({}, {}, unchanged, unchanged)
    tuned = list(layers.values())
    parameters = descent.parameters(tuned)
    start = {name: layer.frozen() for name, layer in layers.items()}
    best, best_loss = [parameter.detach().clone() for parameter in parameters], None
    checks = {round(settings.iters * check / CHECKS) for check in range(CHECKS + 1)}
    picks = _batches(settings, problem.index)
    for step in range(settings.iters + 1):
        if step in checks:
            loss = _held_out(problem, layers, settings)
            if best_loss is None:
                best_loss = loss
            else:
                better = loss < best_loss
                best_loss = torch.where(better, loss, best_loss)
                for kept, parameter in zip(best, parameters, strict=True):
                    torch.where(better, parameter.detach(), kept, out=kept)
            on_step(step, settings.iters)
        if step == settings.iters:
            break
        weights = {name: layer.fake_quantized() for name, layer in layers.items()}
        # An expert that no token of this batch is routed to has no part in the loss: its gradient is zero, it stays.
        gradients = torch.autograd.grad(
            problem.loss(weights, picks[step], fast=True), parameters, allow_unused=True, materialize_grads=True
        )
        descent.step(tuned, gradients, settings.learning_rate * (1 - step / settings.iters))
    with torch.no_grad():
        for parameter, kept in zip(parameters, best, strict=True):
            parameter.copy_(kept)
    candidates = {
        name: {
            "tuned": layer.frozen(),
            "start": start[name],
            "rounded": rounded(layer.grid, problem.original(name)),
        }
        for name, layer in layers.items()
    }
    return _best_of(problem, candidates, settings)


def _held_out(problem: Problem, layers: Mapping[str, TunedLayer], settings: TuningSettings) -> Tensor:
    with torch.no_grad():
        weights = {name: layer.fake_quantized() for name, layer in layers.items()}
    return problem.held_out_loss(weights, settings.batch_size)


def _batches(settings: TuningSettings, block: int) -> Tensor:
    """int64 [iters, batch] samples to train on; drawn from (seed, block) alone, as a resumed run must."""
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + block)
    training = settings.samples - settings.held_out
    draws = settings.iters * settings.batch_size
    rounds = [torch.randperm(training, generator=generator) for _ in range(-(-draws // training))]
    return torch.cat(rounds)[:draws].view(settings.iters, settings.batch_size)


def _best_of(
    problem: Problem, candidates: Mapping[str, Mapping[str, QuantizedTensor]], settings: TuningSettings
) -> BlockOutcome:
    """Start from all tuned; replace a layer wherever another candidate lowers the held-out loss of the block, and then
    the three layers of an expert together."""
    device = problem.device

    def loss_of(weights: dict[str, Tensor]) -> float:
        return problem.held_out_loss(weights, settings.batch_size).item()

    def decoded(choice: str) -> dict[str, Tensor]:
        return {name: options[choice].decode().to(device) for name, options in candidates.items()}

    experts: dict[str, list[str]] = {}
    for name in filter(is_expert, candidates):
        experts.setdefault(unit_of(name), []).append(name)
    loss_rounded = loss_of(decoded("rounded"))
    chosen = dict.fromkeys(candidates, "tuned")
    weights = decoded("tuned")
    lowest = loss_of(weights)
    for name, options in candidates.items():
        for choice in () if is_expert(name) else ("start", "rounded"):
            trial = weights | {name: options[choice].decode().to(device)}
            loss = loss_of(trial)
            if loss < lowest:
                lowest, weights, chosen[name] = loss, trial, choice
    if experts:
        assert isinstance(problem, BlockProblem)
        chosen |= choose_experts(problem, experts.values(), candidates, weights, settings.batch_size)
        lowest = loss_of(weights)
    tensors = {name: options[chosen[name]] for name, options in candidates.items()}
    if loss_rounded < lowest:  # greedy replacement may miss that plain rounding of everything is best
        return BlockOutcome(
            {name: options["rounded"] for name, options in candidates.items()},
            dict.fromkeys(candidates, "rounded"),
            loss_rounded,
            loss_rounded,
        )
    return BlockOutcome(tensors, chosen, loss_rounded, lowest)
