"""What lies outside the blocks: the embedding, quantised before the first block, and the head, after the last.

Importances come from the float chain; an embedding that is only looked up has none, each of its rows stands alone. A
head of its own is tuned like a block, against the logits of the float chain: their squared error is a sum over rows of
the head, so it is tuned in slices of rows that are no larger than a block. Rows do not know of each other; a slice only
chooses the step that it keeps. A tied head is searched, not tuned: as an embedding it has a second use that logits do
not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from signround.grid import Grid
from signround.plan import LayerPlan
from signround.qtensor import QuantizedTensor
from signround.recipes import TuningSettings
from signround.tuning.layer import TunedLayer
from signround.tuning.loop import tune_block
from signround.tuning.rtn import rounded
from signround.tuning.signround import SignDescent
from signround.tuning.start import searched_start

SLICE_WEIGHTS = 1 << 22  # of an embedding that is rounded or searched
HEAD_INDEX = 99_991  # where blocks have their number: it decides the order of samples
WEIGHT = "weight"


@dataclass(frozen=True)
class HeadProblem:
    """Some rows of the head to fit: `inputs` and `references` [samples, tokens, hidden] are the normed outputs of the
    quantised and of the float chain, the last `held_out` samples kept back; `weight` float32 [rows, hidden]."""

    inputs: Tensor
    references: Tensor
    weight: Tensor
    held_out: int
    index: int = HEAD_INDEX

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def original(self, name: str) -> Tensor:
        """See `problem.Problem`."""
        assert name == WEIGHT
        return self.weight

    def loss(self, weights: dict[str, Tensor], picks: Tensor, *, fast: bool) -> Tensor:
        """Mean squared error of the logits on the samples `picks`."""
        where = picks.to(self.inputs.device)
        inputs = self.inputs[where].to(self.device, torch.float32)
        references = self.references[where].to(self.device, torch.float32)
        targets = nn.functional.linear(references, self.weight)
        return nn.functional.mse_loss(nn.functional.linear(inputs, weights[WEIGHT]), targets)

    def held_out_loss(self, weights: dict[str, Tensor], batch: int) -> Tensor:
        """The same on the held-out samples, without gradients."""
        samples = torch.arange(len(self.inputs) - self.held_out, len(self.inputs))
        with torch.no_grad():
            losses = [self.loss(weights, part, fast=False) * len(part) for part in torch.split(samples, batch)]
            return torch.stack(losses).sum() / self.held_out


def tuned_head(
    layer: LayerPlan,
    weight: Tensor,
    problem_of: Callable[[Tensor], HeadProblem],
    importance: Tensor,
    settings: TuningSettings,
    descent: SignDescent,
    slice_weights: int,
    on_step: Callable[[int, int], None],
) -> QuantizedTensor:
    """Tune `weight` [rows, columns] slice by slice; `problem_of` makes the problem of a slice of its rows."""
    rows = max(1, slice_weights // layer.columns)
    starts = range(0, layer.rows, rows)
    parts = []
    for done, start in enumerate(starts):
        problem = problem_of(weight[start : start + rows])
        tuned = TunedLayer(layer.grid, problem.weight, searched_start(layer.grid, problem.weight, importance))
        on_step(done, len(starts))
        parts.append(tune_block(problem, {WEIGHT: tuned}, settings, descent, lambda *_: None).tensors[WEIGHT])
    on_step(len(starts), len(starts))
    return joined(layer.grid, parts)


def quantized_in_slices(grid: Grid, weight: Tensor, importance: Tensor | None, device: torch.device) -> QuantizedTensor:
    """`weight` [rows, columns] of any float dtype, rounded from a searched start, or from its plain range without
    `importance` (float32 [columns]); a slice of rows at a time."""
    rows = max(1, SLICE_WEIGHTS // weight.shape[1])
    parts = []
    for part in torch.split(weight, rows):
        values = part.to(device, torch.float32)
        if importance is None:
            parts.append(rounded(grid, values))
        else:
            fields = searched_start(grid, values, importance.to(device)).fields(grid)
            parts.append(QuantizedTensor.from_grid(grid, values, fields))
    return joined(grid, parts)


def joined(grid: Grid, parts: Iterable[QuantizedTensor]) -> QuantizedTensor:
    """Slices of rows as one tensor."""
    slices = list(parts)
    fields = {name: torch.cat([part.fields[name] for part in slices]) for name in slices[0].fields}
    return QuantizedTensor(grid, torch.cat([part.codes for part in slices]), fields)
