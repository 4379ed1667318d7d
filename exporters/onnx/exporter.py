"""OnnxExporter: artifact -> a folder that onnxruntime and onnxruntime-genai run.

    model.onnx         the decoder graph (MatMulNBits, GroupQueryAttention), a few hundred kB
    model.onnx.data    every tensor
    genai_config.json  what onnxruntime-genai needs to know, beside the tokenizer files and config.json

Refuses, at plan time, grids that MatMulNBits cannot hold, head sizes that GroupQueryAttention cannot run, and mixtures
of experts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from exporters.onnx.builder import GraphBuilder
from exporters.onnx.checker import problems_of
from exporters.onnx.contrib import ContribFlavour
from exporters.onnx.decoder import build_decoder
from exporters.onnx.genai import CONFIG, LONGEST, genai_config, tokenizer_note
from exporters.onnx.linear import Accuracy
from exporters.onnx.packing import FAST_2_BIT_BLOCKS, block_of
from exporters.onnx.packing import refusal_of as grid_refusal
from exporters.onnx.parts import norm_addend
from exporters.onnx.reader import ADDED_KEY, DATA, GRAPH, added_to, decode_all, load_graph, read_quantized
from exporters.onnx.rope import positions_of, rotary_tables
from signround.artifact import QuantizedCheckpoint
from signround.checkpoint import TOKENIZER_FILES
from signround.errors import FailedError, Refusal, RefusedError, refuse
from signround.events import Listener, StageAdvanced
from signround.exporting import ExportedModel, missing_packages
from signround.files import folder_written_whole
from signround.grid import Grid
from signround.plan import ModelPlan
from signround.qtensor import QuantizedTensor

if TYPE_CHECKING:
    import onnx_ir as ir

LEVELS = (0, 1, 2, 3, 4)
WRITERS = ("onnx", "onnx_ir")
INLINE_BYTES = 1024  # shape constants must stay in the graph: onnxruntime does not load them from outside
NODE_BYTES = 440  # a node, its names and metadata, in model.onnx
CARRIED = ("config.json", *TOKENIZER_FILES)


@dataclass(frozen=True)
class OnnxExporter:
    """`accuracy_level` is the precision of activations in MatMulNBits: 4 computes with int8 (fast), 0 with float32.
    `exact_down_proj` keeps down projections, where the outliers are, at 0: about half the difference to float32, for
    a token that takes some 1.2 times as long at 3 and 4 bits (at 2 and 8 bits there is no fast kernel). With
    `fallback`, the pipeline writes a model that misses its gate at level 4 again, first so, then at level 0."""

    accuracy_level: int = 4
    exact_down_proj: bool = False
    fallback: bool = True

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
        if not self.exact_down_proj:
            return replace(self, exact_down_proj=True)
        return replace(self, accuracy_level=0, exact_down_proj=False)

    def refusals(self, plan: ModelPlan) -> list[Refusal]:
        """See `Exporter.refusals`."""
        found = missing_packages(WRITERS, "onnx", "onnx")
        found += [] if self.accuracy_level in LEVELS else [self._level_refusal()]
        if plan.architecture.mixture:
            problem = (
                f"the decoder graph of {plan.architecture.family.hf_class}, a mixture of experts, is not written yet"
            )
            return [*found, Refusal(problem, "export this model to gguf instead", "onnx")]
        found += [refusal for grid in _grids(plan) if (refusal := grid_refusal(grid))]
        if plan.outer_layers:
            return [*found, _outer_refusal(plan)]
        return found + ContribFlavour.refusals(plan.architecture)

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
        if positions > LONGEST:
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
        tokenizer = tokenizer_note(plan.files)
        return [*notes, tokenizer] if tokenizer else notes

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
    def _accuracy(self) -> Accuracy:
        return Accuracy(self.accuracy_level, self.exact_down_proj)

    def estimated_bytes(self, plan: ModelPlan) -> int:
        """See `Exporter.estimated_bytes`: the graph is laid out from shapes, and no tensor is read."""
        builder = build_decoder(plan, _NoTensors(), self._accuracy)
        tensors = sum(value.const_value.nbytes for value in builder.constants.values() if value.const_value)
        carried = sum(path.stat().st_size for path in _carried_files(plan))
        config = len(json.dumps(genai_config(plan, GRAPH), indent=2))
        return tensors + NODE_BYTES * len(builder.nodes) + carried + config

    def export(self, artifact: QuantizedCheckpoint, out: Path, on_event: Listener) -> ExportedModel:
        """See `Exporter.export`. One weight (or one fused q, k, v) is in memory at a time."""
        import onnx_ir as ir

        plan = artifact.plan
        refusals = self.refusals(plan)
        if refusals:
            raise RefusedError(refusals)
        model = self._model(build_decoder(plan, artifact, self._accuracy), artifact)

        def advanced(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
            on_event(StageAdvanced("export", info.index + 1, info.total, tensor.name or ""))

        with folder_written_whole(out) as folder:
            ir.save(
                model,
                folder / GRAPH,
                external_data=DATA,
                size_threshold_bytes=INLINE_BYTES,
                callback=advanced,
            )
            (folder / CONFIG).write_text(json.dumps(genai_config(plan, GRAPH), indent=2) + "\n")
            for path in _carried_files(plan):
                shutil.copyfile(path, folder / path.name)
            problems = problems_of(load_graph(folder), folder)
            if problems:
                raise FailedError(
                    f"onnx: the written graph is not sound ({problems[0]}; {len(problems)} in all); "
                    "report this, nothing was written."
                )
        return self.opened(out)

    def _model(self, builder: GraphBuilder, artifact: QuantizedCheckpoint) -> ir.Model:
        plan = artifact.plan
        flavour = ContribFlavour
        model = builder.model("decoder", flavour.opset, flavour.ir_version, "signround", version("signround"))
        model.metadata_props.update(
            {
                "signround.scheme": plan.scheme,
                "signround.artifact": artifact.fingerprint,
                "signround.source_sha256": plan.source_sha256,
                "signround.accuracy_level": str(self.accuracy_level),
            }
        )
        if addend := norm_addend(plan):
            model.metadata_props[ADDED_KEY] = str(addend)
        return model

    def opened(self, target: Path) -> ExportedModel:
        """See `Exporter.opened`."""
        model = load_graph(target)
        problems = problems_of(model, target)
        if problems:
            raise refuse(f"the graph is not sound ({problems[0]})", "export the artifact again", str(target))
        files = tuple(sorted(path for path in target.iterdir() if path.is_file()))
        return ExportedModel(self.name, target, files, added=added_to(model))

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


def _carried_files(plan: ModelPlan) -> list[Path]:
    return [plan.files / name for name in CARRIED if (plan.files / name).is_file()]
