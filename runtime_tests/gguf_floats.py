"""A .gguf of the float model: every linear kept, nothing quantised. For tests of names, permutation and metadata."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from exporters.gguf.tokenizer import read_tokenizer
from exporters.gguf.writer import write_gguf
from signround.checkpoint import SourceCheckpoint
from signround.plan import BlockPlan, CalibrationSpec, KeptTensor, ModelPlan, make_plan
from signround.qtensor import QuantizedTensor
from signround.recipes import settings_for


def float_plan(checkpoint: SourceCheckpoint) -> ModelPlan:
    """A plan that keeps every tensor."""
    settings = settings_for("rtn", context=64, samples=2, seqlen=16)
    plan = make_plan(checkpoint, "w4g32", settings, CalibrationSpec("self"))
    blocks = tuple(
        BlockPlan(
            block.index,
            (),
            block.kept
            + tuple(
                KeptTensor(
                    layer.name,
                    (layer.rows, layer.columns),
                    str(checkpoint.tensors[layer.name].dtype).removeprefix("torch."),
                    "float",
                )
                for layer in block.layers
            ),
        )
        for block in plan.blocks
    )
    return replace(plan, blocks=blocks)


def write_float_gguf(model: Path, target: Path, float_type: str = "f32") -> Path:
    """The float model of a Hugging Face folder as one .gguf file."""
    checkpoint = SourceCheckpoint(model)
    plan = float_plan(checkpoint)

    def nothing(name: str, rows: range) -> QuantizedTensor:
        raise AssertionError(f"{name} is not quantised")

    with open(target, "wb") as stream:
        written = list(
            write_gguf(
                stream,
                plan,
                tokenizer=read_tokenizer(model, plan.config, plan.architecture.vocabulary),
                fingerprint="float",
                float_type=float_type,
                quantized=nothing,
                kept=lambda name, rows: checkpoint.read(name)[rows.start : rows.stop],
            )
        )
    assert written
    return target
