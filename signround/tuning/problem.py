"""What the loop fits: layers by name, and how far their outputs are off. A decoder block is the usual problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from signround.blocks import DecoderBlocks
from signround.tuning.ahead import Ahead, relative_error


class Problem(Protocol):
    """Something to fit: layers by name, and how far their outputs are off."""

    @property
    def index(self) -> int:
        """Decides, with the seed, the order of samples."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the layers are tuned."""
        ...

    def original(self, name: str) -> Tensor:
        """The float32 weight of a layer."""
        ...

    def loss(self, weights: dict[str, Tensor], picks: Tensor, *, fast: bool) -> Tensor:
        """Loss with these weights on the samples `picks` (int64, on the CPU); `fast` for steps, not for judging."""
        ...

    def held_out_loss(self, weights: dict[str, Tensor], batch: int) -> Tensor:
        """Loss on the samples that are not trained on, `batch` at a time, without gradients."""
        ...


@dataclass(frozen=True)
class BlockProblem:
    """One block to fit: `inputs` and `targets` [samples, tokens, hidden], the last `held_out` samples kept back.
    `ahead` is what follows, where its errors count too."""

    blocks: DecoderBlocks
    block: nn.Module
    index: int
    inputs: Tensor
    targets: Tensor
    held_out: int
    ahead: Ahead | None = None

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    def original(self, name: str) -> Tensor:
        """See `Problem`."""
        return self.blocks.parameter(self.block, name)

    def loss(self, weights: dict[str, Tensor], picks: Tensor, *, fast: bool) -> Tensor:
        """Mean squared error of the block's output on the samples `picks` (int64, on the CPU), as in the paper; with
        `ahead`, the mean relative squared error of a token there, and what becomes of it further on."""
        outputs, targets = self.outputs(weights, picks, fast=fast)
        if self.ahead is None:
            return nn.functional.mse_loss(outputs, targets)
        return relative_error(outputs, targets) + self.ahead.loss(outputs, targets, picks, fast=fast)

    def outputs(self, weights: dict[str, Tensor], picks: Tensor, *, fast: bool) -> tuple[Tensor, Tensor]:
        """The block's outputs on the samples `picks`, and their targets, [samples, tokens, hidden]."""
        device = self.blocks.device
        where = picks.to(self.inputs.device)
        inputs = self.inputs[where].to(device, torch.float32, non_blocking=True)
        targets = self.targets[where].to(device, torch.float32, non_blocking=True)
        return self.blocks.run(self.block, inputs, self.index, weights, fast=fast), targets

    def held_out_batches(self, batch: int) -> tuple[Tensor, ...]:
        """The samples that are kept back, `batch` at a time."""
        return torch.split(torch.arange(len(self.inputs) - self.held_out, len(self.inputs)), batch)

    def held_out_loss(self, weights: dict[str, Tensor], batch: int) -> Tensor:
        """The same on the held-out samples, in batches, without gradients."""
        with torch.no_grad():
            parts = self.held_out_batches(batch)
            losses = [self.loss(weights, picks, fast=False) * len(picks) for picks in parts]
            return torch.stack(losses).sum() / self.held_out
