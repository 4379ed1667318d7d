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

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
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
        ({"rope_scaling": LLAMA3}, "llama3", 10000.0, 8.0),
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


def family_config(model_type: str, **changes: Any) -> dict[str, Any]:
    return LLAMA | {"model_type": model_type, "architectures": [FAMILIES[model_type].hf_class]} | changes


@pytest.mark.parametrize(
    ("model_type", "changes", "windows"),
    [
        ("gemma2", {}, (4096, None, 4096)),
        (
            "gemma2",
            {"sliding_window": 8, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
            (None, None, 8),
        ),
        ("gemma3_text", {"sliding_window": 8}, (8, 8, 8)),
        ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 2}, (8, None, 8)),
        ("phi3", {}, (None, None, None)),
        ("phi3", {"sliding_window": 8}, (8, 8, 8)),
        ("smollm3", {"sliding_window": 8, "no_rope_layer_interval": 2}, (None, None, None)),
        ("smollm3", {"sliding_window": 8, "use_sliding_window": True, "no_rope_layer_interval": 2}, (None, 8, None)),
        ("granite", {"sliding_window": 8}, (None, None, None)),
        ("olmo2", {"sliding_window": 8}, (None, None, None)),
    ],
)
def test_windows_of_the_later_families(
    model_type: str, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert read_architecture(family_config(model_type, **changes)).windows == windows


def test_gemma3_rotates_windowed_blocks_by_their_own_theta() -> None:
    """Configurations of transformers 4 (the published ones) and of 5."""
    old = {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }
    }
    for spelling in (old, new):
        ours = read_architecture(family_config("gemma3_text", sliding_window_pattern=2, **spelling))
        assert [(rope.kind, rope.theta, rope.factor) for rope in ours.ropes if rope is not None] == [
            ("default", 2e4, 1.0), ("linear", 1e6, 8.0), ("default", 2e4, 1.0),
        ]  # fmt: skip
        assert ours.rope == ours.ropes[1]


def test_smollm3_has_blocks_without_positions() -> None:
    assert [rope is None for rope in read_architecture(family_config("smollm3", no_rope_layers=[1, 0, 1])).ropes] == [
        False, True, False,
    ]  # fmt: skip


LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
}


def test_longrope_of_phi3() -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {"max_position_embeddings": 4096, "original_max_position_embeddings": 512}
    config = family_config("phi3", **given, rope_scaling=LONGROPE)
    rope = read_architecture(config).rope
    theirs = AutoConfig.for_model(**{key: value for key, value in config.items() if key != "architectures"})
    _, factor = ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu")
    assert (rope.kind, rope.original_context, rope.attention_factor) == ("longrope", 512, pytest.approx(factor))
    assert (rope.short_factors[1], rope.long_factors[-1], len(rope.long_factors)) == (1.5, 9.0, 8)


def test_partial_rotation_of_phi3() -> None:
    rope = read_architecture(family_config("phi3", partial_rotary_factor=0.75)).rope
    assert rope.dimensions(16) == 12


@pytest.mark.parametrize(
    ("model_type", "changes", "fragment"),
    [
        (
            "gemma2",
            {"hidden_activation": "gelu"},
            "hidden_activation 'gelu' is not supported, only 'gelu_pytorch_tanh'",
        ),
        ("gemma2", {"sliding_window": None}, "sliding_window is None, Gemma2ForCausalLM needs"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}}, "'yarn'"),
        ("phi3", {"rope_scaling": LONGROPE | {"long_factor": [1.0]}}, "8 short and 1 long factors, 8 of each"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ("phi3", {"rope_scaling": LONGROPE | {"type": "su"}}, "'su'"),  # the first releases; transformers 5 fails too
        ("phi3", {"hidden_act": "gelu"}, "'gelu'"),
        ("smollm3", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ("granite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, GraniteForCausalLM rotates whole"),
        ("olmo2", {"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
    ],
)
def test_what_a_family_does_not_have_is_refused(model_type: str, changes: dict[str, Any], fragment: str) -> None:
    with pytest.raises(RefusedError) as caught:
        read_architecture(family_config(model_type, **changes))
    assert fragment in str(caught.value)


def test_gemma3_with_images_is_another_model() -> None:
    with pytest.raises(RefusedError, match="Gemma3ForConditionalGeneration"):
        read_architecture({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]})


def test_scales_of_each_family() -> None:
    assert read_architecture(LLAMA).scales.attention == 0.25
    gemma = read_architecture(family_config("gemma2", query_pre_attn_scalar=64)).scales
    assert (gemma.embedding, gemma.attention, gemma.attention_cap, gemma.logits_cap) == (8.0, 0.125, 50.0, 30.0)
    granite = read_architecture(family_config("granite", attention_multiplier=0.5, logits_scaling=4)).scales
    assert (granite.attention, granite.logits, granite.residual, granite.embedding) == (0.5, 4.0, 1.0, 1.0)


def test_a_tied_model_has_no_head() -> None:
    assert HEAD not in read_architecture(LLAMA | {"tie_word_embeddings": True}).outer()
    assert read_architecture(LLAMA | {"tie_word_embeddings": False}).outer()[HEAD] == (100, 64)
