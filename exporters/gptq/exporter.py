"""GptqExporter: artifact -> a Hugging Face folder that GPTQ loaders read.

One tensor in memory at a time: every file is laid out from the plan's shapes, then filled. Unquantised tensors keep
their own dtype, so nothing is lost. Refuses at plan time what no loader takes; never emits act-order, `meta`, a
quantised head or mixed grids.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from signround.artifact import QuantizedCheckpoint
from signround.checkpoint import TOKENIZER_FILES
from signround.errors import FailedError, Refusal, RefusedError, refuse
from signround.events import Listener, StageAdvanced, StageStarted
from signround.exporting import ExportedModel
from signround.files import folder_written_whole, write_json
from signround.grid import Grid
from signround.plan import KeptTensor, LayerPlan, ModelPlan
from signround.qtensor import QuantizedTensor
from signround.safetensors_stream import FileLayout, SafetensorsWriter, TensorSpec, lay_out, split

from . import checks
from .config import CHECKPOINT_FORMATS, V1, GptqFormat, format_of, model_config, read_format
from .independent import decoded_by_other_reader
from .packing import PARTS, layout, pack_linear, unpack_linear

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT = ".weight"


METADATA = {"format": "pt"}  # transformers asks for it


@dataclass(frozen=True)
class GptqExporter:
    """`checkpoint_format`: gptq (v1, what every loader reads) or gptq_v2. `max_shard_bytes`: tensors in one file.

    Source of the layout: AutoGPTQ / GPTQModel `qlinear`, https://github.com/ModelCloud/GPTQModel.
    """

    checkpoint_format: str = V1
    max_shard_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        if self.checkpoint_format not in CHECKPOINT_FORMATS:
            raise refuse(
                f"checkpoint_format {self.checkpoint_format!r} is not known; allowed: {', '.join(CHECKPOINT_FORMATS)}",
                "leave it at gptq unless a loader asks for v2",
                "gptq",
            )
        if self.max_shard_bytes < 1:
            raise refuse(
                f"max_shard_bytes must be positive, got {self.max_shard_bytes}", "give a size in bytes", "gptq"
            )

    @property
    def name(self) -> str:
        return "gptq"

    @property
    def zero_floor(self) -> int:
        return 1 if self.checkpoint_format == V1 else 0

    @property
    def file_types(self) -> bool:
        return False

    def holds(self, grid: Grid, columns: int) -> bool:
        """See `Exporter.holds`."""
        return checks.holds(grid) and not grid.ragged(columns)

    def more_exact(self, plan: ModelPlan) -> None:
        """GPTQ loaders do not round activations."""

    def refusals(self, plan: ModelPlan) -> list[Refusal]:
        return checks.refusals(plan, self.checkpoint_format)

    def notes(self, plan: ModelPlan) -> list[str]:
        return checks.notes(plan, self.checkpoint_format)

    def estimated_bytes(self, plan: ModelPlan) -> int:
        """Exact for the weights; config and tokenizer files as they lie in the source folder."""
        weights = sum(file.bytes for file in self._files(plan).values())
        return weights + sum(path.stat().st_size for path in plan.files.iterdir() if path.name in _CARRIED)

    def export(self, artifact: QuantizedCheckpoint, out: Path, on_event: Listener) -> ExportedModel:
        plan = artifact.plan
        refusals = self.refusals(plan)
        if refusals:
            raise RefusedError(refusals)
        files = self._files(plan)
        total = sum(len(file.specs) for file in files.values())
        on_event(StageStarted("export", f"gptq: {len(files)} file(s)", total))
        with folder_written_whole(out) as folder:
            done = 0
            for name, file in files.items():
                with SafetensorsWriter(folder / name, file) as writer:
                    for spec_name, tensor in self._tensors(artifact, file):
                        writer.write(spec_name, tensor)
                        done += 1
                        on_event(StageAdvanced("export", done, total, spec_name))
            self._write_side_files(plan, folder, files)
        return self.opened(out)

    def opened(self, target: Path) -> ExportedModel:
        read_format(target)
        files = tuple(sorted(path for path in target.iterdir() if path.is_file()))
        if not any(path.suffix == ".safetensors" for path in files):
            raise refuse("the folder has no *.safetensors file", "give a whole GPTQ folder", str(target))
        return ExportedModel(self.name, target, files)

    def read_back(self, exported: ExportedModel) -> Iterator[tuple[str, QuantizedTensor]]:
        gptq = read_format(exported.target)
        for path in exported.files:
            if path.suffix == ".safetensors":
                for module in _packed_modules(path):
                    yield module + WEIGHT, _read_linear(path, module, gptq)

    def decode_independently(self, exported: ExportedModel) -> Iterator[tuple[str, Tensor]]:
        """Through gptqmodel's torch kernel when it is installed, else through the onnxruntime-genai builder."""
        return decoded_by_other_reader(exported, read_format(exported.target))

    # ---- parts

    def _files(self, plan: ModelPlan) -> dict[str, FileLayout]:
        """File name -> layout, in the order in which they are written."""
        shards = split(_modules(plan), self.max_shard_bytes)
        count = len(shards)
        names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        return {name: lay_out(specs, METADATA) for name, specs in zip(names, shards, strict=True)}

    def _tensors(self, artifact: QuantizedCheckpoint, file: FileLayout) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of one file, one linear (or kept tensor) resident."""
        inside = {spec.name for spec in file.specs}
        for name in artifact.kept:
            if name in inside:
                yield name, artifact.tensor(name)
        for name in artifact.layers:
            module = name.removesuffix(WEIGHT)
            if f"{module}.{PARTS[0]}" not in inside:
                continue
            try:
                parts = pack_linear(artifact.quantized(name), self.zero_floor)
            except ValueError as error:
                raise FailedError(f"{name}: {error}; quantize again with --to gptq.") from error
            for part, tensor in parts.items():
                yield f"{module}.{part}", tensor

    def _write_side_files(self, plan: ModelPlan, folder: Path, files: dict[str, FileLayout]) -> None:
        gptq = format_of(next(plan.layers()).grid, self.checkpoint_format)
        write_json(folder / "config.json", model_config(plan.config, gptq))
        write_json(folder / "quantize_config.json", gptq.to_json())
        if len(files) > 1:
            weight_map = {spec.name: name for name, file in files.items() for spec in file.specs}
            size = sum(spec.bytes for file in files.values() for spec in file.specs)
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(folder / INDEX, index)
        for name in TOKENIZER_FILES:
            if (plan.files / name).is_file():
                shutil.copyfile(plan.files / name, folder / name)


_CARRIED = ("config.json", *TOKENIZER_FILES)


def _modules(plan: ModelPlan) -> list[list[TensorSpec]]:
    """Tensors that must share a file, in model order: a linear with its bias, or one kept tensor."""
    modules = [[_spec(kept)] for kept in plan.outer]
    for block in plan.blocks:
        kept = {tensor.name: _spec(tensor) for tensor in block.kept}
        linears = [_linear(layer, kept) for layer in block.layers]
        modules += [[spec] for spec in kept.values()]
        modules += linears
    return modules


def _spec(kept: KeptTensor) -> TensorSpec:
    return TensorSpec(kept.name, kept.shape, kept.torch_dtype)


def _linear(layer: LayerPlan, kept: dict[str, TensorSpec]) -> list[TensorSpec]:
    """The parts of one linear; its bias is taken out of `kept`."""
    module = layer.name.removesuffix(WEIGHT)
    shapes = layout(layer.rows, layer.columns, layer.grid)
    specs = [TensorSpec(f"{module}.{part}", shape, dtype) for part, (shape, dtype) in shapes.items()]
    bias = kept.pop(f"{module}.bias", None)
    return [*specs, bias] if bias else specs


def _packed_modules(path: Path) -> list[str]:
    """Names of the quantised linears in one file, sorted."""
    from safetensors import SafetensorError, safe_open

    suffix = f".{PARTS[0]}"
    try:
        with safe_open(path, framework="pt") as file:
            return sorted(name.removesuffix(suffix) for name in set(file.keys()) if name.endswith(suffix))
    except SafetensorError as error:
        raise FailedError(f"{path}: not a whole safetensors file ({error}); export the artifact again.") from error


def _read_linear(path: Path, module: str, gptq: GptqFormat) -> QuantizedTensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return unpack_linear(
                {part: file.get_tensor(f"{module}.{part}") for part in PARTS}, gptq.grid, gptq.zero_offset
            )
    except (SafetensorError, ValueError) as error:
        raise FailedError(f"{path}: {module}: {error}; export the artifact again.") from error
