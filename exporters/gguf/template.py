"""Another family by template: everything of a float GGUF file but the quantised tensors, whose blocks are swapped in.

The template is an unquantised file that llama.cpp's own converter wrote; metadata, tokenizer, tensor names, their order
and every unquantised tensor are taken from it as they are. Where each tensor comes from is found by comparing values
with the float checkpoint (`matching.py`), once, and written into the file, so that it can be read back without either.
Refuses, with the list, tensors that cannot be matched; quantised and split templates; and files of another model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exporters.gguf.bits import Bytes
from exporters.gguf.container import GgufFile, KeyValue, PartOfTensor, PartsOf, TensorEntry
from exporters.gguf.layout import AUTO, FLOAT_TYPES, TYPE_BYTES, file_type
from exporters.gguf.matching import FloatTensor, Matching, Origin, RowMatcher
from exporters.gguf.metadata import provenance
from exporters.gguf.names import COMPUTED
from exporters.gguf.origins import origin_entries
from exporters.gguf.packing import block_type_for, pack
from exporters.gguf.slices import row_slices
from exporters.gguf.splits import Part, split
from exporters.gguf.writer import UNKNOWN
from signround.artifact import QuantizedCheckpoint
from signround.checkpoint import SourceCheckpoint
from signround.errors import Refusal, RefusedError, refuse
from signround.plan import LayerPlan, ModelPlan

ADVICE = "convert the same checkpoint with llama.cpp's convert_hf_to_gguf.py --outtype f16, bf16 or f32"
SHOWN = 8
_FLOAT = {kind.code: kind for kind in FLOAT_TYPES.values()}
_matched: dict[tuple[str, int, int, str], Matching] = {}  # the latest: planned once, needed again to write


@dataclass(frozen=True)
class Template:
    """`path` of the template; `source`: the float checkpoint's folder, "" when the plan's own folder holds it."""

    path: Path
    source: str = ""

    @cached_property
    def file(self) -> GgufFile:
        """Raises RefusedError for anything but one whole float GGUF file."""
        try:
            file = GgufFile(self.path, TYPE_BYTES)
        except (OSError, ValueError) as error:
            raise refuse(f"the template is not an unquantised GGUF file ({error})", ADVICE, str(self.path)) from error
        quantised = [name for name, entry in file.tensors.items() if entry.type not in _FLOAT]
        if quantised:
            problem = f"the template is quantised already ({quantised[0]} and {len(quantised) - 1} more tensors)"
            raise refuse(problem, ADVICE, str(self.path))
        if file.values.get("split.count", 0) > 1:
            raise refuse("the template is split", "merge it with llama-gguf-split --merge", str(self.path))
        odd = [entry.key for entry in file.entries if entry.kind == "array" or entry.key == "general.alignment"]
        if odd or not file.tensors:
            problem = f"the template has {odd[0]}, which" if odd else "the template has no tensors, and that"
            raise refuse(f"{problem} is not supported", ADVICE, str(self.path))
        return file

    def refusals(self, plan: ModelPlan) -> list[Refusal]:
        """Every reason why the template does not fit."""
        try:
            matching = self.matching(plan)
        except RefusedError as error:
            return list(error.refusals)
        found = []
        if matching.strange:
            problem = (
                f"of the template's tensors these were not made of rows of the checkpoint: {_some(matching.strange)}"
            )
            found.append(Refusal(problem, ADVICE, str(self.path)))
        if matching.missing:
            problem = f"the template does not hold, or not wholly: {_some(matching.missing)}"
            found.append(Refusal(problem, ADVICE, str(self.path)))
        return found or _mixed(plan, matching.origins, self.path) + self._dtype_refusals(plan, matching)

    def notes(self, plan: ModelPlan) -> list[str]:
        """What the file takes over."""
        return [f"names, metadata, tokenizer and unquantised tensors come from {self.path.name}, as they are"]

    def matching(self, plan: ModelPlan) -> Matching:
        """Where every tensor comes from. Raises RefusedError when the float checkpoint is not at hand."""
        stat = self.path.stat() if self.path.is_file() else None
        key = (str(self.path.resolve()), *((stat.st_size, stat.st_mtime_ns) if stat else (0, 0)), plan.source_sha256)
        if key not in _matched:
            found = self._compare(plan)
            _matched.clear()
            _matched[key] = found
        return _matched[key]

    def table(self, plan: ModelPlan) -> list[tuple[TensorEntry, Sequence[LayerPlan]]]:
        """The tensors of the file to come, in the template's order, and the linears that are swapped in."""
        layers = {layer.name: layer for layer in plan.layers()}
        origins = self.matching(plan).origins
        rows: list[tuple[TensorEntry, Sequence[LayerPlan]]] = []
        for entry in self.file.tensors.values():
            parts = (
                [layers[name] for name in origins[entry.name].names if name in layers] if entry.name in origins else []
            )
            if parts:
                kind = block_type_for(parts[0].grid, parts[0].columns)
                size = math.prod(entry.shape[:-1]) * kind.row_bytes(entry.shape[-1])
                entry = TensorEntry(entry.name, entry.shape, kind.code, size)  # noqa: PLW2901
            rows.append((entry, parts))
        return rows

    def parts(self, plan: ModelPlan, limit: int | None, fingerprint: str = UNKNOWN) -> Sequence[Part]:
        """See `Route.parts`."""
        table = self.table(plan)
        return split(self._entries(plan, table, fingerprint), [entry for entry, _ in table], limit)

    def data(self, artifact: QuantizedCheckpoint) -> PartsOf:
        """See `Route.data`. Raises RefusedError when the template does not fit the artifact."""
        found = self.refusals(artifact.plan)
        if found:
            raise RefusedError(found)
        swapped = {entry.name: layers for entry, layers in self.table(artifact.plan) if layers}
        origins = self.matching(artifact.plan).origins

        def packed(layer: LayerPlan, rows: range) -> Bytes:
            return pack(artifact.quantized(layer.name, rows))

        def data(entry: TensorEntry) -> Iterator[PartOfTensor]:
            if entry.name not in swapped:
                for rows in row_slices(math.prod(entry.shape[:-1]), entry.shape[-1]):
                    yield partial(self.file.rows, entry.name, rows.start, rows.stop)
                return
            slices = [
                partial(packed, layer, rows)
                for layer in swapped[entry.name]
                for rows in row_slices(layer.rows, layer.columns)
            ]
            order = origins[entry.name].rows
            if order is None:
                yield from slices
            else:
                yield lambda: np.concatenate([part() for part in slices])[order]

        return data

    def _compare(self, plan: ModelPlan) -> Matching:
        shapes: dict[str, tuple[int, ...]] = {layer.name: (layer.rows, layer.columns) for layer in plan.layers()}
        shapes |= {kept.name: kept.shape for kept in plan.kept()}
        tensors = [
            FloatTensor(name, entry.shape, _FLOAT[entry.type].dtype)
            for name, entry in self.file.tensors.items()
            if name not in COMPUTED
        ]
        checkpoint = self._checkpoint(plan)
        absent = [name for name in shapes if name not in checkpoint.tensors]
        if absent:
            raise refuse(f"the checkpoint stores {_some(absent)} in another form", "give a plain checkpoint", "gguf")
        matrices = [tensor.dtype for tensor in tensors if len(tensor.shape) > 1]
        return RowMatcher(shapes, checkpoint.read, matrices).match(tensors, self._tensor)

    def _checkpoint(self, plan: ModelPlan) -> SourceCheckpoint:
        folder = Path(self.source) if self.source else plan.files
        if not self.source and not any(folder.glob("*.safetensors")):
            raise refuse(
                "the template is compared with the float checkpoint, and an artifact holds none",
                "name its folder with --set gguf.source=FOLDER",
                "gguf.template",
            )
        checkpoint = SourceCheckpoint(folder)
        if self.source and checkpoint.sha256 != plan.source_sha256:
            raise refuse(
                "the folder is not the checkpoint that was tuned (its hash differs)",
                "give the folder that `signround quantize` was given",
                str(folder),
            )
        return checkpoint

    def _tensor(self, name: str) -> Tensor:
        entry = self.file.tensors[name]
        raw: Tensor = torch.from_numpy(self.file.data(name))
        return raw.view(_FLOAT[entry.type].dtype).reshape(entry.shape)

    def _kept_types(self, plan: ModelPlan, matching: Matching) -> set[str]:
        """Types of the template's matrices that stay, float32 apart."""
        kept = {kept.name for kept in plan.kept() if len(kept.shape) > 1}
        held = [name for name, origin in matching.origins.items() if kept & set(origin.names)]
        return {_FLOAT[self.file.tensors[name].type].name for name in held} - {"f32"}

    def _dtype_refusals(self, plan: ModelPlan, matching: Matching) -> list[Refusal]:
        types = sorted(self._kept_types(plan, matching))
        if len(types) < 2:
            return []
        return [Refusal(f"the template mixes {' and '.join(types)} matrices", ADVICE, str(self.path))]

    def _entries(
        self, plan: ModelPlan, table: Sequence[tuple[TensorEntry, Sequence[LayerPlan]]], fingerprint: str
    ) -> list[KeyValue]:
        """The template's key-values, those that are no longer true replaced, and ours."""
        matching = self.matching(plan)
        ours = {
            "general.quantized_by": KeyValue("general.quantized_by", "string", "signround"),
            "general.quantization_version": KeyValue("general.quantization_version", "u32", 2),
            "general.file_type": KeyValue("general.file_type", "u32", file_type(plan, AUTO)),
        }
        theirs = [entry for entry in self.file.entries if not entry.key.startswith("signround.")]
        entries = [ours.get(entry.key, entry) for entry in theirs]
        entries += [entry for key, entry in ours.items() if key not in self.file.values]
        float_type = next(iter(self._kept_types(plan, matching)), "f32")
        return [
            *entries,
            *provenance(
                plan, fingerprint, float_type, [(entry.name, parts[0].grid) for entry, parts in table if parts]
            ),
            *origin_entries(matching.origins),
        ]


def _mixed(plan: ModelPlan, origins: Mapping[str, Origin], path: Path) -> list[Refusal]:
    """Tensors of the template that one block type cannot hold."""
    grids = {layer.name: layer.grid for layer in plan.layers()}
    mixed = [
        name
        for name, origin in origins.items()
        if len({grids.get(part) for part in origin.names}) > 1
    ]  # fmt: skip
    if not mixed:
        return []
    problem = f"the template fuses tensors that have different grids, or that are not quantised: {_some(mixed)}"
    return [Refusal(problem, "choose a scheme that gives them one grid", str(path))]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
