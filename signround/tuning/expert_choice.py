"""Which rounding each expert keeps, judged on the held-out samples without running the block again.

A block of our mixtures ends in `hidden + sum of score * expert(hidden')`, and no expert changes what another one sees.
So exchanging one expert moves the block's output by score * (new expert - old expert), at the tokens that were routed
to it and nowhere else. One pass records the router's choice and how far the output is off; a trial then costs one
expert's own tokens. With 128 experts, two trials each on the whole block would cost nearly as much as the tuning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from signround.experts import RoutedExperts, module_name
from signround.qtensor import QuantizedTensor
from signround.tuning.problem import BlockProblem

Candidates = Mapping[str, Mapping[str, QuantizedTensor]]


def choose_experts(
    problem: BlockProblem,
    units: Iterable[Sequence[str]],
    candidates: Candidates,
    weights: dict[str, Tensor],
    batch: int,
) -> dict[str, str]:
    """The choice ("start" or "rounded") of each weight of an expert that is better off without its tuning.

    `units` are the weights of one expert each; `weights` are those of the block now, and are updated.
    """
    chosen: dict[str, str] = {}
    with torch.no_grad():
        judge = _Judge(problem, weights, batch)
        for names in units:
            for choice in ("start", "rounded"):
                trial = {name: candidates[name][choice].decode().to(problem.device) for name in names}
                if judge.accepts({name: weights[name] for name in names}, trial):
                    weights |= trial
                    chosen |= dict.fromkeys(names, choice)
    return chosen


class _Judge:
    """What the held-out samples were routed to, and `errors` [tokens, hidden]: block outputs less their targets."""

    def __init__(self, problem: BlockProblem, weights: dict[str, Tensor], batch: int) -> None:
        self.experts = next(module for module in problem.block.modules() if isinstance(module, RoutedExperts))
        routed: list[tuple[Tensor, Tensor, Tensor]] = []

        def note(_: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
            routed.append(arguments)

        hook = self.experts.register_forward_pre_hook(note)
        try:
            runs = [problem.outputs(weights, picks, fast=False) for picks in problem.held_out_batches(batch)]
        finally:
            hook.remove()
        self.errors = torch.cat([(outputs - targets).flatten(0, -2) for outputs, targets in runs])
        self.hidden, self.chosen, self.scores = (torch.cat(parts) for parts in zip(*routed, strict=True))

    def accepts(self, current: Mapping[str, Tensor], trial: Mapping[str, Tensor]) -> bool:
        """Whether the expert with weights `trial` leaves less error than with `current`; if so, it is in place."""
        expert = int(module_name(next(iter(trial))).partition(".experts.")[2].partition(".")[0])
        tokens, place = (self.chosen == expert).nonzero(as_tuple=True)
        moved = self._output(expert, tokens, trial) - self._output(expert, tokens, current)
        moved = self.errors[tokens] + self.scores[tokens, place, None] * moved
        better = bool(moved.double().square().sum() < self.errors[tokens].double().square().sum())
        if better:
            self.errors[tokens] = moved
        return better

    def _output(self, expert: int, tokens: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        own = {module_name(name).partition(f".experts.{expert}.")[2]: weight for name, weight in weights.items()}
        result: Tensor = torch.func.functional_call(self.experts[expert], own, (self.hidden[tokens],))
        return result
