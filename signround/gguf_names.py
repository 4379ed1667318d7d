"""What llama.cpp calls architectures and tensors: the words in which its files, the rules of its file types and its
importance matrices speak. Names only, both ways, as in gguf-py `tensor_mapping.py`; the bytes are the business of the
GGUF exporter.
"""

from __future__ import annotations

import re

from signround.architecture import EMBEDDING, FINAL_NORM, HEAD

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "phi3": "phi3", "smollm3": "smollm3", "granite": "granite", "olmo2": "olmo2",
    "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
}  # fmt: skip
"""`model_type` of config.json -> `general.architecture`."""

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
_EXPERT = re.compile(r"\.experts\.\d+\.")


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


def part_of(name: str) -> tuple[int | None, str]:
    """Checkpoint name of a matrix -> (block, part), as in `blk.<block>.<part>.weight`; the block is None outside of
    them. All experts of a block share one part. Raises KeyError for a tensor without a name of its own."""
    own = gguf_name(name).removesuffix(".weight")
    if not own.startswith("blk."):
        return None, own
    _, block, part = own.split(".")
    return int(block), part


def checkpoint_name(name: str, architecture: str) -> str:
    """The inverse of `gguf_name`; without a number for a stack of experts."""
    if name in _OUTER_BACK:
        return _OUTER_BACK[name]
    match = _GGUF.fullmatch(name)
    if match is None:
        raise KeyError(name)
    back = {theirs: ours for ours, theirs in in_block(architecture).items()}
    return f"model.layers.{match[1]}.{back[match[2]]}.{match[3]}"


def is_stack(name: str) -> bool:
    """Whether GGUF tensor `name` holds a linear of every expert, one after the other."""
    return name.endswith("_exps.weight")
