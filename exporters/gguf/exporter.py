"""GgufExporter: one .gguf file for llama.cpp, with the artifact's integers bit for bit.

Lays out bits only. Refuses at plan time, all reasons at once, what no ggml block holds exactly, tensors that llama.cpp
has no place for, and tokenizers that it would run otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exporters.gguf import hyperparameters
from exporters.gguf.container import GgufFile
from exporters.gguf.imatrix import imatrix_of, importance_of, read_imatrix, write_imatrix
from exporters.gguf.layout import AUTO, FLOAT_TYPES, TYPE_BYTES, layout
from exporters.gguf.metadata import FLOAT_TYPE, GRIDS, grids_of
from exporters.gguf.names import (
    COMPUTED,
    added,
    checkpoint_name,
    checkpoint_names,
    checkpoint_shape,
    gguf_name,
    halved,
    is_router,
    rotated_heads,
)
from exporters.gguf.packing import BLOCK_TYPES, BlockType, block_type_for, obstacle, unpack
from exporters.gguf.pre_tokenizer import AUTO as AUTO_PRE
from exporters.gguf.tokenizer import read_tokenizer
from exporters.gguf.vocabulary import CarriedTokenizer
from exporters.gguf.writer import planned_bytes, write_gguf
from signround.artifact import QuantizedCheckpoint
from signround.errors import FailedError, Refusal, RefusedError, refuse
from signround.events import Listener, StageAdvanced, StageStarted
from signround.experts import is_expert
from signround.exporting import ExportedModel, missing_packages
from signround.files import written_whole
from signround.grid import Grid
from signround.importance import Importance
from signround.plan import LayerPlan, ModelPlan
from signround.qtensor import QuantizedTensor

if TYPE_CHECKING:
    from gguf import ReaderTensor


@dataclass(frozen=True)
class GgufExporter:
    """`float_type`: dtype of unquantised matrices, one of auto (each its own), f32, f16, bf16. `pre`: llama.cpp's
    name of the tokenizer's splitting rule, auto to find it."""

    float_type: str = AUTO
    pre: str = AUTO_PRE

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
        """Grids without a block type (equal reasons over layers become one), the family, options, tokenizer."""
        found = (
            self._option_refusals()
            + _grid_refusals(plan)
            + _stack_refusals(plan)
            + hyperparameters.refusals(plan.architecture)
        )
        try:
            self._tokenizer(plan)
        except RefusedError as error:
            found += error.refusals
        return found

    def notes(self, plan: ModelPlan) -> list[str]:
        """What grows, what llama.cpp ignores, and how its tokenizer differs."""
        found = _growth_notes(plan) + hyperparameters.notes(plan.architecture)
        if self.float_type != AUTO:
            found.append(f"gguf: unquantised matrices are stored as {self.float_type}")
        with contextlib.suppress(RefusedError):  # `refusals` names it
            found += [f"gguf: {note}" for note in self._tokenizer(plan).notes]
        return found

    def estimated_bytes(self, plan: ModelPlan) -> int:
        """The exact size."""
        return planned_bytes(plan, self._tokenizer(plan), self.float_type)

    def export(self, artifact: QuantizedCheckpoint, out: Path, on_event: Listener) -> ExportedModel:
        """Write `<model>-<scheme>.gguf` into `out`. Raises FailedError when the disk is full or a matrix overflows."""
        plan = artifact.plan
        target = out / f"{plan.model}-{plan.scheme}.gguf"
        tokenizer = self._tokenizer(plan)
        total = len(layout(plan, self.float_type))
        on_event(StageStarted("export", f"gguf: {target.name}", total))
        with written_whole(target) as temporary, open(temporary, "wb") as stream:
            names = write_gguf(
                stream,
                plan,
                tokenizer=tokenizer,
                fingerprint=artifact.fingerprint,
                float_type=self.float_type,
                quantized=artifact.quantized,
                kept=artifact.tensor,
            )
            for done, name in enumerate(names, 1):
                on_event(StageAdvanced("export", done, total, name))
        return self.opened(target)

    def opened(self, target: Path) -> ExportedModel:
        """A .gguf file, or the folder that holds exactly one. Raises RefusedError when signround did not write it."""
        path = _only_file(target)
        file = _parsed(path)
        values = file.values
        if GRIDS not in values or FLOAT_TYPE not in values:
            raise refuse("the file was not written by signround", "give one that `signround export` wrote", str(path))
        arch = values["general.architecture"]
        more = {checkpoint_name(name, arch): value for name in file.tensors if (value := added(name, arch))}
        routers = frozenset(checkpoint_name(name, arch) for name in file.tensors if is_router(name))
        return ExportedModel(self.name, path, (path,), self._kept_dtype(values[FLOAT_TYPE]), more, routers)

    def read_back(self, exported: ExportedModel) -> Iterator[tuple[str, QuantizedTensor]]:
        """Unpack every quantised tensor with our own reader, q and k rows in checkpoint order."""
        file = _parsed(exported.target)
        grids, arch = grids_of(file.values), file.values["general.architecture"]
        for name, entry in file.tensors.items():
            if name not in grids:
                continue
            owners = checkpoint_names(name, arch, entry.shape)
            heads = _heads(name, file.values)
            for part, owner in enumerate(owners):
                raw = file.data(name, part, len(owners)).reshape(entry.shape[-2], -1)
                ordered = raw if heads is None else halved(raw, heads)
                try:
                    yield owner, unpack(ordered, grids[name], entry.shape[-1])
                except ValueError as error:
                    raise FailedError(f"{exported.target}: {name} is damaged ({error}); export it again.") from error

    def decode_independently(self, exported: ExportedModel) -> Iterator[tuple[str, Tensor]]:
        """Decode every tensor with gguf-py (the reader of the llama.cpp project). Raises RefusedError without it, and
        for a type that came after it (Q2_0)."""
        refusals = missing_packages(("gguf",), "gguf", "gguf")
        if refusals:
            raise RefusedError(refusals)
        from gguf import GGUFReader
        from gguf.quants import dequantize

        _refuse_unknown_types(exported.target)
        reader = GGUFReader(exported.target)
        values = {key: field.contents() for key, field in reader.fields.items() if "head_count" in key or "arch" in key}
        for tensor in reader.tensors:
            if tensor.name in COMPUTED:
                continue
            heads = _heads(tensor.name, values)
            shape = tuple(int(size) for size in tensor.shape[::-1])
            owners = checkpoint_names(tensor.name, values["general.architecture"], shape)
            for part, owner in enumerate(owners):
                weight = dequantize(_read_part(exported.target, tensor, part, len(owners)), tensor.tensor_type)
                weight = weight.reshape(checkpoint_shape(tensor.name, shape))
                yield owner, torch.from_numpy(weight.copy() if heads is None else halved(weight, heads))

    def write_importance(self, importance: Importance, path: Path) -> None:
        """llama.cpp's GGUF importance matrix, which `llama-quantize --imatrix` takes. See `ImportanceFiles`."""
        write_imatrix(path, imatrix_of(importance))

    def read_importance(self, path: Path, plan: ModelPlan) -> Importance:
        """What `llama-imatrix` wrote, in its GGUF or its older .dat form. See `ImportanceFiles`."""
        columns = {layer.name: layer.columns for layer in plan.layers()}
        columns |= {kept.name: kept.shape[-1] for kept in plan.outer if len(kept.shape) > 1}
        return importance_of(read_imatrix(path), columns, str(path))

    def _tokenizer(self, plan: ModelPlan) -> CarriedTokenizer:
        return read_tokenizer(plan.files, plan.config, plan.architecture.vocabulary, self.pre)

    def _option_refusals(self) -> list[Refusal]:
        if self.float_type in (AUTO, *FLOAT_TYPES):
            return []
        allowed = ", ".join((AUTO, *FLOAT_TYPES))
        return [Refusal(f"float_type {self.float_type!r} is not known", f"choose one of {allowed}", "gguf.float_type")]

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


def _stack_refusals(plan: ModelPlan) -> list[Refusal]:
    """The experts of a block are one tensor, and a tensor has one type."""
    grids: dict[str, set[Grid]] = {}
    for layer in plan.layers():
        if is_expert(layer.name):
            grids.setdefault(gguf_name(layer.name), set()).add(layer.grid)
    mixed = [name for name, found in grids.items() if len(found) > 1]
    if not mixed:
        return []
    problem = f"the experts in {mixed[0]} have different grids (and {len(mixed) - 1} more); llama.cpp keeps them as one"
    return [Refusal(problem, "give all experts of a block the same type", "gguf")]


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


def _refuse_unknown_types(path: Path) -> None:
    """gguf-py stops at the first type it has no name for."""
    from gguf import GGMLQuantizationType

    known = {kind.value for kind in GGMLQuantizationType}
    used = {entry.type for entry in _parsed(path).tensors.values()}
    unknown = [kind.name for kind in BLOCK_TYPES if kind.code in used - known]
    if unknown:
        problem = f"the installed gguf-py does not know {', '.join(unknown)}"
        raise refuse(problem, "update the gguf package once a release does", str(path))


def _read_part(path: Path, tensor: ReaderTensor, part: int, parts: int) -> npt.NDArray[Any]:
    """One of the equal parts of a tensor that gguf-py found, in rows of bytes or floats. Read, not mapped: the pages
    that gguf-py's own view touches would stay resident until the last tensor."""
    count = tensor.data.size // parts
    offset = tensor.data_offset + part * count * tensor.data.itemsize
    raw = np.fromfile(path, tensor.data.dtype, count, offset=offset)
    return raw.reshape(-1, tensor.data.shape[-1])


def _only_file(target: Path) -> Path:
    if not target.is_dir():
        return target
    files = sorted(target.glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise refuse(f"the folder must hold exactly one .gguf file, found {found}", "name the file", str(target))
    return files[0]


def _parsed(path: Path) -> GgufFile:
    try:
        return GgufFile(path, TYPE_BYTES)
    except (OSError, ValueError) as error:
        problem = f"not a GGUF file of ours ({error})"
        raise refuse(problem, "give a file that `signround export` wrote", str(path)) from error
