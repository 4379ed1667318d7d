"""A block to tune, for the tests of this folder: the first block of a small model and a few windows of noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from signround.blocks import DecoderBlocks
from signround.checkpoint import SourceCheckpoint
from signround.grid import Grid
from signround.recipes import TuningSettings, settings_for
from signround.tuning.layer import TunedLayer
from signround.tuning.problem import BlockProblem
from signround.tuning.start import plain_start

LINEAR = "mlp.down_proj.weight"


def settings(method: str = "signround", **changes: Any) -> TuningSettings:
    """16 samples of 16 tokens, 4 held out, 20 steps of 4."""
    chosen = settings_for(method, context=64, samples=16, seqlen=16, iters=20, batch_size=4)
    return replace(chosen, compute="fp32", held_out=4, **changes)


def problem_of(folder: Path, chosen: TuningSettings, index: int = 0) -> BlockProblem:
    checkpoint = SourceCheckpoint(folder)
    blocks = DecoderBlocks(checkpoint.config, checkpoint.read)
    tokens = torch.randint(3, 512, (chosen.samples, chosen.seqlen), generator=torch.Generator().manual_seed(1))
    inputs = blocks.embed(tokens)
    block = blocks.block(index)
    targets = inputs.clone()
    blocks.run_all(block, targets, index)
    return BlockProblem(blocks, block, index, inputs, targets, chosen.held_out)


def layers_of(problem: BlockProblem, grid: Grid) -> dict[str, TunedLayer]:
    """Every linear of the block at its plain range."""
    prefix = f"model.layers.{problem.index}."
    names = [name.removeprefix(prefix) for name in problem.blocks.architecture.block_linears(problem.index)]
    weights = {name: problem.block.get_parameter(name) for name in names}
    return {name: TunedLayer(grid, weight, plain_start(grid, weight)) for name, weight in weights.items()}


def decoded(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.decode() for name, tensor in tensors.items()}
