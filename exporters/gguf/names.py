"""Tensor names of a checkpoint and of GGUF, both ways, and the row order that llama.cpp wants for q and k.

Names as in gguf-py `tensor_mapping.py`. llama.cpp's `llama` architecture (Llama and Mistral) rotates neighbouring pairs
of a head, Hugging Face rotates its halves: rows of q and k (and their biases) are interleaved on the way in. Whole rows
move, so groups along the inputs are untouched (`LlamaModel.permute` in llama.cpp's conversion/llama.py).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from signround.architecture import EMBEDDING, FINAL_NORM, HEAD, Architecture

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ROPE_FACTORS = "rope_freqs.weight"

_OUTER = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
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
_OUTER_BACK = {theirs: ours for ours, theirs in _OUTER.items()}
_IN_BLOCK_BACK = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
_CHECKPOINT = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_GGUF = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_ROTATED = re.compile(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)")


def gguf_name(name: str) -> str:
    """Checkpoint name -> GGUF name. Raises KeyError for a tensor that none of our families has."""
    if name in _OUTER:
        return _OUTER[name]
    match = _CHECKPOINT.fullmatch(name)
    if match is None:
        raise KeyError(name)
    return f"blk.{match[1]}.{_IN_BLOCK[match[2]]}.{match[3]}"


def checkpoint_name(name: str) -> str:
    """The inverse of `gguf_name`."""
    if name in _OUTER_BACK:
        return _OUTER_BACK[name]
    match = _GGUF.fullmatch(name)
    if match is None:
        raise KeyError(name)
    return f"model.layers.{match[1]}.{_IN_BLOCK_BACK[match[2]]}.{match[3]}"


def rotated_heads(name: str, architecture: str, heads: int, kv_heads: int) -> int | None:
    """Number of heads whose rows are interleaved in GGUF tensor `name`; None for tensors that keep their order."""
    match = _ROTATED.fullmatch(name)
    if architecture != "llama" or match is None:
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
