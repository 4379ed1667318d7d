"""GgufExporter: one .gguf file for llama.cpp, with the artifact's integers bit for bit.

Lays out bits only. Refuses at plan time, all reasons at once, what no ggml block holds exactly, tensors that llama.cpp
has no place for, and tokenizers that it would run otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters.gguf.container import GgufFile, write
from exporters.gguf.imatrix import imatrix_of, importance_of, read_imatrix, write_imatrix
from exporters.gguf.independent import independent_tensors
from exporters.gguf.layout import AUTO, FLOAT_TYPES, TYPE_BYTES
from exporters.gguf.metadata import FLOAT_TYPE, GRIDS, grids_of
from exporters.gguf.names import COMPUTED, added, checkpoint_names, checkpoint_shape, halved, is_router, rotated_heads
from exporters.gguf.naming import file_stem
from exporters.gguf.origins import ORIGINS, added_values, decoded, in_float32, origins_of, read_back
from exporters.gguf.packing import BlockType, block_type_for, obstacle, unpack
from exporters.gguf.pre_tokenizer import AUTO as AUTO_PRE
from exporters.gguf.route import FromPlan, Route
from exporters.gguf.splits import Part, size_in_bytes, split_problem
from exporters.gguf.template import Template
from exporters.gguf.writer import UNKNOWN
from signround.artifact import QuantizedCheckpoint
from signround.errors import FailedError, Refusal, UnavailableError, refuse
from signround.events import Listener, StageAdvanced, StageStarted
from signround.exporting import ExportedModel, missing_packages
from signround.files import PARTIAL, files_written_whole
from signround.gguf_names import checkpoint_name
from signround.grid import Grid
from signround.importance import Importance
from signround.plan import LayerPlan, ModelPlan
from signround.qtensor import QuantizedTensor
from signround.runtimes.gguf_files import is_version_of, model_files, part_name


@dataclass(frozen=True)
class GgufExporter:
    """`float_type`: dtype of unquantised matrices, one of auto (each its own), f32, f16, bf16. `pre`: llama.cpp's
    name of the tokenizer's splitting rule, auto to find it. `split_max_size`: no file larger than this (2G, 500M, 64K;
    decimal), empty for one file. `template`: a float .gguf of llama.cpp's converter whose names, metadata, tokenizer
    and unquantised tensors are taken over; `source`: the float checkpoint to compare it with, where an artifact alone
    is exported."""

    float_type: str = AUTO
    pre: str = AUTO_PRE
    split_max_size: str = ""
    template: str = ""
    source: str = ""

    @property
    def name(self) -> str:
        return "gguf"

    @property
    def zero_floor(self) -> int:
        return 0

    @property
    def file_types(self) -> bool:
        return True

    def holds(self, grid: Grid, columns: int) -> bool:
        """See `Exporter.holds`."""
        return obstacle(grid, columns) is None

    def more_exact(self, plan: ModelPlan) -> None:
        """llama.cpp rounds activations to 8 bits whatever the file says."""

    def refusals(self, plan: ModelPlan) -> list[Refusal]:
        """Grids without a block type (equal reasons over layers become one), options; the family and its tokenizer, or
        the template."""
        found = self._option_refusals() + _grid_refusals(plan) + self._route.refusals(plan)
        return found or self._split_refusals(plan)

    def notes(self, plan: ModelPlan) -> list[str]:
        """What grows, what llama.cpp ignores, and how its tokenizer differs."""
        return _growth_notes(plan) + [f"gguf: {note}" for note in self._route.notes(plan)]

    def estimated_bytes(self, plan: ModelPlan) -> int:
        """The exact size."""
        return sum(part.bytes for part in self._parts(plan))

    def export(self, artifact: QuantizedCheckpoint, out: Path, on_event: Listener) -> ExportedModel:
        """Write `<name>-<size>-<scheme>.gguf` into `out`, or its parts: all of them or none. Files of an earlier export
        of the same name in another number of parts are removed.

        Raises FailedError when the disk is full or a matrix overflows.
        """
        plan = artifact.plan
        stem = file_stem(plan.model, plan.parameters, plan.file_type or plan.scheme)
        parts = self._parts(plan, artifact.fingerprint)
        data = self._route.data(artifact)
        files = tuple(out / part_name(stem, index, len(parts)) for index in range(len(parts)))
        total = sum(len(part.tensors) for part in parts)
        done = 0
        on_event(StageStarted("export", f"gguf: {files[0].name}", total))
        with files_written_whole(files, _other_versions(out, stem, files)) as temporaries:
            for part, temporary in zip(parts, temporaries, strict=True):
                with open(temporary, "wb") as stream:
                    for entry in write(stream, part.entries, part.tensors, data):
                        done += 1
                        on_event(StageAdvanced("export", done, total, entry.name))
        return self.opened(files[0])

    def opened(self, target: Path) -> ExportedModel:
        """A .gguf file, the first of several parts, or the folder that holds exactly one model. Raises RefusedError
        when signround did not write it, or when parts are missing or of another export."""
        paths = model_files(target)
        files = [_parsed(path) for path in paths]
        values = files[0].values
        if GRIDS not in values or FLOAT_TYPE not in values:
            raise refuse(
                "the file was not written by signround", "give one that `signround export` wrote", str(paths[0])
            )
        problem = split_problem(files)
        if problem is not None:
            raise refuse(problem, "put the parts of one export together, or export again", str(paths[0]))
        kept_dtype = self._kept_dtype(values[FLOAT_TYPE])
        if ORIGINS in values:
            found = origins_of(values)
            return ExportedModel(self.name, paths[0], paths, kept_dtype, added_values(found), in_float32(files, found))
        arch = values["general.architecture"]
        names = [name for file in files for name in file.tensors]
        more = {checkpoint_name(name, arch): value for name in names if (value := added(name, arch))}
        routers = frozenset(checkpoint_name(name, arch) for name in names if is_router(name))
        return ExportedModel(self.name, paths[0], paths, kept_dtype, more, routers)

    def read_back(self, exported: ExportedModel) -> Iterator[tuple[str, QuantizedTensor]]:
        """Unpack every quantised tensor with our own reader, q and k rows in checkpoint order."""
        files = [_parsed(path) for path in exported.files]
        values = files[0].values
        if ORIGINS in values:
            yield from read_back(files)
            return
        grids, arch = grids_of(values), values["general.architecture"]
        for file, name in [(part, name) for part in files for name in part.tensors if name in grids]:
            entry, heads = file.tensors[name], _heads(name, values)
            owners = checkpoint_names(name, arch, entry.shape)
            for part, owner in enumerate(owners):
                raw = file.data(name, part, len(owners)).reshape(entry.shape[-2], -1)
                ordered = raw if heads is None else halved(raw, heads)
                try:
                    yield owner, unpack(ordered, grids[name], entry.shape[-1])
                except ValueError as error:
                    raise FailedError(f"{file.path}: {name} is damaged ({error}); export it again.") from error

    def decode_independently(self, exported: ExportedModel) -> Iterator[tuple[str, Tensor]]:
        """Decode every tensor with gguf-py (the reader of the llama.cpp project). Raises UnavailableError without
        it, and for a type that came after it (Q2_0)."""
        refusals = missing_packages(("gguf",), "gguf", "gguf")
        if refusals:
            raise UnavailableError(refusals)
        tensors, values = independent_tensors(exported.files), _parsed(exported.target).values
        if ORIGINS in values:
            yield from decoded(values, tensors)
            return
        for name, tensor in tensors.items():
            if name in COMPUTED:
                continue
            heads = _heads(name, values)
            owners = checkpoint_names(name, values["general.architecture"], tensor.shape)
            for part, owner in enumerate(owners):
                rows = tensor.rows // len(owners)
                weight = tensor.read(part * rows, (part + 1) * rows).reshape(checkpoint_shape(name, tensor.shape))
                yield owner, torch.from_numpy(weight.copy() if heads is None else halved(weight, heads))

    def write_importance(self, importance: Importance, path: Path, plan: ModelPlan) -> None:
        """llama.cpp's GGUF importance matrix, which `llama-quantize --imatrix` takes. See `ImportanceFiles`."""
        mixture = plan.architecture.mixture
        write_imatrix(path, imatrix_of(importance, mixture.experts if mixture else 1))

    def read_importance(self, path: Path, plan: ModelPlan) -> Importance:
        """What `llama-imatrix` wrote, in its GGUF or its older .dat form. See `ImportanceFiles`."""
        columns = {layer.name: layer.columns for layer in plan.layers()}
        columns |= {kept.name: kept.shape[-1] for kept in plan.outer if len(kept.shape) > 1}
        return importance_of(read_imatrix(path), columns, str(path))

    @property
    def _route(self) -> Route:
        return Template(Path(self.template), self.source) if self.template else FromPlan(self.float_type, self.pre)

    def _parts(self, plan: ModelPlan, fingerprint: str = UNKNOWN) -> Sequence[Part]:
        limit = size_in_bytes(self.split_max_size) if self.split_max_size else None
        return self._route.parts(plan, limit, fingerprint)

    def _split_refusals(self, plan: ModelPlan) -> list[Refusal]:
        """A limit that the largest tensor, or the metadata with the first one, goes beyond."""
        try:
            self._parts(plan)
        except ValueError as error:
            return [Refusal(f"split_max_size is too small: {error}", "choose at least that", "gguf")]
        return []

    def _option_refusals(self) -> list[Refusal]:
        found = []
        if self.float_type not in (AUTO, *FLOAT_TYPES):
            allowed = ", ".join((AUTO, *FLOAT_TYPES))
            problem = f"float_type {self.float_type!r} is not known"
            found.append(Refusal(problem, f"choose one of {allowed}", "gguf.float_type"))
        try:
            size_in_bytes(self.split_max_size or "1G")
        except ValueError as error:
            found.append(Refusal(f"split_max_size {error}", "give a number and a unit: 2G, 500M", "gguf"))
        unused = [name for name, value in (("float_type", self.float_type), ("pre", self.pre)) if value != AUTO]
        if self.template and unused:
            problem = f"{unused[0]} is given, and the template decides it"
            found.append(Refusal(problem, "leave one of the two out", f"gguf.{unused[0]}"))
        if self.source and not self.template:
            found.append(Refusal("source is given without a template", "add gguf.template=FILE", "gguf.source"))
        return found

    @staticmethod
    def _kept_dtype(float_type: str) -> torch.dtype | None:
        return None if float_type == AUTO else FLOAT_TYPES[float_type].dtype


def _grid_refusals(plan: ModelPlan) -> list[Refusal]:
    reasons: dict[tuple[str, str], list[LayerPlan]] = {}
    for layer in plan.layers():
        reason = obstacle(layer.grid, layer.columns)
        if reason is not None:
            reasons.setdefault(reason, []).append(layer)
    return [
        Refusal(f"{problem} ({layers[0].name} and {len(layers) - 1} more)", next_step, "gguf")
        for (problem, next_step), layers in reasons.items()
    ]


def _growth_notes(plan: ModelPlan) -> list[str]:
    """One note a block type whose blocks are shorter than the groups of the grid."""
    grown: dict[BlockType, tuple[float, float]] = {}
    for layer in plan.layers():
        if obstacle(layer.grid, layer.columns) is None and layer.grid.super_block is None:
            kind = block_type_for(layer.grid, layer.columns)
            if layer.grid.group_of(layer.columns) > kind.elements:
                stored = kind.bytes * 8 / kind.elements
                grown.setdefault(kind, (layer.grid.bits_per_weight(layer.columns), stored))
    return [
        f"gguf: {kind.name} keeps a scale every {kind.elements} weights, so {plan.scheme} takes {stored:.2f} bits a "
        f"weight there instead of {own:.2f}; the integers are the same"
        for kind, (own, stored) in grown.items()
    ]


def _heads(name: str, values: dict[str, Any]) -> int | None:
    architecture = values["general.architecture"]
    heads = values[f"{architecture}.attention.head_count"]
    return rotated_heads(name, architecture, heads, values[f"{architecture}.attention.head_count_kv"])


def _other_versions(out: Path, stem: str, files: Sequence[Path]) -> list[Path]:
    """What earlier exports of this model left in `out` under names that this one does not use."""
    used = {path.name for path in files} | {f"{PARTIAL}{path.name}" for path in files}
    found = out.iterdir() if out.is_dir() else ()
    return [path for path in found if is_version_of(path.name, stem) and path.name not in used]


def _parsed(path: Path) -> GgufFile:
    try:
        return GgufFile(path, TYPE_BYTES)
    except (OSError, ValueError) as error:
        problem = f"not a GGUF file of ours ({error})"
        raise refuse(problem, "give a file that `signround export` wrote", str(path)) from error
