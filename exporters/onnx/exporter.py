"""OnnxExporter: artifact -> a folder that onnxruntime and onnxruntime-genai run.

    model.onnx         the decoder graph (MatMulNBits, GroupQueryAttention), a few hundred kB
    model.onnx.data    every tensor
    genai_config.json  what onnxruntime-genai needs to know, beside the tokenizer files and config.json

Refuses, at plan time, grids that MatMulNBits cannot hold and head sizes that GroupQueryAttention cannot run.
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

from exporters.onnx import contrib
from exporters.onnx.builder import GraphBuilder
from exporters.onnx.checker import problems_of
from exporters.onnx.decoder import build_decoder
from exporters.onnx.genai import CONFIG, LONGEST, genai_config, tokenizer_note
from exporters.onnx.linear import FAST_LEVEL, Accuracy, is_down_projection
from exporters.onnx.packing import FAST_2_BIT_BLOCKS, block_of, has_float_kernel
from exporters.onnx.packing import refusal_of as grid_refusal
from exporters.onnx.reader import DATA, GRAPH, decode_all, load_graph, read_quantized
from exporters.onnx.rope import positions_of
from exporters.onnx.saving import save_graph
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

LEVELS = (0, 1, 2, 3, FAST_LEVEL)
WRITERS = ("onnx", "onnx_ir")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
NODE_BYTES = 440  # a node, its names and metadata, in model.onnx
CARRIED = ("config.json", *TOKENIZER_FILES)


@dataclass(frozen=True)
class OnnxExporter:
    """`accuracy_level` is the precision of activations in MatMulNBits: 4 computes with int8 (fast), 0 with float32.
    `exact_down_proj` keeps down projections of 3 and 4 bits, where the outliers are, at 0: about half the difference to
    float32, for a token that takes some 1.2 times as long. `keep_fast` keeps products of 2 and 8 bits at 4 whatever
    `accuracy_level` says: below, onnxruntime decodes the weight on every call. With `fallback`, the pipeline writes a
    model that misses its gate at level 4 again, first with exact down projections, then with level 0 wherever it is
    fast."""

    accuracy_level: int = 4
    exact_down_proj: bool = False
    keep_fast: bool = False
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
        """Float activations in the down projections, where the outliers are; then everywhere. Not in products of 2 and
        8 bits, which onnxruntime would compute a hundred times as slowly: whoever wants that asks for level 0."""
        fast = [has_float_kernel(layer.grid) for layer in plan.products()]
        if not self.fallback or self.accuracy_level != 4 or not any(fast):
            return None
        down = any(is_down_projection(layer) and has_float_kernel(layer.grid) for layer in plan.products())
        if down and not self.exact_down_proj:
            return replace(self, exact_down_proj=True)
        return replace(self, accuracy_level=0, exact_down_proj=False, keep_fast=not all(fast))

    def refusals(self, plan: ModelPlan) -> list[Refusal]:
        """See `Exporter.refusals`."""
        found = missing_packages(WRITERS, "onnx", "onnx")
        found += [] if self.accuracy_level in LEVELS else [self._level_refusal()]
        family = plan.architecture.family
        if family.model_type not in FAMILIES:
            problem = f"the decoder graph of {family.hf_class} is not written yet; {', '.join(FAMILIES)} models are"
            others = "gguf" if family.experts else "gguf or gptq"
            return [*found, Refusal(problem, f"export this model to {others} instead", "onnx")]
        found += [
            replace(refusal, problem=f"{refusal.problem}: {_listed(plan, grid)}")
            for grid in _grids(plan)
            if (refusal := grid_refusal(grid))
        ]
        head = contrib.refusal_of(plan.architecture)
        return [*found, head] if head else found

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
    def _accuracy(self) -> Accuracy:
        return Accuracy(self.accuracy_level, self.exact_down_proj, self.keep_fast)

    def estimated_bytes(self, plan: ModelPlan) -> int:
        """See `Exporter.estimated_bytes`: the graph is laid out from shapes, and no tensor is read."""
        builder = build_decoder(plan, _NoTensors(), self._accuracy)
        tensors = sum(value.const_value.nbytes for value in builder.constants.values() if value.const_value)
        carried = sum(path.stat().st_size for path in _carried_files(plan))
        config = len(json.dumps(genai_config(plan, GRAPH), indent=2))
        return tensors + NODE_BYTES * len(builder.nodes) + carried + config

    def export(self, artifact: QuantizedCheckpoint, out: Path, on_event: Listener) -> ExportedModel:
        """See `Exporter.export`. One weight (or one fused q, k, v) is in memory at a time."""
        plan = artifact.plan
        refusals = self.refusals(plan)
        if refusals:
            raise RefusedError(refusals)
        builder = build_decoder(plan, artifact, self._accuracy)
        model = self._model(builder, artifact)

        def advanced(name: str, done: int, total: int) -> None:
            on_event(StageAdvanced("export", done, total, name))

        with folder_written_whole(out) as folder:
            save_graph(model, builder.views, folder / GRAPH, DATA, advanced)
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
        model = builder.model("decoder", contrib.OPSET, contrib.IR_VERSION, "signround", version("signround"))
        model.metadata_props.update(
            {
                "signround.scheme": plan.scheme,
                "signround.artifact": artifact.fingerprint,
                "signround.source_sha256": plan.source_sha256,
                "signround.accuracy_level": str(self.accuracy_level),
            }
        )
        return model

    def opened(self, target: Path) -> ExportedModel:
        """See `Exporter.opened`."""
        problems = problems_of(load_graph(target), target)
        if problems:
            raise refuse(f"the graph is not sound ({problems[0]})", "export the artifact again", str(target))
        files = tuple(sorted(path for path in target.iterdir() if path.is_file()))
        return ExportedModel(self.name, target, files)

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

    def tensor(self, name: str) -> Tensor:
        raise LookupError(name)


def _grids(plan: ModelPlan) -> list[Grid]:
    """The distinct grids of a plan, in order of appearance."""
    return list(dict.fromkeys(layer.grid for layer in plan.layers()))


def _listed(plan: ModelPlan, grid: Grid) -> str:
    """The matrices of one grid, the first by name."""
    names = [layer.name for layer in plan.layers() if layer.grid == grid]
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _carried_files(plan: ModelPlan) -> list[Path]:
    return [plan.files / name for name in CARRIED if (plan.files / name).is_file()]
