"""The loop over one block: its rounding, then its scales. The step that is best on held-out samples is kept, and where
plain rounding beats it, layer by layer, plain rounding is.

Nothing in the step loop waits for the device: the best parameters are kept by `where`, and losses are read afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from signround.tuning.scales import ScaleDescent, ScaledLayer
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
    """Tune `layers` (by their weight names within the block), their rounding, then their scales, and choose, layer
    by layer, the best candidate. `on_step(done, total)` follows the steps."""
    if not layers:  # all of the block is kept, by the user's word or because no token reached its experts
        unchanged = problem.held_out_loss({}, settings.batch_size).item()
        return BlockOutcome({}, {}, unchanged, unchanged)
    start = {name: layer.frozen() for name, layer in layers.items()}
    picks, total = _batches(settings, problem.index), settings.iters + settings.scale_iters
    rounding, scales = torch.split(picks, [settings.iters, settings.scale_iters])
    _learn_rounding(problem, layers, settings, descent, rounding, lambda done: on_step(done, total))
    settled = {name: layer.frozen() for name, layer in layers.items()}
    learned = _learn_scales(problem, settled, settings, scales, lambda done: on_step(settings.iters + done, total))
    candidates = {
        name: {
            "tuned": learned[name],
            "start": start[name],
            "rounded": rounded(layer.grid, problem.original(name)),
        }
        for name, layer in layers.items()
    }
    return _best_of(problem, candidates, settings)


def _learn_rounding(
    problem: Problem,
    layers: Mapping[str, TunedLayer],
    settings: TuningSettings,
    descent: SignDescent,
    picks: Tensor,
    on_check: Callable[[int], None],
) -> None:
    tuned = list(layers.values())
    walk = _Walk(
        lambda: {name: layer.fake_quantized() for name, layer in layers.items()},
        descent.parameters(tuned),
        lambda gradients, left: descent.step(tuned, gradients, settings.learning_rate * left),
    )
    _descend(walk, problem, picks, settings.batch_size, on_check)


def _learn_scales(
    problem: Problem,
    tensors: dict[str, QuantizedTensor],
    settings: TuningSettings,
    picks: Tensor,
    on_check: Callable[[int], None],
) -> dict[str, QuantizedTensor]:
    if not len(picks) or not any(tensor.grid.direct for tensor in tensors.values()):
        return tensors
    layers = {name: ScaledLayer(tensor, problem.device) for name, tensor in tensors.items()}
    descent = ScaleDescent(list(layers.values()), settings.scale_rate)
    walk = _Walk(lambda: {name: layer.decoded() for name, layer in layers.items()}, descent.parameters, descent.step)
    _descend(walk, problem, picks, settings.batch_size, on_check)
    return {name: layer.frozen() for name, layer in layers.items()}


@dataclass(frozen=True)
class _Walk:
    """What descends: the weights of a block as they follow from `parameters`, and one step, given the gradients
    and the part of the way that is left (from 1 linearly to 0)."""

    weights: Callable[[], dict[str, Tensor]]
    parameters: Sequence[Tensor]
    step: Callable[[Sequence[Tensor], float], None]


def _descend(walk: _Walk, problem: Problem, picks: Tensor, batch: int, on_check: Callable[[int], None]) -> None:
    """One step for each row of `picks` (int64 [steps, batch]); the parameters end at the lowest held-out loss seen."""
    steps = len(picks)
    checks = {round(steps * check / CHECKS) for check in range(CHECKS + 1)}
    best, best_loss = [parameter.detach().clone() for parameter in walk.parameters], None
    for step in range(steps + 1):
        if step in checks:
            loss = _held_out(problem, walk, batch)
            if best_loss is None:
                best_loss = loss
            else:
                better = loss < best_loss
                best_loss = torch.where(better, loss, best_loss)
                for kept, parameter in zip(best, walk.parameters, strict=True):
                    torch.where(better, parameter.detach(), kept, out=kept)
            on_check(step)
        if step == steps:
            break
        # An expert that no token of this batch is routed to has no part in the loss: its gradient is zero, it stays.
        gradients = torch.autograd.grad(
            problem.loss(walk.weights(), picks[step], fast=True),
            walk.parameters,
            allow_unused=True,
            materialize_grads=True,
        )
        walk.step(gradients, 1 - step / steps)
    with torch.no_grad():
        for parameter, kept in zip(walk.parameters, best, strict=True):
            parameter.copy_(kept)


def _held_out(problem: Problem, walk: _Walk, batch: int) -> Tensor:
    with torch.no_grad():
        weights = walk.weights()
    return problem.held_out_loss(weights, batch)


def _batches(settings: TuningSettings, block: int) -> Tensor:
    """int64 [all steps, batch] samples to train on; drawn from (seed, block) alone, as a resumed run must."""
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + block)
    training = settings.samples - settings.held_out
    steps = settings.iters + settings.scale_iters
    draws = steps * settings.batch_size
    rounds = [torch.randperm(training, generator=generator) for _ in range(-(-draws // training))]
    return torch.cat(rounds)[:draws].view(steps, settings.batch_size)


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
