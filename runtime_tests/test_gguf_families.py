"""What sets families apart, in llama.cpp itself: windows, caps, multipliers, positions, norms + 1, fused linears.

`test_gguf.py` runs every family once; here are the numbers that config.json may vary. float32 files are compared with
transformers. llama.cpp looks GELU up in a table of fp16 values (ggml-cpu, `ggml_table_gelu_f16`), which moves the
log-probabilities of these small models by up to 2e-3, so Gemma is compared with transformers on the same table.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exporters.gguf.exporter import GgufExporter
from runtime_tests.gguf_floats import write_float_gguf
from runtime_tests.test_gguf import log_probabilities, runtime_logits, some_windows
from signround import quantize
from signround.events import silent
from signround.parity import verify
from signround.runtimes.llama_cpp import open_llama_cpp
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

if not any(importlib.util.find_spec(module) for module in ("llama_cpp", "xllamacpp")):
    pytest.skip("needs llama-cpp-python or xllamacpp", allow_module_level=True)

MIXED = {
    "gemma2": "q4_k_m", "gemma3": "iq4_xs", "phi3": "q3_k_m", "phi4-mini-like": "q5_k_m", "smollm3": "q2_k",
    "granite": "mobile", "olmo2": "q6_k",
}  # fmt: skip
WHOLE_BLOCKS = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
    "initializer_range": 0.04,
}  # fmt: skip
TABLE_ERROR = 2e-3  # measured 1.0e-3 (gemma2) and 1.3e-3 (gemma3)
DEEP_ERROR = 3e-3  # the same table through 46 blocks, where neighbouring entries are hit: measured 1.1e-3
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GLOBAL = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
LOCAL = {"rope_type": "default", "rope_theta": 2e4}
NARROW = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "query_pre_attn_scalar": 16}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2-46-blocks": ("gemma2", {**NARROW, "layers": 46}),  # llama.cpp scales by hidden / heads at this depth
    "gemma2-other-pattern": ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
    "gemma2-linear": ("gemma2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "gemma3-pattern-of-6": ("gemma3", {"layers": 7, "layer_types": None}),
    "gemma3-no-window": ("gemma3", {"layer_types": ["full_attention", "full_attention"]}),
    "gemma3-capped": ("gemma3", {"final_logit_softcapping": 5.0}),
    "gemma3-scaled": ("gemma3", {"rope_parameters": {"full_attention": GLOBAL, "sliding_attention": LOCAL}}),
    "gemma3-one-key-head": ("gemma3", {"num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256}),
    "gemma3-untied": ("gemma3", {"tie_word_embeddings": False}),
    "phi3-tied": ("phi3", {"tie_word_embeddings": True}),
    "smollm3-untied": ("smollm3", {"tie_word_embeddings": False, "layers": 5, "attention_bias": False}),
    "granite-biased": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "granite-llama3": ("granite", {"rope_parameters": LLAMA3}),
    "olmo2-ungrouped": ("olmo2", {"num_key_value_heads": 4}),
}


class TableGelu(nn.Module):
    """ggml's: tanh-GELU of the fp16 input, rounded to fp16; zero below -10, the input above 10."""

    def forward(self, x: Tensor) -> Tensor:
        looked_up = nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, looked_up))


def reference_logits(model: Path, windows: Tensor, *, table: bool, changes: Mapping[str, Any] | None = None) -> Tensor:
    """transformers in float32, eager; with ggml's GELU when `table`; with `changes` to config.json."""
    from transformers import AutoModelForCausalLM

    if changes:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    if table and "gelu" in json.loads((model / "config.json").read_text()).get("hidden_activation", ""):
        for layer in network.model.layers:
            layer.mlp.act_fn = TableGelu()
    with torch.no_grad():
        return network(windows).logits


def worst(found: Tensor, reference: Tensor) -> float:
    return float((log_probabilities(found) - log_probabilities(reference)).abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_number_reaches_llama_cpp(variant: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[variant]
    model = write_small_model(tmp_path / "model", family, **overrides)
    windows = some_windows(tokens=100 if "llama3" in variant else 32, count=1)
    found = runtime_logits(write_float_gguf(model, tmp_path / "float.gguf"), windows)
    allowed = DEEP_ERROR if "46" in variant else 1e-3
    assert worst(found, reference_logits(model, windows, table=True)) < allowed


def test_one_window_after_the_other(tmp_path: Path) -> None:
    """The cache of sliding windows must forget the window before."""
    model = write_small_model(tmp_path / "model", "gemma3")
    windows = some_windows(count=3)
    found = runtime_logits(write_float_gguf(model, tmp_path / "float.gguf"), windows)
    assert worst(found, reference_logits(model, windows, table=True)) < 1e-3


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_only_the_gelu_table_sets_gemma_apart(family: str, tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", family)
    windows = some_windows(count=1)
    found = runtime_logits(write_float_gguf(model, tmp_path / "float.gguf"), windows)
    assert worst(found, reference_logits(model, windows, table=True)) < 5e-4
    assert 5e-4 < worst(found, reference_logits(model, windows, table=False)) < TABLE_ERROR


@pytest.mark.parametrize(("tokens", "kind"), [(40, "short"), (300, "long")])
def test_longrope_takes_the_factors_of_the_context(tokens: int, kind: str, tmp_path: Path) -> None:
    """The model was trained on 256 tokens: llama.cpp decides by its context, transformers by the text."""
    model = write_small_model(tmp_path / "model", "phi4-mini-like", layers=1)
    windows = some_windows(tokens=tokens, count=1)
    found = runtime_logits(write_float_gguf(model, tmp_path / "float.gguf"), windows)
    assert worst(found, reference_logits(model, windows, table=False)) < 1e-3
    rope = json.loads((model / "config.json").read_text())["rope_parameters"]
    other = {"rope_parameters": rope | {f"{kind}_factor": rope["short_factor" if kind == "long" else "long_factor"]}}
    assert worst(found, reference_logits(model, windows, table=False, changes=other)) > 1e-2


def test_phi3_windows_are_ignored_as_the_note_says(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "phi3", sliding_window=16)
    windows = some_windows(tokens=32, count=1)
    found = runtime_logits(write_float_gguf(model, tmp_path / "float.gguf"), windows)
    wanted = reference_logits(model, windows, table=False)
    apart = (log_probabilities(found) - log_probabilities(wanted)).abs().amax(-1)[0]
    assert float(apart[:16].max()) < 1e-3 < float(apart[17:].max())


def phi3_tokens(folder: Path) -> None:
    """Make the tokenizer in `folder` one of Phi-3's kind: special tokens, but for three, swallow spaces after them."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    for text in ("<|endoftext|>", "<|user|>"):  # in place of the rarest pieces
        index = vocab.pop("".join(merges.pop()))
        data["added_tokens"].append({**data["added_tokens"][0], "id": index, "content": text})
    data["added_tokens"].sort(key=lambda entry: entry["id"])
    for entry in data["added_tokens"]:
        entry["rstrip"] = entry["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    data["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("strips", [True, False])
def test_the_name_of_a_model_tells_llama_cpp_how_phi3_reads_special_tokens(strips: bool, tmp_path: Path) -> None:
    """With "phi3" in its name a file of another tokenizer would not load; with other words Phi-3's would not strip."""
    from tokenizers import Tokenizer

    name = "tune" if strips else "phi3"
    model = write_small_model(tmp_path / name, "phi3", tokenizer="llama2", vocab_size=1024, layers=1)
    if strips:
        phi3_tokens(model)
    runtime = open_llama_cpp(write_float_gguf(model, tmp_path / "float.gguf"), threads=1)
    try:
        reference = Tokenizer.from_file(str(model / "tokenizer.json"))
        texts = ["<|user|>\n hello</s>  again<s> \n x<|endoftext|> y" if strips else "hello  again"]
        for text in texts:
            wanted = reference.encode(text, add_special_tokens=False).ids
            assert runtime.tokenize(text, add_special=False) == wanted
    finally:
        runtime.close()


@pytest.mark.parametrize("family", MIXED)
def test_mixed_files_are_verified(family: str, tmp_path: Path) -> None:
    """Every tensor through gguf-py, logits through llama.cpp: what `signround verify` says."""
    tokenizer = "llama2" if "gemma" in family else "llama3"
    model = write_small_model(tmp_path / "model", family, tokenizer=tokenizer, **WHOLE_BLOCKS)
    artifact = write_rounded_artifact(model, tmp_path / "artifact", MIXED[family], mixes=True)
    exporter = GgufExporter()
    assert exporter.refusals(artifact.plan) == []
    parity = verify(artifact, exporter, exporter.export(artifact, tmp_path / "gguf", silent), some_windows())
    assert parity.weights.reader == "independent"
    assert parity.weights.passed
    assert parity.logits is not None
    assert parity.logits.score.mean_kl is not None
    assert parity.logits.score.mean_kl < 1e-3


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name == "gemma2" else pytest.mark.slow) for name in MIXED]
)
def test_the_main_job(family: str, tmp_path: Path) -> None:
    """Self-written calibration, tuning, export, verification."""
    model = write_small_model(tmp_path / "model", family, tokenizer="llama2", **WHOLE_BLOCKS)
    report = quantize(
        model, MIXED[family], tmp_path / "out", ["gguf"], samples=8, seqlen=32, iters=20, batch_size=4,
    )  # fmt: skip
    weights = report["exports"]["gguf"]["weights"]
    assert weights["exact"] == weights["tensors"]
    assert report["exports"]["gguf"]["logits"]["mean_kl"] < 1e-3
    assert any(block["loss_tuned"] < block["loss_rounded"] for block in report["tuning"]["blocks"])
