"""Tensor names of a checkpoint and of GGUF, both ways, and the row order that llama.cpp wants for q and k.

Names as in gguf-py `tensor_mapping.py`. Some of llama.cpp's architectures (INTERLEAVED) rotate neighbouring pairs of a
head, Hugging Face rotates its halves: rows of q and k (and their biases) are interleaved on the way in. Whole rows
move, so groups along the inputs are untouched (`LlamaModel.permute` in llama.cpp's conversion/llama.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from signround.architecture import EMBEDDING, FINAL_NORM, HEAD, Architecture

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "phi3": "phi3", "smollm3": "smollm3", "granite": "granite", "olmo2": "olmo2",
    "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
}  # fmt: skip
INTERLEAVED = ("llama", "smollm3", "granite")  # `llama_model_rope_type` says NORM, not NEOX
PLUS_ONE = ("gemma2", "gemma3")  # norms multiply by weight + 1 in the checkpoint, by what the file holds in llama.cpp
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
COMPUTED = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)  # of no checkpoint: they follow from config.json

_OUTER = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BEFORE_FEED_FORWARD = {"post_attention_layernorm": "ffn_norm"}  # whatever Hugging Face calls it
_AFTER_BOTH = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_AROUND_BOTH = {**_AFTER_BOTH, "pre_feedforward_layernorm": "ffn_norm"}
# Without an expert's number: the linears of all experts of a block are one tensor, [experts, rows, columns].
_MIXTRAL = {
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
}
_QWEN_MOE = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.experts.{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "down")},
    **{f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
}
_OWN = {
    "": {"mlp.gate_up_proj": "ffn_up", **_MIXTRAL, **_QWEN_MOE},
    "llama": {**_BEFORE_FEED_FORWARD, **_MIXTRAL},
    "qwen2moe": {**_BEFORE_FEED_FORWARD, **_QWEN_MOE},
    "qwen3moe": {**_BEFORE_FEED_FORWARD, **_QWEN_MOE},
    "gemma2": _AROUND_BOTH,
    "gemma3": _AROUND_BOTH,
    "olmo2": _AFTER_BOTH,
    "phi3": {**_BEFORE_FEED_FORWARD, "mlp.gate_up_proj": "ffn_up"},
}
_OUTER_BACK = {theirs: ours for ours, theirs in _OUTER.items()}
_CHECKPOINT = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_GGUF = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_VECTOR = ".ffn_gate_inp_shexp.weight"  # one row in Hugging Face's linear, a vector in llama.cpp
_EXPERT = re.compile(r"\.experts\.\d+\.")
_ROTATED = re.compile(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)")


def in_block(architecture: str) -> dict[str, str]:
    """Part of a checkpoint name -> part of a GGUF name, for the blocks of one GGUF architecture."""
    return _IN_BLOCK | _OWN.get(architecture, _BEFORE_FEED_FORWARD)


def gguf_name(name: str, architecture: str = "") -> str:
    """Checkpoint name -> GGUF name in the file of `architecture` (its `general.architecture`); without one, of tensors
    that are called the same in all of them, as every linear is. The linears of a block's experts have one name
    together. Raises KeyError for any other tensor."""
    if name in _OUTER:
        return _OUTER[name]
    match = _CHECKPOINT.fullmatch(name)
    if match is None:
        raise KeyError(name)
    return f"blk.{match[1]}.{in_block(architecture)[_EXPERT.sub('.experts.', match[2])]}.{match[3]}"


def is_stack(name: str) -> bool:
    """Whether GGUF tensor `name` holds a linear of every expert, one after the other."""
    return name.endswith("_exps.weight")


def is_router(name: str) -> bool:
    """Whether GGUF tensor `name` decides which experts run: float32 whatever the file's other matrices are."""
    return ".ffn_gate_inp" in name


def file_shape(name: str, shape: tuple[int, ...], experts: int) -> tuple[int, ...]:
    """Shape of GGUF tensor `name`, outermost first, for checkpoint tensors of `shape`."""
    if is_stack(name):
        return (experts, *shape)
    return shape[1:] if name.endswith(_VECTOR) and len(shape) == 2 else shape


def checkpoint_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of each checkpoint tensor in GGUF tensor `name` of `shape`: the inverse of `file_shape`."""
    if is_stack(name):
        return shape[1:]
    return (1, *shape) if name.endswith(_VECTOR) else shape


def checkpoint_names(name: str, architecture: str, shape: Sequence[int]) -> tuple[str, ...]:
    """The checkpoint tensors in GGUF tensor `name` of `shape` (outermost first), in file order: as many as there are
    experts in a stack, else one."""
    own = checkpoint_name(name, architecture)
    if not is_stack(name):
        return (own,)
    return tuple(own.replace(".experts.", f".experts.{expert}.") for expert in range(shape[0]))


def checkpoint_name(name: str, architecture: str) -> str:
    """The inverse of `gguf_name`; without a number for a stack of experts."""
    if name in _OUTER_BACK:
        return _OUTER_BACK[name]
    match = _GGUF.fullmatch(name)
    if match is None:
        raise KeyError(name)
    back = {theirs: ours for ours, theirs in in_block(architecture).items()}
    return f"model.layers.{match[1]}.{back[match[2]]}.{match[3]}"


def added(name: str, architecture: str) -> float:
    """What is added to every value of GGUF tensor `name` on the way in."""
    return 1.0 if architecture in PLUS_ONE and name.endswith("norm.weight") else 0.0


def rotated_heads(name: str, architecture: str, heads: int, kv_heads: int) -> int | None:
    """Number of heads whose rows are interleaved in GGUF tensor `name`; None for tensors that keep their order."""
    match = _ROTATED.fullmatch(name)
    if architecture not in INTERLEAVED or match is None:
        return None
    return heads if match[1] == "q" else kv_heads


def rotated_heads_of(name: str, architecture: Architecture) -> int | None:
    """`rotated_heads` for one of our architectures."""
    arch = ARCHITECTURES[architecture.family.model_type]
    return rotated_heads(name, arch, architecture.heads, architecture.kv_heads)


def interleaved(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """[rows, ...] in Hugging Face order -> GGUF order: in each head, row i of half h moves to 2 i + h."""
    split = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def halved(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """The inverse of `interleaved`."""
    split = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)
