"""Published models by their numbers alone: every parameter that the publisher counts is in our table, and no other.

The counts are those that the model cards show; configurations hold what differs from the class's defaults.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from exporters.gguf.hyperparameters import refusals
from signround.architecture import read_architecture

GEMMA_3 = {"model_type": "gemma3_text", "vocab_size": 262144, "num_attention_heads": 4, "num_key_value_heads": 1,
           "sliding_window": 512, "max_position_embeddings": 32768}  # fmt: skip
PHI_3 = {"model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
         "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32}  # fmt: skip
LONGROPE = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 262144,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}}  # fmt: skip
GRANITE = {"model_type": "granite", "vocab_size": 49159, "num_attention_heads": 32, "num_key_value_heads": 8,
           "num_hidden_layers": 40, "tie_word_embeddings": True, "embedding_multiplier": 12.0,
           "residual_multiplier": 0.22, "rope_theta": 1e7}  # fmt: skip
OLMO_2 = {"model_type": "olmo2", "vocab_size": 100352, "rope_theta": 5e5}

PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "gemma-2-2b": (2_614_341_888, {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
        "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 26}),
    "gemma-2-9b": (9_241_705_984, {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 42}),
    "gemma-2-27b": (27_227_128_320, {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 4608, "intermediate_size": 36864,
        "num_attention_heads": 32, "num_key_value_heads": 16, "num_hidden_layers": 46, "head_dim": 128,
        "query_pre_attn_scalar": 144}),
    "gemma-3-270m": (268_098_176, GEMMA_3 | {
        "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18}),
    "gemma-3-1b": (999_885_952, GEMMA_3 | {
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26}),
    "phi-3-mini-4k": (3_821_079_552, PHI_3 | {"sliding_window": 2047}),
    "phi-3.5-mini": (3_821_079_552, PHI_3 | LONGROPE),
    "phi-4": (14_659_507_200, PHI_3 | {
        "vocab_size": 100352, "hidden_size": 5120, "intermediate_size": 17920, "num_attention_heads": 40,
        "num_key_value_heads": 10, "num_hidden_layers": 40, "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384, "rope_theta": 250000}),
    "phi-4-mini": (3_836_021_760, PHI_3 | LONGROPE | {
        "vocab_size": 200064, "num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True}),
    "smollm3-3b": (3_075_098_624, {
        "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
        "num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": 36, "rope_theta": 5e6,
        "no_rope_layers": [1, 1, 1, 0] * 9}),
    "granite-3.3-2b": (2_533_539_840, GRANITE | {
        "hidden_size": 2048, "intermediate_size": 8192, "attention_multiplier": 0.015625, "logits_scaling": 8.0}),
    "granite-3.3-8b": (8_170_864_640, GRANITE | {
        "hidden_size": 4096, "intermediate_size": 12800, "attention_multiplier": 0.0078125, "logits_scaling": 16.0}),
    "olmo-2-1b": (1_484_916_736, OLMO_2 | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_hidden_layers": 16}),
    "olmo-2-7b": (7_298_617_344, OLMO_2 | {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}),
    "olmo-2-32b": (32_234_279_936, OLMO_2 | {
        "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_key_value_heads": 8,
        "num_hidden_layers": 64}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_is_counted_and_llama_cpp_can_have_it(name: str) -> None:
    count, config = PUBLISHED[name]
    architecture = read_architecture(config)
    tensors = dict(architecture.outer())
    for index in range(architecture.layers):
        tensors |= architecture.block_linears(index) | architecture.block_kept(index)
    assert sum(math.prod(shape) for shape in tensors.values()) == count
    assert refusals(architecture) == []
