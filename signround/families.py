"""The table of model families: what a decoder block of each is made of, as plain data.

One row a family, keyed by `model_type` of config.json. Rows say what transformers' own class computes; nothing here
reads a file, imports transformers or knows a format. A family that is not in the table is refused by name
(`signround.architecture`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ALWAYS = "always"


@dataclass(frozen=True)
class Linear:
    """One linear of a block.

    `outputs` names the widths (`Architecture.width`) that lie one after the other in its rows: one in a plain linear,
    several in a fused one. `bias` is the key of config.json that gives it a bias, "always", or "" for never.
    """

    name: str
    outputs: tuple[str, ...]
    inputs: str
    bias: str = ""


@dataclass(frozen=True)
class Norm:
    """One RMS norm of a block, over `width` values."""

    name: str
    width: str = "hidden"


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in every block in place of one feed-forward network: what checkpoints call its parts, and
    the keys of config.json for its sizes. `norms_scores`: whether the scores of the chosen experts are made to sum to
    one; None where config.json says so (norm_topk_prob)."""

    module: str = "mlp"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    count: tuple[str, ...] = ("num_local_experts", "num_experts")  # transformers 5 writes the first for Qwen3-MoE
    width: str = "moe_intermediate_size"
    shared_width: str | None = None  # of the expert that every token goes through
    norms_scores: bool | None = None


@dataclass(frozen=True)
class Family:
    """One row. `defaults` are transformers' own for keys that a config.json may leave out."""

    model_type: str
    hf_class: str
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    activation: str = "silu"
    activation_key: str = "hidden_act"
    norm_plus_one: bool = False  # norms multiply by weight + 1
    root_embedding: bool = False  # embeddings times sqrt(hidden)
    query_scalar: bool = False  # attention scores times query_pre_attn_scalar ** -0.5, not head_dim ** -0.5
    multipliers: bool = False  # Granite's four: embedding, attention, residual, logits
    soft_caps: tuple[str, ...] = ()  # keys of config.json that cap values by cap * tanh(value / cap)
    rope_kinds: tuple[str, ...] = ("default", "linear", "llama3")
    local_rope: bool = False  # windowed blocks rotate by rope_parameters of their own
    partial_rotary: bool = False  # partial_rotary_factor: only the first part of each head rotates
    unrotated: bool = False  # no_rope_layers: some blocks have no positions at all
    window_rule: Literal["never", "every", "switched", "alternate", "period", "unrotated"] = "never"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # key -> values that we can compute
    experts: Experts | None = None
    examples: str = ""

    @property
    def qk_norm(self) -> bool:
        """Whether q and k are normed before they rotate."""
        return any(norm.name == "self_attn.q_norm" for norm in self.norms)


def attention(qkv_bias: str = "", output_bias: str = "") -> tuple[Linear, ...]:
    """q, k, v and o as four linears."""
    return (
        Linear("self_attn.q_proj", ("queries",), "hidden", qkv_bias),
        Linear("self_attn.k_proj", ("keys",), "hidden", qkv_bias),
        Linear("self_attn.v_proj", ("keys",), "hidden", qkv_bias),
        Linear("self_attn.o_proj", ("hidden",), "queries", output_bias),
    )


def feed_forward(bias: str = "") -> tuple[Linear, ...]:
    """gate, up and down."""
    return (
        Linear("mlp.gate_proj", ("intermediate",), "hidden", bias),
        Linear("mlp.up_proj", ("intermediate",), "hidden", bias),
        Linear("mlp.down_proj", ("hidden",), "intermediate", bias),
    )


FUSED = (
    Linear("self_attn.qkv_proj", ("queries", "keys", "keys"), "hidden"),
    Linear("self_attn.o_proj", ("hidden",), "queries"),
    Linear("mlp.gate_up_proj", ("intermediate", "intermediate"), "hidden"),
    Linear("mlp.down_proj", ("hidden",), "intermediate"),
)
BIASABLE = attention("attention_bias", "attention_bias")
BEFORE = (Norm("input_layernorm"), Norm("post_attention_layernorm"))
AFTER = (Norm("post_attention_layernorm"), Norm("post_feedforward_layernorm"))
AROUND = (*BEFORE, Norm("pre_feedforward_layernorm"), Norm("post_feedforward_layernorm"))
HEAD_NORMS = (Norm("self_attn.q_norm", "head_dim"), Norm("self_attn.k_norm", "head_dim"))

COMMON: Mapping[str, Any] = {
    "num_key_value_heads": None,  # as many as heads
    "head_dim": None,  # hidden_size / heads
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
GEMMA: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
QWEN: Mapping[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
UNWINDOWED: Mapping[str, tuple[Any, ...]] = {"use_sliding_window": (None, False)}
CAUSAL: Mapping[str, tuple[Any, ...]] = {"use_bidirectional_attention": (None, False)}

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama", "LlamaForCausalLM", BIASABLE + feed_forward("mlp_bias"), BEFORE,
            examples="Llama 2, 3, 3.1, 3.2; SmolLM2; TinyLlama",
        ),
        Family(
            "mistral", "MistralForCausalLM", attention() + feed_forward(), BEFORE, window_rule="every",
            defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
            examples="Mistral 7B",
        ),
        Family(
            "qwen2", "Qwen2ForCausalLM", attention(ALWAYS) + feed_forward(), BEFORE, window_rule="switched",
            defaults=QWEN, examples="Qwen2, Qwen2.5",
        ),
        Family(
            "qwen3", "Qwen3ForCausalLM", BIASABLE + feed_forward(), BEFORE + HEAD_NORMS, window_rule="switched",
            defaults={**QWEN, "head_dim": 128}, examples="Qwen3 dense",
        ),
        Family(
            "gemma2", "Gemma2ForCausalLM", BIASABLE + feed_forward(), AROUND,
            activation="gelu_pytorch_tanh", activation_key="hidden_activation", norm_plus_one=True,
            root_embedding=True, query_scalar=True, soft_caps=("attn_logit_softcapping", "final_logit_softcapping"),
            rope_kinds=("default", "linear"), window_rule="alternate",
            defaults={**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            only=CAUSAL, examples="Gemma 2",
        ),
        Family(
            "gemma3_text", "Gemma3ForCausalLM", BIASABLE + feed_forward(), AROUND + HEAD_NORMS,
            activation="gelu_pytorch_tanh", activation_key="hidden_activation", norm_plus_one=True,
            root_embedding=True, query_scalar=True, soft_caps=("final_logit_softcapping",),
            rope_kinds=("default", "linear"), local_rope=True, window_rule="period",
            defaults={
                **GEMMA, "max_position_embeddings": 131072, "sliding_window_pattern": 6, "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
            },
            only={**CAUSAL, "attn_logit_softcapping": (None,)},  # transformers' class reads the key and ignores it
            examples="Gemma 3, text only: 270M, 1B",
        ),
        Family(
            "phi3", "Phi3ForCausalLM", FUSED, BEFORE, rope_kinds=("default", "longrope"), partial_rotary=True,
            window_rule="every",
            defaults={
                "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            },
            examples="Phi-3, Phi-3.5 mini; Phi-4, Phi-4 mini",
        ),
        Family(
            "smollm3", "SmolLM3ForCausalLM", BIASABLE + feed_forward("mlp_bias"), BEFORE, unrotated=True,
            window_rule="unrotated",
            defaults={
                "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6,
                "tie_word_embeddings": True, "no_rope_layer_interval": 4,
            },
            examples="SmolLM3",
        ),
        Family(
            "granite", "GraniteForCausalLM", BIASABLE + feed_forward("mlp_bias"), BEFORE, multipliers=True,
            defaults={
                "attention_multiplier": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
                "logits_scaling": 1.0,
            },
            examples="Granite 3 dense",
        ),
        Family(
            "olmo2", "Olmo2ForCausalLM", BIASABLE + feed_forward(),
            (*AFTER, Norm("self_attn.q_norm", "queries"), Norm("self_attn.k_norm", "keys")),
            defaults={"rms_norm_eps": 1e-5}, examples="OLMo 2",
        ),
        Family(
            "mixtral", "MixtralForCausalLM", attention(), BEFORE, window_rule="every",
            experts=Experts(
                "block_sparse_moe", ("w1", "w3", "w2"), count=("num_local_experts",), width="intermediate_size",
                norms_scores=True,
            ),
            defaults={
                "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
                "num_local_experts": 8, "num_experts_per_tok": 2,
            },
            examples="Mixtral 8x7B, 8x22B",
        ),
        Family(
            "qwen2_moe", "Qwen2MoeForCausalLM", attention("qkv_bias"), BEFORE,
            experts=Experts(shared_width="shared_expert_intermediate_size"),
            defaults={
                "num_key_value_heads": 16, "max_position_embeddings": 32768, "qkv_bias": True, "num_experts": 60,
                "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
            },
            only=UNWINDOWED, examples="Qwen1.5-MoE, Qwen2-57B-A14B",
        ),
        Family(
            "qwen3_moe", "Qwen3MoeForCausalLM", BIASABLE, BEFORE + HEAD_NORMS, experts=Experts(),
            defaults={
                "num_key_value_heads": 4, "max_position_embeddings": 32768, "num_experts": 128,
                "num_experts_per_tok": 8, "moe_intermediate_size": 768,
            },
            only=UNWINDOWED, examples="Qwen3-30B-A3B, Qwen3-235B-A22B",
        ),
    )
}  # fmt: skip
