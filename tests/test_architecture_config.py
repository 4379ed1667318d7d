"""read_architecture: what config.json means, and every refusal by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from signround.architecture import HEAD, read_architecture
from signround.checkpoint import SourceCheckpoint
from signround.errors import RefusedError
from signround.families import FAMILIES
from tests import small_models

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "vocab_size": 130000,
}


def refusals_of(**changes: Any) -> str:
    with pytest.raises(RefusedError) as caught:
        read_architecture({key: value for key, value in (LLAMA | changes).items() if value != "absent"})
    return str(caught.value)


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_names_and_shapes_are_those_of_the_transformers_model(family: str, tmp_path: Path) -> None:
    """The oracle is the checkpoint that transformers itself saves."""
    checkpoint = SourceCheckpoint(small_models.write_small_model(tmp_path / "model", family))
    architecture = read_architecture(checkpoint.config)
    ours = dict(architecture.outer())
    for index in range(architecture.layers):
        ours |= architecture.block_linears(index) | architecture.block_kept(index)
    assert ours == {name: info.shape for name, info in checkpoint.tensors.items()}


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_numbers_are_those_of_the_transformers_config(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = small_models.write_small_model(tmp_path / "model", family)
    theirs = AutoConfig.from_pretrained(folder)
    ours = read_architecture(json.loads((folder / "config.json").read_text()))
    assert ours.hidden == theirs.hidden_size
    assert ours.intermediate == theirs.intermediate_size
    assert (ours.heads, ours.kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.vocabulary == theirs.vocab_size
    assert ours.context == theirs.max_position_embeddings
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.tied == theirs.tie_word_embeddings
    rope = theirs.rope_parameters
    rope = rope.get("full_attention", rope)
    assert (ours.rope.theta, ours.rope.kind) == (rope["rope_theta"], rope["rope_type"])


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    """A config.json may leave out what equals its class's default; each default that we assume must be the same."""
    from transformers import AutoConfig, AutoModelForCausalLM

    bare: dict[str, Any] = {"model_type": family, "architectures": [FAMILIES[family].hf_class], **SIZES}
    theirs = AutoConfig.for_model(**{key: value for key, value in bare.items() if key != "architectures"})
    ours = read_architecture(bare)
    rope = theirs.rope_parameters
    assert ours.rope.theta == rope.get("full_attention", rope)["rope_theta"]
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.context == theirs.max_position_embeddings
    assert ours.kv_heads == (theirs.num_key_value_heads or theirs.num_attention_heads)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(theirs).state_dict()
    biased = {f"{linear.name}.bias" for linear in ours.linears(0) if ours.has_bias(linear.name)}
    prefix = "model.layers.0."
    assert biased == {name.removeprefix(prefix) for name in state if name.startswith(prefix) and name.endswith("bias")}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel"),
        (
            {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"},
            "LlamaForSequenceClassification",
        ),
        ({"model_type": "gemma3"}, "'gemma3'"),
        ({"architectures": None, "model_type": None}, "None"),
        ({}, "None"),
    ],
)
def test_unknown_architectures_are_refused_with_the_list(config: dict[str, Any], name: str) -> None:
    with pytest.raises(RefusedError) as caught:
        read_architecture(config)
    sentence = str(caught.value)
    assert name in sentence
    for family in FAMILIES.values():
        assert family.hf_class in sentence


@pytest.mark.parametrize(
    "field", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
@pytest.mark.parametrize("value", ["absent", None, "64", 0, -1, 1.5])
def test_numbers_that_are_missing_or_absurd_are_refused(field: str, value: Any) -> None:
    assert field in refusals_of(**{field: value})


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised already"),
    ],
)
def test_what_we_cannot_compute_is_refused(changes: dict[str, Any], fragment: str) -> None:
    assert fragment in refusals_of(**changes)


def test_all_reasons_come_at_once() -> None:
    sentences = refusals_of(hidden_act="gelu", hidden_size="absent", quantization_config={"bits": 4}).splitlines()
    assert len(sentences) == 3
    assert all(sentence.startswith("config.json: ") and sentence.endswith(".") for sentence in sentences)


def test_heads_that_do_not_share_keys_evenly_are_refused() -> None:
    assert "num_key_value_heads" in refusals_of(num_key_value_heads=3)


@pytest.mark.parametrize(
    ("changes", "kind", "theta", "factor"),
    [
        ({}, "default", 10000.0, 1.0),
        ({"rope_theta": 5e5}, "default", 5e5, 1.0),
        ({"rope_theta": 5e5, "rope_scaling": None}, "default", 5e5, 1.0),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e6}, "linear", 1e6, 2.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}, "default", 7e4, 1.0),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3", 10000.0, 8.0),
    ],
)
def test_rope_of_old_and_new_configs(changes: dict[str, Any], kind: str, theta: float, factor: float) -> None:
    rope = read_architecture(LLAMA | changes).rope
    assert (rope.kind, rope.theta, rope.factor) == (kind, theta, factor)


def test_llama3_numbers_are_read() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 8.0,
        "original_max_position_embeddings": 4096,
    }
    rope = read_architecture(LLAMA | {"rope_scaling": scaling}).rope
    assert (rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_context) == (32.0, 2.0, 8.0, 4096)


def _windows(model_type: str, **changes: Any) -> tuple[int | None, ...]:
    config = LLAMA | {"model_type": model_type, "architectures": [FAMILIES[model_type].hf_class]} | changes
    return read_architecture(config).windows


def test_windows_follow_each_family() -> None:
    assert _windows("llama", sliding_window=8) == (None,) * 3
    assert _windows("mistral", sliding_window=8) == (8,) * 3
    assert _windows("mistral", sliding_window=None) == (None,) * 3
    assert _windows("qwen2", sliding_window=8, use_sliding_window=False) == (None,) * 3
    assert _windows("qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=2) == (None, None, 8)
    types = ["full_attention", "sliding_attention", "full_attention"]
    assert _windows("qwen3", sliding_window=8, use_sliding_window=True, layer_types=types) == (None, 8, None)


def test_a_tied_model_has_no_head() -> None:
    assert HEAD not in read_architecture(LLAMA | {"tie_word_embeddings": True}).outer()
    assert read_architecture(LLAMA | {"tie_word_embeddings": False}).outer()[HEAD] == (100, 64)
