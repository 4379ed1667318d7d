"""OnnxExporter: artifact -> a folder that onnxruntime, onnxruntime-genai or transformers.js runs (`layouts`).

    model.onnx         the decoder graph, a few hundred kB; in other forms on request (`form`)
    model.onnx.data    every tensor
    genai_config.json  what onnxruntime-genai needs to know, beside the tokenizer files and config.json

Refuses, at plan time, grids that MatMulNBits cannot hold, experts that QMoE cannot hold, and what the form or the
layout cannot be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exporters.onnx import inspection, layouts
from exporters.onnx.builder import GraphBuilder
from exporters.onnx.carried import SideFiles, side_files, size_of, template_note, write
from exporters.onnx.checker import problems_of
from exporters.onnx.data_files import count_data_files, save_chunks
from exporters.onnx.decoder import build_decoder
from exporters.onnx.experts import expert_notes, expert_refusals
from exporters.onnx.form import GraphForm
from exporters.onnx.genai import LONGEST, genai_config, tokenizer_note
from exporters.onnx.genai_tokenizer import tokenizer_notes
from exporters.onnx.generation import generation_refusals, read_generation
from exporters.onnx.linear import FAST_LEVEL, Accuracy, is_down_projection
from exporters.onnx.metadata import model_metadata
from exporters.onnx.packing import FAST_2_BIT_BLOCKS, block_of, has_float_kernel
from exporters.onnx.packing import refusal_of as grid_refusal
from exporters.onnx.parts import norm_addend
from exporters.onnx.reader import ADDED_KEY, DTYPE_KEY, added_to, decode_all, load_graph, read_quantized, unlabelled
from exporters.onnx.rope import positions_of, rotary_tables
from signround.artifact import QuantizedCheckpoint
from signround.errors import FailedError, Refusal, RefusedError, refuse
from signround.events import Listener, StageAdvanced
from signround.exporting import ExportedModel, missing_packages
from signround.files import folder_written_whole
from signround.grid import Grid
from signround.plan import ModelPlan
from signround.qtensor import QuantizedTensor
from signround.runtimes.genai import CONFIG
from signround.runtimes.onnx_files import find_graph

if TYPE_CHECKING:
    import onnx_ir as ir

LEVELS = (0, 1, 2, 3, FAST_LEVEL)
WRITERS = ("onnx", "onnx_ir")
METADATA_BYTES = 1500  # of the model


@dataclass(frozen=True)
class OnnxExporter:
    """`accuracy_level` is the precision of activations in MatMulNBits: 4 computes with int8 (fast), 0 with float32.
    `exact_down_proj` keeps down projections of 3 and 4 bits, where the outliers are, at 0: about half the difference to
    float32, for a token that takes some 1.2 times as long. `keep_fast` keeps products of 2 and 8 bits at 4 whatever
    `accuracy_level` says: below, onnxruntime decodes the weight on every call. With `fallback`, the pipeline writes a
    model that misses its gate at level 4 again, first with exact down projections, then with level 0 wherever it is
    fast. `layout` is the runtime whose folder is written: "genai" (plain onnxruntime too) or "transformers.js";
    `flavour`, `weights` and `dtype` are the form of the graph (`GraphForm`)."""

    accuracy_level: int = 4
    exact_down_proj: bool = False
    keep_fast: bool = False
    fallback: bool = True
    layout: str = layouts.GENAI
    flavour: str = "contrib"
    weights: str = "matmulnbits"
    dtype: str = "fp32"

    @property
    def name(self) -> str:
        return "onnx"

    @property
    def zero_floor(self) -> int:
        return 0

    @property
    def file_types(self) -> bool:
        return False

    def holds(self, grid: Grid, columns: int) -> bool:
        """See `Exporter.holds`; ragged rows are padded."""
        return grid_refusal(grid) is None

    def more_exact(self, plan: ModelPlan) -> OnnxExporter | None:
        """Float activations in the down projections, where the outliers are; then everywhere. Not in products of 2 and
        8 bits, which onnxruntime would compute a hundred times as slowly: whoever wants that asks for level 0."""
        fast = [has_float_kernel(layer.grid) for layer in plan.products()]
        if not self.fallback or self.accuracy_level != 4 or not any(fast):
            return None
        if self.weights == "dequantize":  # one level for all
            return replace(self, accuracy_level=0) if all(fast) else None
        down = any(is_down_projection(layer) and has_float_kernel(layer.grid) for layer in plan.products())
        if down and not self.exact_down_proj:
            return replace(self, exact_down_proj=True)
        return replace(self, accuracy_level=0, exact_down_proj=False, keep_fast=not all(fast))

    def refusals(self, plan: ModelPlan) -> list[Refusal]:
        """See `Exporter.refusals`."""
        found = missing_packages(WRITERS, "onnx", "onnx")
        found += [] if self.accuracy_level in LEVELS else [self._level_refusal()]
        found += [
            replace(refusal, problem=f"{refusal.problem}: {_listed(plan, grid)}")
            for grid in _grids(plan)
            if (refusal := grid_refusal(grid))
        ]
        form = self._form.refusals(plan)
        places = [] if form else layouts.refusals_of(self.layout, plan, self.dtype)
        return found + expert_refusals(plan) + form + places + generation_refusals(plan)

    def _level_refusal(self) -> Refusal:
        return Refusal(
            f"accuracy_level {self.accuracy_level} does not exist; allowed are {', '.join(map(str, LEVELS))}",
            "use 4 (int8 activations) or 0 (float32)",
            "onnx",
        )

    def notes(self, plan: ModelPlan) -> list[str]:
        """See `Exporter.notes`."""
        notes = [note for grid in _grids(plan) for note in self._grid_notes(plan, grid)]
        context, positions = plan.architecture.context, positions_of(plan.architecture)
        if positions < context:
            notes.append(f"onnx: the graph holds {positions} positions of the model's {context}; longer inputs fail.")
        if positions > LONGEST and self.layout == layouts.GENAI:
            notes.append(
                f"onnx: onnxruntime-genai will allocate {LONGEST} tokens by default (search.max_length in {CONFIG}; "
                f"the graph takes {positions})."
            )
        notes += [
            f"onnx: a text that grows past {table.switch} tokens while it is generated keeps the cached keys of the "
            "short rope factors, as in transformers' cache; read it anew there (onnxruntime-genai does so at 4097)."
            for table in rotary_tables(plan.architecture).values()
            if table.switch is not None
        ]
        return [*notes, *expert_notes(plan), *self._form.notes(plan), *self._folder_notes(plan)]

    def _folder_notes(self, plan: ModelPlan) -> list[str]:
        """What the runtime of the layout makes of the files beside the graph."""
        if self.layout != layouts.GENAI:
            return layouts.browser_notes(plan, self.flavour)
        notes = [note for note in (tokenizer_note(plan.files), template_note(plan.files, self.layout)) if note]
        return [*notes, *read_generation(plan).notes, *tokenizer_notes(side_files(plan, self.layout, {}), CONFIG)]

    def _grid_notes(self, plan: ModelPlan, grid: Grid) -> Iterator[str]:
        blocks = {block_of(grid, layer.columns) for layer in plan.layers() if layer.grid == grid}
        if grid.bits == 3:
            yield "onnx: 3-bit codes are stored in 4-bit fields (onnxruntime runs 2, 4 and 8 bits) and take their size."
        if grid.group is None or {grid.group} != blocks:
            group = "whole rows" if grid.group is None else f"groups of {grid.group}"
            sizes = " and ".join(map(str, sorted(blocks)))
            yield f"onnx: {group} are stored as blocks of {sizes} that repeat their scale; the weights are the same."
        if all(layer.grid != grid for layer in plan.products()):
            return
        if grid.bits == 2 and not blocks <= set(FAST_2_BIT_BLOCKS):
            yield (
                "onnx: 2 bits in blocks of 16 have no fast kernel in onnxruntime (some 100 times slower); "
                "prefer w2g32 or w2g64."
            )
        if not has_float_kernel(grid) and self.accuracy_level != FAST_LEVEL and not self.keep_fast:
            yield (
                f"onnx: at accuracy_level {self.accuracy_level} onnxruntime decodes {grid.bits}-bit weights again on "
                "every call (some 100 times slower); 4 is the level to ship, onnx.keep_fast=true keeps it there."
            )
        elif not has_float_kernel(grid) and (self.keep_fast or self.exact_down_proj):
            yield f"onnx: products of {grid.bits} bits stay at accuracy_level 4, the only fast one."

    @property
    def _form(self) -> GraphForm:
        accuracy = Accuracy(self.accuracy_level, self.exact_down_proj, self.keep_fast)
        return GraphForm(self.flavour, self.weights, self.dtype, accuracy)

    def estimated_bytes(self, plan: ModelPlan) -> int:
        """See `Exporter.estimated_bytes`: the graph is laid out from shapes, and no tensor is read."""
        builder = build_decoder(plan, _NoTensors(), self._form)
        tensors = sum(value.const_value.nbytes for value in builder.constants.values() if value.const_value)
        return tensors + builder.graph_bytes() + METADATA_BYTES + size_of(self._side_files(plan, 1))

    def _places(self, plan: ModelPlan) -> layouts.Places:
        return layouts.places_of(self.layout, plan, self.dtype)

    def _side_files(self, plan: ModelPlan, data_count: int) -> SideFiles:
        places = self._places(plan)
        if self.layout == layouts.GENAI:
            return side_files(plan, self.layout, {CONFIG: genai_config(plan, places.graph, self._form)})
        config = layouts.browser_config(plan, places, self.dtype, data_count)
        return side_files(plan, self.layout, {"config.json": config})

    def export(self, artifact: QuantizedCheckpoint, out: Path, on_event: Listener) -> ExportedModel:
        """See `Exporter.export`. One weight (or one fused q, k, v) is in memory at a time."""
        plan = artifact.plan
        refusals = self.refusals(plan)
        if refusals:
            raise RefusedError(refusals)
        places = self._places(plan)
        builder = build_decoder(plan, artifact, self._form)
        model = self._model(builder, artifact)

        def advanced(done: int, total: int, name: str) -> None:
            on_event(StageAdvanced("export", done, total, name))

        with folder_written_whole(out) as folder:
            write(self._side_files(plan, count_data_files(model, places)), folder)
            save_chunks(model, builder.views, folder, places, advanced)
            problems = problems_of(load_graph(folder), (folder / places.graph).parent)
            if problems:
                raise FailedError(
                    f"onnx: the written graph is not sound ({problems[0]}; {len(problems)} in all); "
                    "report this, nothing was written."
                )
        return self.opened(out)

    def _model(self, builder: GraphBuilder, artifact: QuantizedCheckpoint) -> ir.Model:
        plan, form = artifact.plan, self._form
        model = builder.model("decoder", form.opset(plan), form.ir_version(plan), "signround", version("signround"))
        model.metadata_props.update(model_metadata(artifact, asdict(self)))
        if addend := norm_addend(plan):
            model.metadata_props[ADDED_KEY] = str(addend)
        return model

    def inspected(self, target: Path) -> dict[str, Any]:
        """See `ForeignFiles.inspected`."""
        return inspection.inspected(target)

    def opened(self, target: Path) -> ExportedModel:
        """See `Exporter.opened`."""
        model = load_graph(target)
        problems = [*problems_of(model, find_graph(target).parent), *unlabelled(model)]
        if problems:
            raise refuse(f"the graph is not sound ({problems[0]})", "export the artifact again", str(target))
        files = tuple(sorted(path for path in target.rglob("*") if path.is_file()))
        half = model.metadata_props.get(DTYPE_KEY) == "fp16"
        kept_dtype = torch.float16 if half else None
        return ExportedModel(self.name, target, files, kept_dtype, added_to(model), casts_vectors=half)

    def read_back(self, exported: ExportedModel) -> Iterator[tuple[str, QuantizedTensor]]:
        """See `Exporter.read_back`."""
        return read_quantized(exported.target)

    def decode_independently(self, exported: ExportedModel) -> Iterator[tuple[str, Tensor]]:
        """See `Exporter.decode_independently`: linears through onnxruntime, the others through the onnx package."""
        return decode_all(exported.target)


class _NoTensors:
    """The source of a graph that is only measured."""

    def quantized(self, name: str, rows: range | None = None) -> QuantizedTensor:
        raise LookupError(name)

    def tensor(self, name: str, rows: range | None = None) -> Tensor:
        raise LookupError(name)


def _grids(plan: ModelPlan) -> list[Grid]:
    """The distinct grids of a plan, in order of appearance."""
    return list(dict.fromkeys(layer.grid for layer in plan.layers()))


def _listed(plan: ModelPlan, grid: Grid) -> str:
    """The matrices of one grid, the first by name."""
    names = [layer.name for layer in plan.layers() if layer.grid == grid]
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
