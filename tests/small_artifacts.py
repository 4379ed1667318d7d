"""Artifacts without tuning: every linear rounded to nearest (with optional random flips), for exporter tests."""

from __future__ import annotations

from pathlib import Path

import torch

from signround.artifact import ArtifactWriter, BlockRecord, QuantizedCheckpoint
from signround.checkpoint import SourceCheckpoint
from signround.file_types import Overrides
from signround.grid import Grid, grouped
from signround.plan import CalibrationSpec, make_plan
from signround.qtensor import QuantizedTensor
from signround.recipes import settings_for


def rounded_tensor(weight: torch.Tensor, grid: Grid, flips: torch.Generator | None = None) -> QuantizedTensor:
    """Round to nearest; with `flips`, add uniform offsets V in [-1, 1] so that codes differ from plain rounding, as
    tuned ones do, and a writer that rounds again is caught."""
    blocks = grouped(weight.float(), grid.group_of(weight.shape[1]))
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    fields = grid.snap(*grid.fit(low, high))
    offset = 2 * torch.rand(blocks.shape, generator=flips) - 1 if flips else 0.0
    return QuantizedTensor.from_grid(grid, weight, fields, offset)


def write_rounded_artifact(
    model: Path, folder: Path, scheme: str, zero_floor: int = 0, *, mixes: bool = False, overrides: Overrides = ()
) -> QuantizedCheckpoint:
    """The artifact of `model` (a Hugging Face folder) rounded to `scheme` with random flips; `mixes` and
    `overrides` as in the plan."""
    checkpoint = SourceCheckpoint(model)
    tuning = settings_for("rtn", context=64, samples=2, seqlen=16)
    plan = make_plan(checkpoint, scheme, tuning, CalibrationSpec("self"), zero_floor, mixes=mixes, overrides=overrides)
    writer = ArtifactWriter(folder, plan, checkpoint.files)
    flips = torch.Generator().manual_seed(7)
    for kept in plan.outer:
        writer.commit_outer(kept.name, checkpoint.read(kept.name))
    for layer in plan.outer_layers:
        writer.commit_outer_layer(layer.name, rounded_tensor(checkpoint.read(layer.name), layer.grid, flips), None)
    for block in plan.blocks:
        quantized = {
            layer.name: rounded_tensor(checkpoint.read(layer.name), layer.grid, flips) for layer in block.layers
        }
        kept_tensors = {kept.name: checkpoint.read(kept.name) for kept in block.kept}
        writer.commit_block(block.index, quantized, kept_tensors, BlockRecord(block.index, 0.0, 1.0, 1.0, {}, 0, 0), {})
    finished = writer.finish()
    writer.close()
    return finished
