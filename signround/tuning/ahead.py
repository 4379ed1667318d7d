"""What an error of one block does further on: the next block, in float, or the head after the last one.

A block tuned for its own output alone spends its rounding on errors that nobody reads: the next block norms the hidden
state first, and has directions that it does not look at. So the loss of a block may add the error that is left behind
the block that follows it (or, for the last one, how far the next-token distribution moves). The following weights are
those of the source and do not learn. docs/decisions.md has what this gains.
Related: cross-block reconstruction, CBQ (arXiv 2312.07950), where both blocks learn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from signround.blocks import DecoderBlocks, Head

LOGIT_BYTES = 64 << 20  # of float32 logits at once: vocabularies of 250,000 are common
TINY = 1e-12  # a hidden state may be zero


class Ahead(Protocol):
    """What lies behind the block that is being tuned."""

    def loss(self, outputs: Tensor, targets: Tensor, picks: Tensor, *, fast: bool) -> Tensor:
        """Scalar, with gradients to `outputs` [windows, tokens, hidden], the outputs of the tuned block on the samples
        `picks`; `targets` are those of the float block."""
        ...


@dataclass(frozen=True)
class NextBlock:
    """The block that follows, with the weights of the source; `targets` [samples, tokens, hidden] are its outputs in
    the float chain, wherever they lie."""

    blocks: DecoderBlocks
    block: nn.Module
    index: int
    targets: Tensor

    def loss(self, outputs: Tensor, targets: Tensor, picks: Tensor, *, fast: bool) -> Tensor:
        """`relative_error` behind this block; see `Ahead`."""
        found = self.blocks.run(self.block, outputs, self.index, fast=fast)
        wanted = self.targets[picks.to(self.targets.device)].to(found.device, torch.float32, non_blocking=True)
        return relative_error(found, wanted)


@dataclass(frozen=True)
class NextHead:
    """The final norm and the head, in float."""

    blocks: DecoderBlocks
    head: Head

    def loss(self, outputs: Tensor, targets: Tensor, picks: Tensor, *, fast: bool) -> Tensor:
        """Mean KL divergence of the next-token distributions, in nats; see `Ahead`."""
        with self.blocks.products(fast=fast):
            mean: Tensor = _MeanDivergence.apply(outputs, targets, _for_products(self.head))  # type: ignore[no-untyped-call]
            return mean


def _for_products(head: Head) -> Head:
    """The head with its weight in the dtype of products: autocast would convert all of it for every slice of tokens."""
    kind = head.weight.device.type
    if not torch.is_autocast_enabled(kind):
        return head
    return replace(head, weight=head.weight.to(torch.get_autocast_dtype(kind)))


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of |found - wanted|^2 / |wanted|^2. Blocks norm what they read, so tokens count alike: without
    this, the few tokens with huge hidden states decide."""
    errors = (found - wanted).square().mean(-1)
    return (errors / (wanted.square().mean(-1) + TINY)).mean()


class _MeanDivergence(torch.autograd.Function):
    """Forward and backward in one go over slices of tokens, so that no more than LOGIT_BYTES of logits exist."""

    @staticmethod
    def forward(context: Any, outputs: Tensor, targets: Tensor, head: Head) -> Tensor:
        count = outputs[..., 0].numel()
        size = max(1, LOGIT_BYTES // (head.weight.shape[0] * 4))
        total = outputs.new_zeros(())
        gradients: list[Tensor] = []
        parts = zip(torch.split(outputs.flatten(0, -2), size), torch.split(targets.flatten(0, -2), size), strict=True)
        for values, wanted in parts:
            with torch.enable_grad():
                part = values.detach().requires_grad_(context.needs_input_grad[0])
                divergence = _divergence(head, part, wanted) / count
            total += divergence.detach()
            if context.needs_input_grad[0]:
                gradients += torch.autograd.grad(divergence, part)
        context.gradient = torch.cat(gradients).view_as(outputs) if gradients else None
        return total

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return context.gradient * upstream[0], None, None


def _divergence(head: Head, hidden: Tensor, wanted: Tensor) -> Tensor:
    """Sum over tokens of KL(wanted | hidden)."""
    with torch.no_grad():
        reference = torch.log_softmax(head.logits(wanted).float(), -1)
    found = torch.log_softmax(head.logits(hidden).float(), -1)
    return nn.functional.kl_div(found, reference, reduction="sum", log_target=True)
