"""The reference runtime: transformers' own blocks in float32, one at a time, from a checkpoint or an artifact.

This is "the tuned model in float" that every file is compared with. Memory is one block plus the hidden states of the
windows at hand; large texts are run in passes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from signround.artifact import QuantizedCheckpoint
from signround.blocks import DecoderBlocks
from signround.checkpoint import SourceCheckpoint
from signround.plan import ModelPlan
from signround.runtimes.protocol import Speed
from signround.tuning.rtn import rounded

HIDDEN_BYTES = 1 << 30  # hidden states in memory at once
LOGIT_BYTES = 256 << 20  # logits in memory at once


class TorchBlocks:
    """A `Runtime` (runtimes/protocol.py) over `DecoderBlocks`."""

    affordable_positions: int | None = None

    def __init__(self, name: str, blocks: DecoderBlocks) -> None:
        self.name = name
        self.blocks = blocks
        self.vocabulary = blocks.architecture.vocabulary

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """float32 logits on the model's device, [n, tokens, vocabulary] a batch."""
        tokens = windows.shape[1]
        per_pass = max(1, HIDDEN_BYTES // (tokens * self.blocks.architecture.hidden * 4))
        per_batch = max(1, LOGIT_BYTES // (tokens * self.vocabulary * 4))
        for first in range(0, len(windows), per_pass):
            part = windows[first : first + per_pass]
            hidden = self.blocks.embed(part).to(self.blocks.device)
            for index in range(self.blocks.architecture.layers):
                self.blocks.run_all(self.blocks.block(index), hidden, index)
            head = self.blocks.head()
            for start in range(0, len(hidden), per_batch):
                yield head(hidden[start : start + per_batch])

    def speed(self, prompt: int = 128, new: int = 16) -> Speed | None:
        """None: this is the reference, one block at a time and without a cache."""
        return None

    def close(self) -> None:
        """Nothing is held between calls."""


def float_model(checkpoint: SourceCheckpoint, device: str = "cpu") -> TorchBlocks:
    """The source model before quantisation."""
    return TorchBlocks("transformers, float32", DecoderBlocks(checkpoint.config, checkpoint.read, device))


def tuned_model(artifact: QuantizedCheckpoint, device: str = "cpu") -> TorchBlocks:
    """The tuned model, decoded from its integers."""
    name = f"transformers, float32, decoded {artifact.plan.scheme}"
    return TorchBlocks(name, DecoderBlocks(artifact.plan.config, artifact.weight, device))


def rounded_model(checkpoint: SourceCheckpoint, plan: ModelPlan, device: str = "cpu") -> TorchBlocks:
    """The source model rounded to nearest in the plan's grids: the baseline that tuning must beat."""
    grids = {layer.name: layer.grid for layer in plan.layers()}

    def read(name: str) -> Tensor:
        weight = checkpoint.read(name)
        return rounded(grids[name], weight.float()).decode() if name in grids else weight

    return TorchBlocks(f"transformers, float32, rounded {plan.scheme}", DecoderBlocks(plan.config, read, device))
