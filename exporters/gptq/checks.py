"""What a plan means for GPTQ loaders, said before any work: refusals (no loader takes it) and notes (some do not).

What is said of transformers 5.23 + optimum 2.3 + gptqmodel 7.6 and of the onnxruntime-genai 0.18 builder is run by
`runtime_tests/test_gptq.py`. What is said of gptqmodel alone, auto-round 0.16, vLLM 0.32 (CPU), llama.cpp's converter
and Intel Neural Compressor 3.10 was run once, in the study before this repository; GPU loaders (Marlin, SGLang,
ExLlamaV2) are known from their source only (docs/formats.md, "Loaders").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from signround.errors import Refusal
from signround.grid import Grid
from signround.plan import LayerPlan, ModelPlan

from .config import V1, V2
from .packing import BITS, BLOCK

SUBJECT = "gptq"
VLLM_GROUPS = (None, 32, 64, 128)
ONNX_BLOCKS = (16, 32, 64, 128, 256)


def holds(grid: Grid) -> bool:
    """Whether GPTQ can store the grid: one fp16 scale and one integer zero point a group."""
    return grid.plain and grid.zero in ("centre", "point") and grid.bits in BITS


def refusals(plan: ModelPlan, checkpoint_format: str) -> list[Refusal]:
    """Every reason at once; layers with the same reason are one refusal."""
    family = plan.architecture.family
    if family.experts:
        problem = f"experts of {family.hf_class} are not written: GPTQ loaders disagree about how they are stored"
        return [Refusal(problem, "export this model to gguf instead", SUBJECT)]
    layers = list(plan.layers())
    found = []
    if plan.outer_layers:
        names = [layer.name for layer in plan.outer_layers]
        verb = "is" if len(names) == 1 else "are"
        problem = f"{' and '.join(names)} {verb} quantised, which GPTQ loaders do not read"
        next_step = (
            "choose a scheme that is one grid, such as w4g32, without --tensor-type for it, or export to gguf or onnx"
        )
        found.append(Refusal(problem, next_step, SUBJECT))
    linears = {name for block in plan.blocks for name in plan.architecture.block_linears(block.index)}
    floats = [kept.name for block in plan.blocks for kept in block.kept if kept.name in linears]
    if floats:
        problem = f"loaders take every linear of the blocks for quantised, and {_listed(floats)} is kept"
        found.append(Refusal(problem, "leave out --tensor-type for it, or leave out --to gptq", SUBJECT))
    for wrong, problem, next_step in _RULES:
        names = [layer.name for layer in layers if wrong(layer)]
        if names:
            found.append(Refusal(f"{problem}; {_listed(names)}", next_step, SUBJECT))
    inner = [layer for block in plan.blocks for layer in block.layers]
    if len({layer.grid for layer in inner}) > 1:
        found.append(
            Refusal(
                "one file has one grid for all linears (transformers with optimum ignores overrides without a word), "
                f"the plan has several; {_listed(_others(inner))} differs from {inner[0].name}",
                "choose a scheme with a single grid and no --tensor-type, or leave out --to gptq",
                SUBJECT,
            )
        )
    unfit = [layer.name for layer in layers if layer.grid.zero == "point" and layer.grid.zero_floor < 1]
    if unfit and checkpoint_format == V1:
        found.append(
            Refusal(
                "zero points may be 0, which GPTQ v1 files cannot hold (readers know three incompatible encodings): "
                "the artifact was tuned without GPTQ as a target",
                "quantize again with --to gptq (zero points stay >= 1), or set gptq.checkpoint_format=gptq_v2",
                SUBJECT,
            )
        )
    return found


Rule = tuple[Callable[[LayerPlan], bool], str, str]
_RULES: tuple[Rule, ...] = (
    (
        lambda layer: not holds(layer.grid),
        "the format holds 2, 3, 4 or 8 bits with one fp16 scale and an integer zero point a group; this is not one",
        "choose a w{2,3,4,8}g scheme, q4_0 or q8_0, or leave out --to gptq",
    ),
    (
        lambda layer: bool(layer.rows % BLOCK or layer.columns % BLOCK),
        f"loaders need outputs and inputs of every linear in multiples of {BLOCK}",
        "choose another format for this model",
    ),
    (
        lambda layer: holds(layer.grid) and layer.grid.ragged(layer.columns),
        "groups must divide the inputs (loaders disagree about an incomplete last group)",
        "choose a scheme with a smaller group, or one group a row (w4gc)",
    ),
)


def notes(plan: ModelPlan, checkpoint_format: str) -> list[str]:
    """Loaders that will refuse the file or read it wrongly, and what is left as it was."""
    layers = list(plan.layers())
    grid = layers[0].grid
    found = [*_bits_notes(grid), *_group_notes(grid, layers)]
    if grid.bits == 4 and grid.zero == "centre" and checkpoint_format == V1:
        found.insert(0, "gptq: 4 bits symmetric is the portable profile: every GPTQ loader we know reads it")
    if grid.zero == "point":
        found.append(
            "gptq: asymmetric files are refused by vLLM, by auto-round's torch backend and by gptqmodel itself "
            "(it wants its own signature in `meta`); transformers with optimum loads them"
        )
    if checkpoint_format == V2:
        found.append(
            "gptq: checkpoint_format gptq_v2 is read as v1, with wrong results and no error, by auto-round, by the "
            "onnxruntime-genai builder and by Intel Neural Compressor"
        )
    if any(kept.dtype == "float32" and kept.name.endswith(".bias") for kept in plan.kept()):
        found.append("gptq: gptqmodel keeps biases in float16, these are float32: logits move by about 1e-4")
    if not any((plan.files / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        found.append("gptq: the model has no tokenizer; gptqmodel and the onnxruntime-genai builder will not load it")
    return found


def _bits_notes(grid: Grid) -> list[str]:
    readers = {
        2: "transformers with optimum, gptqmodel, auto-round, the onnxruntime-genai builder and llama.cpp's converter "
        "load it; vLLM does not",
        3: "transformers with optimum, gptqmodel and auto-round load it; vLLM, the onnxruntime-genai builder and "
        "llama.cpp's converter do not",
        8: "most loaders read it; vLLM and SGLang on a CPU, and ExLlamaV2, do not",
    }
    return [f"gptq: {grid.bits} bits: {readers[grid.bits]}"] if grid.bits in readers else []


def _group_notes(grid: Grid, layers: Sequence[LayerPlan]) -> list[str]:
    found = []
    if grid.group not in VLLM_GROUPS:
        found.append(f"gptq: vLLM and the Marlin kernels take groups of 32, 64, 128 or a row, not of {grid.group}")
    if any(grid.group_of(layer.columns) not in ONNX_BLOCKS for layer in layers):
        found.append(
            "gptq: one group a row: onnxruntime takes blocks of 16, 32, 64, 128 or 256 only, the others load it"
        )
    if any(layer.columns % 128 or layer.rows % 64 for layer in layers):
        found.append("gptq: vLLM's Marlin kernels need inputs in multiples of 128 and outputs in multiples of 64")
    return found


def _others(layers: Sequence[LayerPlan]) -> list[str]:
    """Those whose grid is not that of the first."""
    return [layer.name for layer in layers if layer.grid != layers[0].grid]


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{rest}"
