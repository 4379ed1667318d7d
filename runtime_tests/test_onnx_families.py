"""Dense families beyond those of `test_onnx.py` as ONNX decoders, against transformers on the decoded weights.

Whole texts, chunks, single steps with the cache, padded batches. Windows are shorter than the texts, and longrope's
texts longer than its first context.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exporters.onnx.exporter import OnnxExporter
from runtime_tests import test_onnx
from runtime_tests.onnx_steps import stepper, tokens_of
from runtime_tests.test_onnx import all_logits, reference_model, relative_error
from signround import quantize
from signround.artifact import QuantizedCheckpoint
from signround.events import silent
from signround.parity import compare_weights, verify
from signround.runtimes.genai import open_genai
from signround.runtimes.ort import open_onnxruntime
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import DENSE, write_small_model

pytest.importorskip("onnxruntime")

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GLOBAL = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
LOCAL = {"rope_type": "default", "rope_theta": 2e4}
WINDOWED = {"use_sliding_window": True, "sliding_window": 8}


def longrope(width: int, **others: Any) -> dict[str, Any]:
    """Factors of `width` frequencies, trained on 64 tokens."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * index for index in range(width)],
        "long_factor": [1.5 + 0.5 * index for index in range(width)],
    }  # fmt: skip
    return {"original_max_position_embeddings": 64, "rope_parameters": rope | others}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in DENSE if family not in test_onnx.FAMILIES},
    "llama-heads-of-24": ("llama", {"head_dim": 24}),  # too odd for GroupQueryAttention's rotary kernel
    "mistral-windowed": ("mistral", {"sliding_window": 16}),
    "mistral-window-of-1": ("mistral", {"sliding_window": 1}),
    "mistral-windowed-heads-of-40": ("mistral", {"sliding_window": 5, "head_dim": 40}),
    "qwen2-upper-blocks-windowed": ("qwen2", {**WINDOWED, "max_window_layers": 1}),
    "qwen3-windowed": ("qwen3", {**WINDOWED, "max_window_layers": 0}),
    "qwen3-heads-of-24": ("qwen3", {"head_dim": 24}),
    "gemma2-other-pattern": ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
    "gemma2-uncapped": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2-linear": ("gemma2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "gemma2-heads-of-24": ("gemma2", {"head_dim": 24}),
    "gemma3-pattern-of-6": ("gemma3", {"layers": 7, "layer_types": None}),
    "gemma3-no-window": ("gemma3", {"layer_types": ["full_attention", "full_attention"]}),
    "gemma3-windows-only": ("gemma3", {"layer_types": ["sliding_attention", "sliding_attention"]}),
    "gemma3-capped": ("gemma3", {"final_logit_softcapping": 5.0}),
    "gemma3-scaled": ("gemma3", {"rope_parameters": {"full_attention": GLOBAL, "sliding_attention": LOCAL}}),
    "gemma3-one-key-head": ("gemma3", {"num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256}),
    "gemma3-untied": ("gemma3", {"tie_word_embeddings": False}),
    "phi3-windowed": ("phi3", {"sliding_window": 16}),
    "phi3-tied": ("phi3", {"tie_word_embeddings": True}),
    "phi3-longrope": ("phi3", longrope(16)),
    "phi3-longrope-windowed": ("phi3", {"sliding_window": 7, **longrope(16)}),
    "phi4-mini-half": ("phi3", longrope(8, partial_rotary_factor=0.5)),  # within GroupQueryAttention's rotary kernel
    "phi4-mini-factor": ("phi3", longrope(16, attention_factor=1.3)),
    "smollm3-untied": ("smollm3", {"tie_word_embeddings": False, "layers": 5, "attention_bias": False}),
    "smollm3-windowed": ("smollm3", {**WINDOWED, "no_rope_layers": [1, 0, 0, 1]}),
    "smollm3-never-rotates": ("smollm3", {"no_rope_layers": [0, 0, 0, 0]}),
    "granite-biased": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "granite-llama3": ("granite", {"rope_parameters": LLAMA3}),
    "olmo2-ungrouped": ("olmo2", {"num_key_value_heads": 4}),
    "olmo2-biased": ("olmo2", {"attention_bias": True}),
}
SCHEMES = ("w4g32", "w2g64-asym", "w3g32", "w8g128-asym")
STEPPED = (
    "llama-heads-of-24", "mistral-windowed", "qwen2-upper-blocks-windowed", "qwen3-windowed", "gemma2", "gemma3",
    "phi3-windowed", "phi4-mini-like", "smollm3-windowed", "granite", "olmo2",
)  # fmt: skip

Exported = Callable[[str], tuple[QuantizedCheckpoint, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """(artifact, ONNX folder at level 0) of a variant."""
    made: dict[str, tuple[QuantizedCheckpoint, Path]] = {}

    def make(variant: str) -> tuple[QuantizedCheckpoint, Path]:
        if variant not in made:
            family, overrides = VARIANTS[variant]
            folder = tmp_path_factory.mktemp(variant)
            write_small_model(folder / "model", family, **overrides)
            scheme = SCHEMES[list(VARIANTS).index(variant) % len(SCHEMES)]
            artifact = write_rounded_artifact(folder / "model", folder / "artifact", scheme)
            assert OnnxExporter(0).refusals(artifact.plan) == []
            OnnxExporter(0).export(artifact, folder / "onnx", silent)
            made[variant] = artifact, folder / "onnx"
        return made[variant]

    return make


def lengths_of(artifact: QuantizedCheckpoint) -> tuple[int, ...]:
    """Texts that reach every rule: windows, waves that llama3 slows, both sides of longrope's context."""
    rope = artifact.plan.architecture.rope
    return (40, rope.original_context + 30) if rope.kind == "longrope" else (100 if rope.kind == "llama3" else 40,)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_whole_texts_are_transformers(exported: Exported, variant: str) -> None:
    artifact, folder = exported(variant)
    model, runtime = reference_model(artifact), open_onnxruntime(folder, threads=1)
    for length in lengths_of(artifact):
        windows = tokens_of(2, length)
        assert relative_error(all_logits(runtime.logits(windows)), model(windows).logits) <= 1e-5, length


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_is_read_back_exactly(exported: Exported, variant: str) -> None:
    """Through onnxruntime's MatMulNBits and the onnx package; Gemma's norms are stored with their 1."""
    artifact, folder = exported(variant)
    exporter = OnnxExporter(0)
    found = exporter.opened(folder)
    assert set(found.added.values()) == ({1.0} if "gemma" in variant else set())
    parity = compare_weights(artifact, exporter, found)
    assert parity.reader == "independent"
    assert parity.exact == parity.tensors > 0


@pytest.mark.parametrize("variant", STEPPED)
@torch.no_grad()
def test_chunks_and_single_steps_are_the_whole_text(exported: Exported, variant: str) -> None:
    artifact, folder = exported(variant)
    windows = tokens_of(1, 40)
    wanted = reference_model(artifact)(windows).logits
    conversation = stepper(folder)
    cuts = [0, 19, 26, *range(27, 35), 40]
    pieces = [conversation.feed(windows[:, start:end]) for start, end in pairwise(cuts)]
    assert relative_error(torch.cat(pieces, 1), wanted) <= 1e-5


@pytest.mark.parametrize("variant", STEPPED)
@torch.no_grad()
def test_padded_batches_are_their_rows(exported: Exported, variant: str) -> None:
    """Right padding, then steps of the whole batch; each row has lengths and positions of its own."""
    artifact, folder = exported(variant)
    model, windows, lengths = reference_model(artifact), tokens_of(3, 40), (30, 22, 9)
    prompt = torch.stack(
        [row[:30].where(torch.arange(30) < length, 1) for row, length in zip(windows, lengths, strict=True)]
    )
    conversation = stepper(folder)
    rows: list[list[Tensor]] = [
        [logits[:length]] for logits, length in zip(conversation.feed(prompt, lengths), lengths, strict=True)
    ]
    for step in range(5):
        fed = torch.stack([row[length + step] for row, length in zip(windows, lengths, strict=True)])
        for row, logits in zip(rows, conversation.feed(fed[:, None]), strict=True):
            row.append(logits)
    for row, window, length in zip(rows, windows, lengths, strict=True):
        wanted = model(window[None, : length + 5]).logits[0]
        assert relative_error(torch.cat(row), wanted) <= 1e-5, length


@pytest.mark.parametrize("variant", ["phi3-longrope", "phi4-mini-half", "phi4-mini-like"])
@torch.no_grad()
def test_growing_past_longropes_first_context(exported: Exported, variant: str) -> None:
    """Keys cached before keep the short factors, as in transformers' cache; a text read again has the long ones."""
    artifact, folder = exported(variant)
    model, start = reference_model(artifact), artifact.plan.architecture.rope.original_context - 3
    windows = tokens_of(1, start + 8)
    conversation, past = stepper(folder), None
    for first, last in [(0, start), *((index, index + 1) for index in range(start, start + 8))]:
        output = model(windows[:, first:last], past_key_values=past, use_cache=True)
        past = output.past_key_values
        assert relative_error(conversation.feed(windows[:, first:last]), output.logits) <= 1e-5, first
    again = stepper(folder).feed(windows)
    assert relative_error(again, model(windows).logits) <= 1e-5
    assert relative_error(output.logits[:, -1], again[:, -1]) > 1e-3


@pytest.mark.parametrize("variant", STEPPED)
@torch.no_grad()
def test_genai_generates_what_transformers_does(exported: Exported, variant: str) -> None:
    """Its cache is one buffer, longer than the text; windows slide within it."""
    pytest.importorskip("onnxruntime_genai")
    artifact, folder = exported(variant)
    prompt, model, genai = tokens_of(1, 20), reference_model(artifact), open_genai(folder)
    wanted = model.generate(prompt, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert torch.equal(genai.greedy(prompt[0], 24), wanted[0, 20:])


def test_level_4_passes_the_gate_and_the_main_job_runs(tmp_path: Path) -> None:
    """Self-written calibration, tuning, export, verification of the family that has most of its own rules."""
    model = write_small_model(tmp_path / "model", "gemma3", tokenizer="llama2", initializer_range=0.04)
    report = quantize(model, "w4g32", tmp_path / "out", ["onnx"], samples=8, seqlen=32, iters=20, batch_size=4)
    weights = report["exports"]["onnx"]["weights"]
    assert weights["exact"] == weights["tensors"]
    assert report["exports"]["onnx"]["logits"]["passed"]
    assert any(block["loss_tuned"] < block["loss_rounded"] for block in report["tuning"]["blocks"])


@pytest.mark.parametrize("variant", ["gemma2", "phi4-mini-like", "granite", "olmo2", "smollm3"])
def test_verify_says_so(exported: Exported, variant: str) -> None:
    artifact, folder = exported(variant)
    exporter = OnnxExporter(0)
    parity = verify(artifact, exporter, exporter.opened(folder), tokens_of(4, 32))
    assert parity.weights.passed
    assert parity.exact_logits is not None
    assert parity.exact_logits.passed
