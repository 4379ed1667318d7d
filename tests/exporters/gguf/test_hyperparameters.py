"""What a file says of each family, against gguf-py's names; and what llama.cpp would compute otherwise, by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf import Keys

from exporters.gguf.hyperparameters import CLASSES, hyperparameters, notes, refusals, rope_tensors
from signround.architecture import Architecture, read_architecture
from signround.families import FAMILIES
from signround.gguf_names import ARCHITECTURES

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 32, "tie_word_embeddings": True, "head_dim": 16,
}  # fmt: skip
GEMMA = {"query_pre_attn_scalar": 16}
DENSE = [name for name, family in FAMILIES.items() if family.experts is None]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [float(n) for n in range(1, 9)],
    "long_factor": [float(2 * n) for n in range(1, 9)],
}  # fmt: skip


def read(model_type: str, **changes: Any) -> Architecture:
    return read_architecture({"model_type": model_type, **SIZES, **changes})


def written(architecture: Architecture) -> dict[str, Any]:
    return {entry.key: entry.value for entry in hyperparameters(architecture)}


def test_every_family_has_its_class() -> None:
    assert set(ARCHITECTURES) == set(FAMILIES)
    assert set(CLASSES) == set(ARCHITECTURES.values())


@pytest.mark.parametrize(
    ("model_type", "changes", "wanted"),
    [
        (
            "gemma2", GEMMA | {"sliding_window": 8},
            {Keys.Attention.SLIDING_WINDOW: 8, Keys.LLM.ATTN_LOGIT_SOFTCAPPING: 50.0,
             Keys.LLM.FINAL_LOGIT_SOFTCAPPING: 30.0, Keys.Rope.FREQ_BASE: 1e4},
        ),
        (
            "gemma3_text", GEMMA | {"sliding_window": 8, "sliding_window_pattern": 2},
            {Keys.Attention.SLIDING_WINDOW: 8, Keys.Rope.FREQ_BASE: 1e6, Keys.Rope.FREQ_BASE_SWA: 1e4,
             Keys.Attention.SLIDING_WINDOW_PATTERN: [True, False, True, False]},
        ),
        ("phi3", {}, {Keys.Attention.SLIDING_WINDOW: 0, Keys.Rope.DIMENSION_COUNT: 16}),
        ("phi3", {"partial_rotary_factor": 0.75}, {Keys.Rope.DIMENSION_COUNT: 12}),
        (
            "phi3", {"rope_parameters": LONGROPE, "sliding_window": 8, "original_max_position_embeddings": 512},
            {Keys.Attention.SLIDING_WINDOW: 8, Keys.Rope.SCALING_ORIG_CTX_LEN: 512,
             Keys.Rope.SCALING_ATTN_FACTOR: pytest.approx(1.1547, rel=1e-4)},
        ),
        ("smollm3", {}, {Keys.Rope.FREQ_BASE: 2e6}),
        (
            "granite",
            {"attention_multiplier": 0.5, "embedding_multiplier": 12, "residual_multiplier": 0.25, "logits_scaling": 8},
            {Keys.Attention.SCALE: 0.5, Keys.LLM.EMBEDDING_SCALE: 12.0, Keys.LLM.RESIDUAL_SCALE: 0.25,
             Keys.LLM.LOGIT_SCALE: 8.0},
        ),
        ("olmo2", {}, {Keys.Attention.LAYERNORM_RMS_EPS: 1e-5}),
    ],
)  # fmt: skip
def test_keys_are_those_of_gguf_py(model_type: str, changes: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = written(read(model_type, **changes))
    named = {key.format(arch=ARCHITECTURES[model_type]): value for key, value in wanted.items()}
    assert {key: found[key] for key in named} == named


@pytest.mark.parametrize("model_type", DENSE)
def test_nothing_is_said_that_a_family_does_not_have(model_type: str) -> None:
    """A key too many may change what llama.cpp computes."""
    family = FAMILIES[model_type]
    found = written(read(model_type, **GEMMA))
    assert any("softcapping" in key for key in found) == (model_type == "gemma2")
    assert any(key.endswith("scale") for key in found) == family.multipliers
    assert any("sliding_window" in key for key in found) == (model_type in ("gemma2", "gemma3_text", "phi3"))
    assert not any("pattern" in key or "scaling" in key for key in found)


def test_long_and_short_factors_are_tensors() -> None:
    tensors = rope_tensors(read("phi3", rope_parameters=LONGROPE))
    assert list(tensors) == ["rope_factors_long.weight", "rope_factors_short.weight"]
    np.testing.assert_array_equal(tensors["rope_factors_long.weight"], np.arange(2, 18, 2, np.float32))
    assert rope_tensors(read("phi3")) == {}


@pytest.mark.parametrize(
    ("model_type", "changes", "fragment"),
    [
        ("qwen3", {"attention_bias": True}, "qwen3 has no place for biases of self_attn.o_proj"),
        ("smollm3", {"mlp_bias": True}, "no place for biases of mlp.down_proj, mlp.gate_proj, mlp.up_proj"),
        ("qwen2", {"rope_scaling": LLAMA3}, "qwen2 has no rope scaling 'llama3'"),
        ("smollm3", {"rope_scaling": LLAMA3}, "smollm3 has no rope scaling 'llama3'"),
        (
            "gemma3_text",
            GEMMA | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "no rope scaling 'linear' in windowed blocks",
        ),
        ("gemma2", {"query_pre_attn_scalar": 64}, "scales attention by 0.25, config.json says 0.125"),
        ("gemma3_text", {"query_pre_attn_scalar": 64}, "scales attention by 0.25, config.json says 0.125"),
        ("gemma2", GEMMA | {"attn_logit_softcapping": None}, "always caps scores and logits"),
        ("gemma2", GEMMA | {"final_logit_softcapping": None}, "always caps scores and logits"),
        ("gemma2", GEMMA | {"tie_word_embeddings": False}, "takes the embedding for its head"),
        ("phi3", {"head_dim": 32}, "phi3 has heads of hidden / heads = 16 values, config.json says 32"),
        ("olmo2", {"head_dim": 32, "tie_word_embeddings": False}, "olmo2 has heads of hidden / heads = 16"),
        ("olmo2", {"tie_word_embeddings": True}, "olmo2 needs a head of its own"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "smollm3 has fixed blocks without positions"),
        ("granite", {"residual_multiplier": 0}, "takes a multiplier of 0 for none"),
    ],
)  # fmt: skip
def test_what_llama_cpp_computes_otherwise_is_refused(model_type: str, changes: dict[str, Any], fragment: str) -> None:
    (refusal,) = refusals(read(model_type, **changes))
    assert fragment in refusal.sentence()


@pytest.mark.parametrize("model_type", DENSE)
def test_the_published_shape_of_each_family_is_not_refused(model_type: str) -> None:
    changes = GEMMA | ({"tie_word_embeddings": False} if model_type == "olmo2" else {})
    assert refusals(read(model_type, **changes)) == []


def test_gemma_at_the_depth_where_llama_cpp_scales_by_hidden() -> None:
    """Gemma 2 27B: 46 blocks, hidden 4608, 32 heads of 128, query_pre_attn_scalar 144."""
    deep = {
        "num_hidden_layers": 46, "hidden_size": 4608, "num_attention_heads": 32, "num_key_value_heads": 16,
        "head_dim": 128,
    }  # fmt: skip
    assert refusals(read("gemma2", **deep, query_pre_attn_scalar=144)) == []
    (refusal,) = refusals(read("gemma2", **deep, query_pre_attn_scalar=128))
    assert "46 blocks" in refusal.sentence()


def test_notes_tell_what_long_texts_meet() -> None:
    assert "ignores the sliding window of Phi3ForCausalLM; up to 8 tokens" in notes(read("phi3", sliding_window=8))[0]
    assert notes(read("gemma3_text", **GEMMA, sliding_window=8)) == []
    (note,) = notes(read("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=512))
    assert "long rope factors when its context is set above 512 tokens" in note
