"""OnnxExporter: artifact -> a folder that onnxruntime, onnxruntime-genai or transformers.js runs (`layouts`).

    model.onnx         the decoder graph (MatMulNBits, GroupQueryAttention), a few hundred kB
    model.onnx.data    every tensor
    genai_config.json  what onnxruntime-genai needs to know, beside the tokenizer files and config.json

Refuses, at plan time, grids that MatMulNBits cannot hold, head sizes that GroupQueryAttention cannot run, and experts
that QMoE cannot hold.
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
from exporters.onnx.genai import CONFIG, LONGEST, genai_config, tokenizer_note
from exporters.onnx.linear import Accuracy
from exporters.onnx.metadata import model_metadata
from exporters.onnx.packing import FAST_2_BIT_BLOCKS, block_of
from exporters.onnx.packing import refusal_of as grid_refusal
from exporters.onnx.parts import norm_addend
from exporters.onnx.reader import ADDED_KEY, DTYPE_KEY, added_to, decode_all, load_graph, read_quantized
from exporters.onnx.rope import positions_of, rotary_tables
from signround.artifact import QuantizedCheckpoint
from signround.errors import FailedError, Refusal, RefusedError, refuse
from signround.events import Listener, StageAdvanced
from signround.exporting import ExportedModel, missing_packages
from signround.files import folder_written_whole
from signround.grid import Grid
from signround.plan import ModelPlan
from signround.qtensor import QuantizedTensor
from signround.runtimes.onnx_files import find_graph

if TYPE_CHECKING:
    import onnx_ir as ir

LEVELS = (0, 1, 2, 3, 4)
WRITERS = ("onnx", "onnx_ir")
NODE_BYTES = 440  # a node, its names and metadata, in model.onnx


@dataclass(frozen=True)
class OnnxExporter:
    """`accuracy_level` is the precision of activations in MatMulNBits: 4 computes with int8 (fast), 0 with float32.
    `exact_down_proj` keeps down projections, where the outliers are, at 0: about half the difference to float32, for
    a token that takes some 1.2 times as long at 3 and 4 bits (at 2 and 8 bits there is no fast kernel). With
    `fallback`, the pipeline writes a model that misses its gate at level 4 again, first so, then at level 0.
    `layout` is the runtime whose folder is written: "genai" (plain onnxruntime too) or "transformers.js"."""

    accuracy_level: int = 4
    exact_down_proj: bool = False
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
        """Float activations in the down projections, where the outliers are; then everywhere."""
        if not self.fallback or self.accuracy_level != 4:
            return None
        if not self.exact_down_proj and self.weights == "matmulnbits":
            return replace(self, exact_down_proj=True)
        return replace(self, accuracy_level=0, exact_down_proj=False)

    def refusals(self, plan: ModelPlan) -> list[Refusal]:
        """See `Exporter.refusals`."""
        found = missing_packages(WRITERS, "onnx", "onnx")
        found += [] if self.accuracy_level in LEVELS else [self._level_refusal()]
        found += [refusal for grid in _grids(plan) if (refusal := grid_refusal(grid))]
        if plan.outer_layers:
            return [*found, _outer_refusal(plan)]
        form = self._form.refusals(plan)
        places = [] if form else layouts.refusals_of(self.layout, plan, self.dtype)
        return found + expert_refusals(plan) + form + places

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
        about_files = (tokenizer_note(plan.files), template_note(plan.files, self.layout))
        return [*notes, *expert_notes(plan), *self._form.notes(plan), *(note for note in about_files if note)]

    def _grid_notes(self, plan: ModelPlan, grid: Grid) -> Iterator[str]:
        blocks = {block_of(grid, layer.columns) for layer in plan.layers() if layer.grid == grid}
        if grid.bits == 3:
            yield "onnx: 3-bit codes are stored in 4-bit fields (onnxruntime runs 2, 4 and 8 bits) and take their size."
        if grid.group is None or {grid.group} != blocks:
            group = "whole rows" if grid.group is None else f"groups of {grid.group}"
            sizes = " and ".join(map(str, sorted(blocks)))
            yield f"onnx: {group} are stored as blocks of {sizes} that repeat their scale; the weights are the same."
        if grid.bits == 2 and not blocks <= set(FAST_2_BIT_BLOCKS):
            yield (
                "onnx: 2 bits in blocks of 16 have no fast kernel in onnxruntime (some 100 times slower); "
                "prefer w2g32 or w2g64."
            )
        if grid.bits in (2, 8) and (self.accuracy_level != 4 or self.exact_down_proj):
            yield (
                f"onnx: at accuracy_level {self._slowest} onnxruntime decodes {grid.bits}-bit weights again on "
                "every call (some 100 times slower); 4 is the level to ship."
            )

    @property
    def _slowest(self) -> int:
        return 0 if self.exact_down_proj else self.accuracy_level

    @property
    def _form(self) -> GraphForm:
        accuracy = Accuracy(self.accuracy_level, self.exact_down_proj)
        return GraphForm(self.flavour, self.weights, self.dtype, accuracy)

    def estimated_bytes(self, plan: ModelPlan) -> int:
        """See `Exporter.estimated_bytes`: the graph is laid out from shapes, and no tensor is read."""
        builder = build_decoder(plan, _NoTensors(), self._form)
        tensors = sum(value.const_value.nbytes for value in builder.constants.values() if value.const_value)
        return tensors + NODE_BYTES * len(builder.nodes) + size_of(self._side_files(plan, 1))

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
        model = self._model(build_decoder(plan, artifact, self._form), artifact)

        def advanced(done: int, total: int, name: str) -> None:
            on_event(StageAdvanced("export", done, total, name))

        with folder_written_whole(out) as folder:
            write(self._side_files(plan, count_data_files(model, places)), folder)
            save_chunks(model, folder, places, advanced)
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
        problems = problems_of(model, find_graph(target).parent)
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

    def quantized(self, name: str) -> QuantizedTensor:
        raise LookupError(name)

    def tensor(self, name: str) -> Tensor:
        raise LookupError(name)


def _outer_refusal(plan: ModelPlan) -> Refusal:
    problem = f"{plan.outer_layers[0].name} is quantised, which this format cannot hold yet"
    return Refusal(problem, "choose a scheme that is one grid, such as w4g32, or export to gguf", "onnx")


def _grids(plan: ModelPlan) -> list[Grid]:
    """The distinct grids of a plan, in order of appearance."""
    return list(dict.fromkeys(layer.grid for layer in plan.layers()))
