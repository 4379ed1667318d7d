"""Mixtures of experts in llama.cpp itself: the job from plan to verdict, and proof that the refusals are needed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from exporters.gguf.exporter import GgufExporter
from runtime_tests.gguf_floats import float_plan, write_float_gguf
from runtime_tests.test_gguf import log_probabilities, runtime_logits, some_windows, transformers_logits
from signround.checkpoint import SourceCheckpoint
from signround.errors import FailedError
from signround.evaluate import evaluate_target
from signround.events import silent
from signround.parity import ROUTED, verify
from signround.pipeline import quantize
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import MIXTURES, write_small_model

if not any(importlib.util.find_spec(module) for module in ("llama_cpp", "xllamacpp")):
    pytest.skip("needs llama-cpp-python or xllamacpp", allow_module_level=True)

# One family has every part there is (a shared expert too); the others take long on a busy machine.
FIRST = [
    pytest.param(family, marks=[] if family == "qwen2-moe" else pytest.mark.slow, id=family) for family in MIXTURES
]
TEXT = "\n".join(f"word{i} {i * 7919} some more text number {i}" for i in range(1500))


def report_file(report: dict[str, Any], folder: Path) -> Path:
    (file,) = report["exports"]["gguf"]["files"]
    return folder / "out" / str(file["path"])


def worst_difference(model: Path, file: Path) -> float:
    windows = some_windows(tokens=32, count=1)
    found = log_probabilities(runtime_logits(file, windows))
    return float((found - log_probabilities(transformers_logits(model, windows))).abs().max())


@pytest.mark.parametrize("family", FIRST)
def test_the_main_job(family: str, tmp_path: Path) -> None:
    """Tuned in a few steps, rounded where no token came, exported, verified; evaluated from each of its forms."""
    model = write_small_model(tmp_path / "model", family)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = tmp_path / "out"
    report = quantize(
        model, "w4g32", out, ["gguf"], calibration=str(text), samples=16, seqlen=32, iters=10, batch_size=4
    )
    assert all(block["loss_tuned"] < block["loss_rounded"] for block in report["tuning"]["blocks"])
    assert all(block["expert_tokens"] for block in report["tuning"]["blocks"])
    gguf = report["exports"]["gguf"]
    assert gguf["weights"]["reader"] == "independent"
    assert gguf["weights"]["exact"] == gguf["weights"]["tensors"]
    assert gguf["logits"]["gate"] == {name: value for name, value in vars(ROUTED).items() if value is not None}
    assert gguf["passed"]
    short = tmp_path / "short.txt"
    short.write_text(TEXT[:400])
    float_model, tuned = (evaluate_target(path, short, context=32).perplexity for path in (model, out / "artifact"))
    assert tuned == pytest.approx(float_model, rel=0.5)


def test_a_mixed_file_type(tmp_path: Path) -> None:
    """Rounded without tuning, in llama.cpp's mix for 8 experts: one type a stack, 8 bits for keys and values."""
    model = write_small_model(
        tmp_path / "model", "mixtral", hidden_size=256, num_local_experts=8, num_attention_heads=4
    )
    report = quantize(model, "q4_k_m", tmp_path / "out", ["gguf"], method="rtn", samples=4, seqlen=32)
    assert report["exports"]["gguf"]["passed"]
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(report_file(report, tmp_path)).tensors}
    assert types["blk.0.attn_v.weight"] == types["blk.1.attn_k.weight"] == "Q8_0"
    assert types["blk.0.ffn_gate_exps.weight"] == "Q4_K"
    assert types["blk.1.ffn_down_exps.weight"] == "Q6_K"
    assert types["blk.1.ffn_gate_inp.weight"] == "F32"


@pytest.mark.parametrize("family", FIRST)
def test_half_precision_leaves_routing_alone(family: str, tmp_path: Path) -> None:
    """Routers stay float32 in a float16 file, so the verdict is that of the file without the cast."""
    model = write_small_model(tmp_path / "model", family)
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32")
    exporter = GgufExporter(float_type="f16")
    parity = verify(artifact, exporter, exporter.export(artifact, tmp_path / "gguf", silent), some_windows(32, 2))
    assert parity.weights.passed


@pytest.mark.parametrize(("family", "truth"), [("qwen2-moe", True), ("qwen3-moe", False)])
def test_llama_cpp_has_its_own_mind_about_norm_topk_prob(family: str, truth: bool, tmp_path: Path) -> None:
    """What `refusals` refuses: the file runs, as the model with the other setting."""
    model = write_small_model(tmp_path / "model", family, norm_topk_prob=truth)
    assert "norm_topk_prob" in GgufExporter().refusals(float_plan(SourceCheckpoint(model)))[0].sentence()
    file = write_float_gguf(model, tmp_path / "float.gguf")
    assert worst_difference(model, file) > 1e-2
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"norm_topk_prob": not truth}))
    assert worst_difference(model, file) < 1e-3


def test_llama_cpp_wants_a_head_for_qwen2_moe(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "qwen2-moe", tie_word_embeddings=True)
    with pytest.raises(FailedError, match=r"llama\.cpp could not run the file"):
        runtime_logits(write_float_gguf(model, tmp_path / "float.gguf"), some_windows(count=1))
