"""Positions and windows of every block against transformers' own modules, over the spellings of config.json.

What a block of the small transformers model is handed (cosines, sines, mask) is the truth; what that model fails on is
refused before any work.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from exporters.onnx.rope import rotary_tables
from signround.architecture import read_architecture
from signround.errors import RefusedError
from signround.families import FAMILIES

TOKENS = 24
FULL, SLIDING = "full_attention", "sliding_attention"
SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 1, "num_experts": 2, "num_local_experts": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_experts_per_tok": 1,
}  # fmt: skip
BARE3: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
ORIGINAL = "original_max_position_embeddings"
LLAMA3 = BARE3 | {ORIGINAL: 64}
LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 3.0}
DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": 7e4}
LONG: dict[str, Any] = {
    "rope_type": "longrope", "short_factor": [1 + 0.1 * index for index in range(16)],
    "long_factor": [2 + 0.5 * index for index in range(16)],
}  # fmt: skip
NESTED: dict[str, Any] = {FULL: LINEAR | {"rope_theta": 1e5}, SLIDING: {"rope_type": "default", "rope_theta": 2e4}}
GEMMA3: dict[str, Any] = {"sliding_window": 8, "sliding_window_pattern": 2}
WINDOWED: dict[str, Any] = {"sliding_window": 8, "use_sliding_window": True}
MIXED = [FULL, SLIDING, FULL]
ERRORS = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, StrictDataclassError)


@dataclass(frozen=True)
class Block:
    """What one block of transformers' model is handed; `window` is None where all tokens are seen."""

    window: int | None
    cos: Tensor | None
    sin: Tensor | None


def config_of(model_type: str, changes: dict[str, Any]) -> dict[str, Any]:
    return SMALL | {"model_type": model_type, "architectures": [FAMILIES[model_type].hf_class]} | changes


def blocks_of_transformers(config: dict[str, Any]) -> list[Block]:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = json.loads(json.dumps({key: value for key, value in config.items() if key != "architectures"}))
    whole = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(whole, attn_implementation="eager").eval()
    found: list[Block] = []

    def look(layer: Any, _: Any, handed: dict[str, Any]) -> None:
        seen = int((handed["attention_mask"][0, 0, -1] == 0).sum())
        rotates = getattr(layer.self_attn, "use_rope", True)
        cos, sin = (part[0, :, : part.shape[-1] // 2] if rotates else None for part in handed["position_embeddings"])
        found.append(Block(seen if seen < TOKENS else None, cos, sin))

    for layer in model.model.layers:
        layer.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(torch.zeros(1, TOKENS, dtype=torch.int64))
    return found


READ: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope_theta": 5e5}),
    ("llama", {"rope_theta": 5e5, "rope_parameters": DEFAULT}),
    ("llama", {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}),
    ("llama", {"rope_theta": 5e5, "rope_parameters": {}, "rope_scaling": None}),
    ("llama", {"rope_scaling": {}, "rope_parameters": DEFAULT}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 3}, "rope_theta": 2e4}),
    ("llama", {"rope_scaling": {"factor": 3.0}}),  # no kind is the default one
    ("llama", {"rope_scaling": {"type": "default", **LINEAR}}),
    ("llama", {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}),
    ("llama", {"rope_scaling": LINEAR | {"factor": 0.5}}),
    ("llama", {"rope_scaling": LINEAR, "rope_parameters": DEFAULT}),  # the former alone, with the theta of neither
    ("llama", {"rope_scaling": LINEAR, "rope_parameters": LLAMA3, "rope_theta": 3e4}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_scaling": BARE3, "rope_theta": 3e4}),
    ("llama", {"rope_parameters": BARE3, ORIGINAL: 128}),
    ("llama", {"rope_parameters": LLAMA3, ORIGINAL: 128}),
    ("llama", {"rope_parameters": LINEAR, ORIGINAL: 128}),
    ("llama", {"partial_rotary_factor": None}),
    ("llama", {"partial_rotary_factor": 1}),
    ("qwen2", {"rope_parameters": BARE3}),
    ("granite", {"rope_parameters": LLAMA3, ORIGINAL: 128}),
    ("smollm3", {"rope_scaling": LINEAR, "rope_parameters": DEFAULT}),
    ("phi3", {"rope_scaling": LONG, ORIGINAL: 16}),  # the text is longer
    ("phi3", {"rope_scaling": LONG, ORIGINAL: 64}),
    ("phi3", {"rope_scaling": LONG | {ORIGINAL: 64}}),  # unread: the class has a default of its own
    ("phi3", {"rope_scaling": LONG | {ORIGINAL: 128}, ORIGINAL: 64}),
    ("phi3", {"rope_scaling": LONG | {"factor": 9.0}, ORIGINAL: 64}),
    ("phi3", {"rope_scaling": LONG | {"factor": None, "attention_factor": 1.3}, ORIGINAL: 64}),
    ("phi3", {"partial_rotary_factor": 0.5}),
    ("phi3", {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}),
    ("phi3", {"partial_rotary_factor": 0.75, "rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}),
    ("gemma3_text", GEMMA3),
    ("gemma3_text", GEMMA3 | {"rope_parameters": NESTED}),
    ("gemma3_text", GEMMA3 | {"rope_parameters": NESTED, "rope_theta": 3e5, "rope_local_base_freq": 3e4}),
    ("gemma3_text", GEMMA3 | {"rope_parameters": {FULL: LINEAR}, "rope_theta": 3e5, "rope_local_base_freq": 3e4}),
    ("gemma3_text", GEMMA3 | {"rope_parameters": {FULL: {"type": "linear", "factor": 3.0}, SLIDING: None}}),
    ("gemma3_text", GEMMA3 | {"rope_parameters": {FULL: DEFAULT, SLIDING: LINEAR}}),
    ("gemma3_text", GEMMA3 | {"rope_parameters": LINEAR | {"rope_theta": 3e5}}),  # flat: unread
    ("gemma3_text", GEMMA3 | {"rope_scaling": LINEAR, "rope_theta": 3e5, "rope_local_base_freq": 3e4}),
    ("gemma3_text", GEMMA3 | {"rope_scaling": LINEAR, "rope_parameters": {FULL: DEFAULT, SLIDING: DEFAULT}}),
    ("gemma3_text", GEMMA3 | {"rope_scaling": {}, "rope_parameters": NESTED}),
    ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 3}),
    ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 1}),
    ("gemma3_text", {"sliding_window": 8, "_sliding_window_pattern": 2}),  # what transformers 5 leaves in its files
    ("gemma3_text", GEMMA3 | {"layer_types": [FULL, SLIDING, SLIDING]}),
    ("gemma2", {"sliding_window": 8}),
    ("gemma2", {"sliding_window": 8, "sliding_window_pattern": 3}),  # only Gemma 3 has a pattern
    ("gemma2", {"sliding_window": 8, "sliding_window_pattern": None, "layer_types": MIXED}),
    ("mistral", {"sliding_window": 8, "layer_types": MIXED}),
    ("mistral", {"sliding_window": None, "sliding_window_pattern": 2}),
    ("phi3", {"sliding_window": 8}),
    ("mixtral", {"sliding_window": 8}),
    ("llama", {"sliding_window": 8}),
    ("qwen2", WINDOWED | {"max_window_layers": 1}),
    ("qwen2", WINDOWED | {"max_window_layers": 1, "use_sliding_window": False}),
    ("qwen2", WINDOWED | {"layer_types": MIXED, "max_window_layers": 0}),
    ("qwen3", {"sliding_window": 0}),  # switched off
    ("qwen2_moe", {"sliding_window": 0}),
    ("qwen3_moe", {"sliding_window": 8}),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}),
    ("smollm3", WINDOWED | {"no_rope_layers": [1, 0, 1]}),
    ("smollm3", WINDOWED | {"no_rope_layers": [1, 0, 1], "layer_types": [SLIDING, FULL, SLIDING]}),
    ("smollm3", WINDOWED | {"use_sliding_window": False, "layer_types": MIXED}),
]


@pytest.mark.parametrize(("model_type", "changes"), READ, ids=str)
def test_every_block_is_that_of_transformers(model_type: str, changes: dict[str, Any]) -> None:
    config = config_of(model_type, changes)
    ours = read_architecture(config)
    tables = rotary_tables(ours)
    theirs = blocks_of_transformers(config)
    assert [window if (window or TOKENS) < TOKENS else None for window in ours.windows] == [
        block.window for block in theirs
    ]
    for rope, block in zip(ours.ropes, theirs, strict=True):
        assert (rope is None) == (block.cos is None)
        if rope is None or block.cos is None or block.sin is None:
            continue
        switch = tables[rope].switch or 0
        start = switch if switch < TOKENS else 0  # texts longer than longrope's first context
        rows = slice(start, start + TOKENS)
        assert torch.equal(torch.from_numpy(tables[rope].array("cos"))[rows], block.cos)
        assert torch.equal(torch.from_numpy(tables[rope].array("sin"))[rows], block.sin)


FAILS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_theta": None}, "rope_theta of default rotary positions is None, a number above 0 is needed"),
    ("llama", {"rope_theta": "1e4"}, "rope_theta of default rotary positions is '1e4'"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": None}, "rope_theta": 1e4}, "is None"),
    ("llama", {"rope_scaling": [1]}, "rope_scaling is [1], an object or null is needed"),
    ("llama", {"rope_parameters": "linear"}, "rope_parameters is 'linear', an object or null is needed"),
    ("llama", {"rope_scaling": {"type": None, "factor": 2.0}}, "rope scaling None is not supported"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "factor of linear rotary positions is missing"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": None}}, "factor of linear rotary positions is None"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor of linear rotary positions is '2'"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor of llama3"),
    ("llama", {"rope_parameters": BARE3 | {ORIGINAL: None}}, "is None, a whole number above 1 is needed"),
    ("llama", {"rope_parameters": LLAMA3, ORIGINAL: None}, "is None, a whole number above 1 is needed"),
    ("llama", {"max_position_embeddings": None}, "max_position_embeddings is None"),
    ("phi3", {"rope_scaling": LONG | {"short_factor": 3}, ORIGINAL: 64}, "short_factor of longrope rotary positions"),
    ("phi3", {"rope_scaling": LONG | {"long_factor": ["a"] * 16}, ORIGINAL: 64}, "a list of numbers above 0 is needed"),
    ("phi3", {"rope_scaling": LONG | {"long_factor": [1.0]}, ORIGINAL: 64}, "16 short and 1 long factors, 16 of each"),
    ("phi3", {"rope_scaling": LONG | {"attention_factor": "x"}, ORIGINAL: 64}, "attention_factor of longrope"),
    ("phi3", {"rope_scaling": LONG, ORIGINAL: 1}, "is 1, a whole number above 1 is needed"),
    ("phi3", {"partial_rotary_factor": None}, "needs a number above 0, 1 at most"),
    ("phi3", {"partial_rotary_factor": 1.5}, "needs a number above 0, 1 at most"),
    ("gemma3_text", GEMMA3 | {"rope_local_base_freq": None}, "rope_theta of default rotary positions is None"),
    ("gemma3_text", GEMMA3 | {"rope_parameters": {FULL: "linear"}}, "rope_parameters.full_attention is 'linear'"),
    (
        "gemma3_text",
        GEMMA3 | {"rope_parameters": {SLIDING: DEFAULT}, "rope_scaling": LINEAR},
        "beside rope_parameters without full_attention",
    ),
    ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": None}, "sliding_window_pattern is None"),
    ("gemma2", {"sliding_window": None}, "sliding_window is None"),
    ("mistral", {"sliding_window": "8"}, "sliding_window is '8'"),
    ("mistral", {"sliding_window": None, "layer_types": MIXED}, "no sliding_window is in force"),
    ("qwen2", {"sliding_window": 8, "layer_types": MIXED}, "no sliding_window is in force for Qwen2ForCausalLM"),
    ("qwen2", WINDOWED | {"layer_types": [FULL]}, "3 times full_attention or sliding_attention is needed"),
    ("qwen2", WINDOWED | {"layer_types": [FULL, FULL, "chunked_attention"]}, "'chunked_attention'], 3 times"),
    ("qwen2", WINDOWED | {"layer_types": []}, "layer_types is []"),
    ("qwen2", WINDOWED | {"max_window_layers": None}, "max_window_layers is None"),
    ("qwen3", {"sliding_window": "8"}, "sliding_window is '8', a whole number or null is needed"),
    ("qwen2_moe", {"layer_types": MIXED}, "no sliding_window is in force for Qwen2MoeForCausalLM"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers is [1], 3 whole numbers are needed"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
]


def sentences(model_type: str, changes: dict[str, Any]) -> str:
    with pytest.raises(RefusedError) as caught:
        read_architecture(config_of(model_type, changes))
    return str(caught.value)


@pytest.mark.parametrize(("model_type", "changes", "fragment"), FAILS, ids=str)
def test_what_transformers_fails_on_is_refused(model_type: str, changes: dict[str, Any], fragment: str) -> None:
    assert fragment in sentences(model_type, changes)
    with pytest.raises(ERRORS):
        blocks_of_transformers(config_of(model_type, changes))


@pytest.mark.parametrize(
    ("model_type", "changes", "fragment"),
    [
        ("llama", {"rope_theta": 0}, "rope_theta of default rotary positions is 0"),  # nan
        ("llama", {"rope_scaling": LINEAR | {"factor": 0}}, "factor of linear rotary positions is 0"),  # nan
        ("llama", {"rope_parameters": BARE3 | {ORIGINAL: 64.5}}, "64.5, a whole number above 1"),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "more than low_freq_factor 4.0"),
        ("llama", {"rope_parameters": NESTED}, "LlamaForCausalLM takes one set for all blocks"),  # read as no scaling
        ("qwen2", {"rope_parameters": NESTED}, "Qwen2ForCausalLM takes one set for all blocks"),  # 5.5 does, 5.23 fails
        ("llama", {"sliding_window": 8, "layer_types": MIXED}, "no sliding_window is in force"),  # in the cache only
        ("llama", {"head_dim": 3}, "3 of 3 values of a head rotate, an even number above 0 is needed"),
        ("qwen2", WINDOWED | {"layer_types": ["attention", SLIDING, FULL]}, "layer_types is"),  # 5.23 reads, 5.5 fails
        ("phi3", {"partial_rotary_factor": 0.35}, "11 of 32 values of a head rotate"),  # transformers rotates 12
        ("gemma3_text", GEMMA3 | {"rope_scaling": {"type": "linear", "factor": 3.0}}, "takes rope_type 'default'"),
    ],
)  # fmt: skip
def test_what_has_no_one_meaning_is_refused(model_type: str, changes: dict[str, Any], fragment: str) -> None:
    assert fragment in sentences(model_type, changes)
