"""Names against gguf-py's map; the permutation against llama.cpp's formula."""

from __future__ import annotations

import re

import numpy as np
import pytest
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

from exporters.gguf.names import checkpoint_names, halved, interleaved, rotated_heads
from signround.architecture import read_architecture
from signround.gguf_names import ARCHITECTURES, checkpoint_name, gguf_name, is_stack

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 32}  # fmt: skip


def merged(name: str) -> str:
    """What llama.cpp's converter calls the stack that it makes of an expert's tensor before it looks up its name."""
    name = re.sub(r"model\.(layers\.\d+)\.block_sparse_moe\.experts\.\d+", r"\1.feed_forward.experts", name)
    return re.sub(r"experts\.\d+", "experts", name)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_names_are_those_of_gguf_py_and_come_back(model_type: str) -> None:
    flags = {"attention_bias": True, "mlp_bias": model_type == "llama", "num_experts": 8}
    architecture = read_architecture({"model_type": model_type, **SIZES, **flags})
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[model_type])
    assert isinstance(arch, MODEL_ARCH)
    theirs = get_tensor_name_map(arch, 3)
    names = list(architecture.outer())
    for index in range(3):
        names += [*architecture.block_linears(index), *architecture.block_kept(index)]
    for name in names:
        ours = gguf_name(name, ARCHITECTURES[model_type])
        assert ours == theirs.get_name(merged(name), try_suffixes=(".weight", ".bias"))
        number = re.search(r"experts\.(\d+)", name)
        shape = (8, 2, 3) if number else (2, 3)
        assert checkpoint_names(ours, ARCHITECTURES[model_type], shape)[int(number[1]) if number else 0] == name
        assert is_stack(ours) == bool(number)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.mlp.x.weight", "x"])
def test_unknown_names_are_errors(name: str) -> None:
    with pytest.raises(KeyError):
        gguf_name(name, "llama")
    with pytest.raises(KeyError):
        checkpoint_name(name, "llama")


def test_without_an_architecture_only_names_that_all_share() -> None:
    assert gguf_name("model.layers.7.mlp.gate_up_proj.weight") == "blk.7.ffn_up.weight"
    assert gguf_name("model.norm.weight") == "output_norm.weight"
    with pytest.raises(KeyError):
        gguf_name("model.layers.0.post_attention_layernorm.weight")


@pytest.mark.parametrize("shape", [(24,), (24, 5)])
def test_rows_interleave_within_heads_and_come_back(shape: tuple[int, ...]) -> None:
    rows = np.arange(np.prod(shape)).reshape(shape)
    moved = interleaved(rows, heads=3)
    for head in range(3):
        for half in range(2):
            for index in range(4):
                np.testing.assert_array_equal(moved[head * 8 + 2 * index + half], rows[head * 8 + half * 4 + index])
    np.testing.assert_array_equal(halved(moved, heads=3), rows)


def test_only_q_and_k_of_llama_move() -> None:
    assert rotated_heads("blk.3.attn_q.weight", "llama", 8, 2) == 8
    assert rotated_heads("blk.3.attn_k.bias", "llama", 8, 2) == 2
    for name in ("blk.3.attn_v.weight", "blk.3.attn_q_norm.weight", "blk.3.attn_output.weight", "token_embd.weight"):
        assert rotated_heads(name, "llama", 8, 2) is None
    assert rotated_heads("blk.3.attn_q.weight", "qwen2", 8, 2) is None
