"""What llama.cpp calls architectures and matrices: the words in which its file types' rules are written.

Only names; the files themselves are the GGUF exporter's business, which takes these words from here.
"""

from __future__ import annotations

import re

from signround.architecture import BLOCK, EMBEDDING, HEAD

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3",
    "smollm3": "smollm3", "granite": "granite", "olmo2": "olmo2",
}  # fmt: skip
"""`model_type` of config.json -> `general.architecture`."""

OUTER = {EMBEDDING: "token_embd", HEAD: "output"}
LINEARS = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
}
EXPERT_LINEARS = {
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "w1": "ffn_gate", "w3": "ffn_up",
    "w2": "ffn_down",
}  # fmt: skip
_WEIGHT = re.compile(re.escape(BLOCK).replace(r"\{\}", r"(\d+)") + r"(.+)\.weight")
_EXPERT = re.compile(r".+\.experts\.\d+\.(\w+)")
_SHARED = re.compile(r".+\.shared_expert\.(\w+)")


def part_of(name: str) -> tuple[int | None, str]:
    """Checkpoint name of a matrix -> (block, part), as in `blk.<block>.<part>.weight`; the block is None outside of
    them. All experts of a block share one part. Raises KeyError for a matrix without a name of its own."""
    if name in OUTER:
        return None, OUTER[name]
    match = _WEIGHT.fullmatch(name)
    if match is None:
        raise KeyError(name)
    block, linear = int(match[1]), match[2]
    if expert := _EXPERT.fullmatch(linear):
        return block, f"{EXPERT_LINEARS[expert[1]]}_exps"
    if shared := _SHARED.fullmatch(linear):
        return block, f"{EXPERT_LINEARS[shared[1]]}_shexp"
    return block, LINEARS[linear]
