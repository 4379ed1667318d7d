"""The plan: which tensor gets which grid, what is kept and why. Made before any work; JSON; fingerprinted.

`ModelPlan.identity` is what decides the artifact's bytes; its hash is the fingerprint that a resumed run must match.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from signround.architecture import BLOCK, EMBEDDING, HEAD, Architecture, read_architecture
from signround.assignment import Assignment, assigned
from signround.checkpoint import SourceCheckpoint
from signround.errors import Refusal, RefusedError
from signround.file_types import Overrides
from signround.files import sha256_of_json
from signround.grid import Grid
from signround.recipes import TuningSettings

PLAN_VERSION = 2


@dataclass(frozen=True)
class LayerPlan:
    """One linear: weight name, shape [rows = out_features, columns = in_features], its grid and the reason for it."""

    name: str
    rows: int
    columns: int
    grid: Grid
    reason: str


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that goes through unchanged, in its own dtype (a torch name: bfloat16, float16, float32)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[self.dtype]


@dataclass(frozen=True)
class BlockPlan:
    """One decoder block."""

    index: int
    layers: tuple[LayerPlan, ...]
    kept: tuple[KeptTensor, ...]


@dataclass(frozen=True)
class CalibrationSpec:
    """Where the calibration tokens come from: `source` is "self", "hub:NAME" or "file"; `sha256` names the file's
    bytes ("" for self and hub), so that a moved file is the same calibration and an edited one is not."""

    source: str
    sha256: str = ""


@dataclass(frozen=True)
class ModelPlan:
    """The whole job on one model.

    `scheme` is what the user asked for, `file_type` the mix of llama.cpp that it stands for ("" when it is one grid;
    `mixes.FILE_TYPES`). `outer` and `outer_layers` are the tensors outside the blocks: kept ones, and those that a file
    type quantises (embedding, head). `imatrix_sha256` names the importance matrix that the user gave ("" when it is
    measured). `files` is the folder that holds config.json and the tokenizer files.
    """

    model: str
    source_sha256: str
    parameters: int
    scheme: str
    file_type: str
    config: Mapping[str, Any]
    blocks: tuple[BlockPlan, ...]
    outer: tuple[KeptTensor, ...]
    outer_layers: tuple[LayerPlan, ...]
    skipped: Mapping[str, str]
    tuning: TuningSettings
    calibration: CalibrationSpec
    imatrix_sha256: str
    files: Path

    @cached_property
    def architecture(self) -> Architecture:
        return read_architecture(self.config)

    def layers(self) -> Iterator[LayerPlan]:
        """Every quantised matrix: those outside the blocks, then block by block."""
        yield from self.outer_layers
        for block in self.blocks:
            yield from block.layers

    def products(self) -> Iterator[LayerPlan]:
        """Every quantised matrix that activations are multiplied with: all but an embedding that is only looked up."""
        return (layer for layer in self.layers() if layer.name != EMBEDDING or self.architecture.tied)

    def kept(self) -> Iterator[KeptTensor]:
        """Every tensor that stays as it is: outer tensors, then block by block."""
        yield from self.outer
        for block in self.blocks:
            yield from block.kept

    def bits_per_weight(self) -> float:
        """Average stored bits over the quantised matrices."""
        weights = sum(layer.rows * layer.columns for layer in self.layers())
        bits = sum(layer.rows * layer.columns * layer.grid.bits_per_weight(layer.columns) for layer in self.layers())
        return bits / weights

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the artifact's bytes, as JSON values."""
        data = dataclasses.asdict(self)
        for transient in ("model", "files"):
            data.pop(transient)
        return {"plan_version": PLAN_VERSION, **_plain(data)}

    @property
    def fingerprint(self) -> str:
        return sha256_of_json(self.identity)

    @staticmethod
    def from_json(data: Mapping[str, Any], model: str, files: Path) -> ModelPlan:
        """Inverse of `identity`. Raises ValueError for a plan of another version."""
        if data.get("plan_version") != PLAN_VERSION:
            raise ValueError(f"plan version {data.get('plan_version')!r}, this release reads {PLAN_VERSION}")
        return ModelPlan(
            model=model,
            source_sha256=data["source_sha256"],
            parameters=data["parameters"],
            scheme=data["scheme"],
            file_type=data["file_type"],
            config=data["config"],
            blocks=tuple(
                BlockPlan(
                    index=block["index"],
                    layers=tuple(_layer(entry) for entry in block["layers"]),
                    kept=tuple(_kept(entry) for entry in block["kept"]),
                )
                for block in data["blocks"]
            ),
            outer=tuple(_kept(entry) for entry in data["outer"]),
            outer_layers=tuple(_layer(entry) for entry in data["outer_layers"]),
            skipped=data["skipped"],
            tuning=TuningSettings(**data["tuning"]),
            calibration=CalibrationSpec(**data["calibration"]),
            imatrix_sha256=data["imatrix_sha256"],
            files=files,
        )


def _layer(entry: Mapping[str, Any]) -> LayerPlan:
    return LayerPlan(**{**entry, "grid": Grid.from_json(entry["grid"])})


def _kept(entry: Mapping[str, Any]) -> KeptTensor:
    return KeptTensor(entry["name"], tuple(entry["shape"]), entry["dtype"], entry["reason"])


def _plain(value: Any) -> Any:
    """Tuples to lists, mappings to dicts: exactly what json would give back."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def make_plan(
    checkpoint: SourceCheckpoint,
    scheme: str,
    tuning: TuningSettings,
    calibration: CalibrationSpec,
    zero_floor: int = 0,
    *,
    mixes: bool = False,
    overrides: Overrides = (),
    imatrix_sha256: str = "",
) -> ModelPlan:
    """Match the checkpoint against its architecture, tensor by tensor, and give every matrix its grid.

    `zero_floor` is the highest lowest zero point among the wanted exporters; `mixes` and `overrides` as in
    `assignment.assigned`. Raises RefusedError with every missing, unknown or misshapen tensor.
    """
    architecture = read_architecture(checkpoint.config)
    importance = bool(imatrix_sha256) or tuning.start == "search"
    types = assigned(scheme, architecture, zero_floor, mixes=mixes, overrides=overrides, importance=importance)
    blocks = tuple(
        BlockPlan(
            index,
            _layers(types, architecture.block_linears(index)),
            _kept_tensors(checkpoint, types, architecture.block_linears(index) | architecture.block_kept(index)),
        )
        for index in range(architecture.layers)
    )
    outer = architecture.outer()
    if not any(grid.direct for name, (grid, _) in types.grids.items() if name != EMBEDDING):
        tuning = replace(tuning, scale_iters=0, scale_rate=0.0)  # there is nothing that those steps could move
    plan = ModelPlan(
        model=checkpoint.folder.resolve().name,
        source_sha256=checkpoint.sha256,
        parameters=checkpoint.parameters,
        scheme=scheme.lower(),
        file_type=types.file_type,
        config=checkpoint.config,
        blocks=blocks,
        outer=_kept_tensors(checkpoint, types, outer),
        outer_layers=_layers(types, {name: (shape[0], shape[-1]) for name, shape in outer.items()}),
        skipped=_skipped(checkpoint, architecture),
        tuning=tuning,
        calibration=calibration,
        imatrix_sha256=imatrix_sha256,
        files=checkpoint.folder,
    )
    refusals = _mismatches(checkpoint, plan) + _cut_super_blocks(plan)
    if refusals:
        raise RefusedError(refusals)
    return plan


def _layers(types: Assignment, shapes: Mapping[str, tuple[int, int]]) -> tuple[LayerPlan, ...]:
    """Plans of those matrices in `shapes` that are quantised."""
    layers = []
    for name, (rows, columns) in shapes.items():
        if name in types.grids:
            grid, reason = types.grids[name]
            layers.append(LayerPlan(name, rows, columns, grid, reason + _ragged_note(grid, columns)))
    return tuple(layers)


def _kept_tensors(
    checkpoint: SourceCheckpoint, types: Assignment, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[KeptTensor, ...]:
    """Plans of those tensors in `shapes` that are not."""
    return tuple(
        _keep(checkpoint, name, shape, types.floats.get(name))
        for name, shape in shapes.items()
        if name not in types.grids
    )


def _ragged_note(grid: Grid, columns: int) -> str:
    if not grid.ragged(columns):
        return ""
    return f"; last group of each row holds {columns % grid.group_of(columns)} of {grid.group_of(columns)} inputs"


def _keep(checkpoint: SourceCheckpoint, name: str, shape: tuple[int, ...], chosen: str | None) -> KeptTensor:
    info = checkpoint.tensors.get(name)
    dtype = str(info.dtype).removeprefix("torch.") if info else "missing"
    if chosen is not None:
        reason = chosen
    elif name.endswith(".bias"):
        reason = "biases are not quantised"
    elif "norm" in name:
        reason = "norms are not quantised"
    elif name in (EMBEDDING, HEAD):
        reason = "embedding and head keep their precision unless --tensor-type names them"
    else:
        reason = "routers keep their precision: they decide which experts run"
    return KeptTensor(name, shape, dtype, reason)


def _cut_super_blocks(plan: ModelPlan) -> list[Refusal]:
    """One refusal a row length; file types never cut one, their fallbacks see to it."""
    cut = {
        layer.columns: layer for layer in plan.layers() if layer.grid.super_block and layer.grid.ragged(layer.columns)
    }
    return [
        Refusal(
            f"rows of {columns} weights are no whole number of super-blocks of 256, which {layer.name} would need",
            "choose a file type such as q4_k_m with --to gguf alone (it falls back as llama.cpp does), or w4g32",
            "--tensor-type" if "--tensor-type" in layer.reason else "--scheme",
        )
        for columns, layer in sorted(cut.items())
    ]


def _skipped(checkpoint: SourceCheckpoint, architecture: Architecture) -> dict[str, str]:
    skipped = {
        name: "positions are computed from config.json"
        for name in checkpoint.tensors
        if name.endswith("rotary_emb.inv_freq")
    }
    if architecture.tied and HEAD in checkpoint.tensors:
        skipped[HEAD] = "tied: the head is the embedding (tie_word_embeddings)"
    return skipped


def _mismatches(checkpoint: SourceCheckpoint, plan: ModelPlan) -> list[Refusal]:
    wanted: dict[str, tuple[int, ...]] = {layer.name: (layer.rows, layer.columns) for layer in plan.layers()}
    wanted |= {kept.name: kept.shape for kept in plan.kept()}
    refusals = []
    for name, shape in wanted.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            problem = f"the tensor is missing, {plan.architecture.family.hf_class} needs it"
        elif info.shape != shape:
            problem = f"shape is {list(info.shape)}, config.json says {list(shape)}"
        else:
            continue
        refusals.append(Refusal(problem, "download the checkpoint again", name))
    blocks = BLOCK.format(plan.architecture.layers)
    for name in sorted(checkpoint.tensors.keys() - wanted.keys() - plan.skipped.keys()):
        hint = f" (config.json says {plan.architecture.layers} blocks)" if name.startswith(blocks) else ""
        refusals.append(
            Refusal(
                f"a tensor that {plan.architecture.family.hf_class} does not have{hint}",
                "check that config.json and weights belong together",
                name,
            )
        )
    return refusals
