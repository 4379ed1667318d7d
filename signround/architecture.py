"""What we know of a model family: its blocks, its linears, its norms, and how its positions rotate.

Plain data read from `config.json`; no transformers, no weights. Everything that is not known here is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from signround.errors import Refusal, RefusedError, refuse

BLOCK = "model.layers.{}."
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
FEED_FORWARD = tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))
LINEARS = ATTENTION + FEED_FORWARD


@dataclass(frozen=True)
class Family:
    """One row of the table of supported families, keyed by `model_type` of config.json."""

    model_type: str
    hf_class: str
    qkv_bias: bool = False  # biases on q, k, v whatever the config says (Qwen2)
    qk_norm: bool = False  # RMS norm over each head of q and k (Qwen3)
    examples: str = ""


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", examples="Llama 2, 3, 3.1, 3.2; SmolLM2; TinyLlama"),
        Family("mistral", "MistralForCausalLM", examples="Mistral 7B"),
        Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True, examples="Qwen2, Qwen2.5"),
        Family("qwen3", "Qwen3ForCausalLM", qk_norm=True, examples="Qwen3 dense"),
    )
}


@dataclass(frozen=True)
class Rope:
    """Rotary positions: `kind` is default, linear or llama3; the other fields are those of `rope_parameters`."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class Architecture:
    """The numbers of one model. `windows[i]` is the sliding attention window of block i in tokens, None for full."""

    family: Family
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    norm_epsilon: float
    tied: bool
    rope: Rope
    windows: tuple[int | None, ...]
    attention_bias: bool
    output_bias: bool
    feed_forward_bias: bool

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """(out_features, in_features) of a linear such as `self_attn.q_proj`."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }[linear]

    def has_bias(self, linear: str) -> bool:
        if linear in FEED_FORWARD:
            return self.feed_forward_bias
        return self.output_bias if linear == "self_attn.o_proj" else self.attention_bias

    def block_linears(self, index: int) -> dict[str, tuple[int, int]]:
        """Weight name -> (out_features, in_features) of every linear in block `index`, in checkpoint names."""
        prefix = BLOCK.format(index)
        return {f"{prefix}{linear}.weight": self.linear_shape(linear) for linear in LINEARS}

    def block_kept(self, index: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what stays unquantised in block `index`: norms and biases."""
        prefix = BLOCK.format(index)
        kept: dict[str, tuple[int, ...]] = {
            f"{prefix}input_layernorm.weight": (self.hidden,),
            f"{prefix}post_attention_layernorm.weight": (self.hidden,),
        }
        if self.family.qk_norm:
            kept |= {f"{prefix}self_attn.{part}_norm.weight": (self.head_dim,) for part in "qk"}
        for linear in LINEARS:
            if self.has_bias(linear):
                kept[f"{prefix}{linear}.bias"] = (self.linear_shape(linear)[0],)
        return kept

    def outer(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors outside the blocks. A tied head is the embedding and has no tensor."""
        tensors: dict[str, tuple[int, ...]] = {
            EMBEDDING: (self.vocabulary, self.hidden),
            FINAL_NORM: (self.hidden,),
        }
        return tensors if self.tied else tensors | {HEAD: (self.vocabulary, self.hidden)}


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """Architecture of a `config.json`. Raises RefusedError with every reason for which it is not supported."""
    family = FAMILIES.get(str(config.get("model_type")))
    named = config.get("architectures") or [family.hf_class if family else "none"]
    if family is None or family.hf_class not in named:
        supported = ", ".join(known.hf_class for known in FAMILIES.values())
        raise refuse(
            f"architecture {named[0]} (model_type {config.get('model_type')!r}) is not supported; "
            f"supported are {supported}",
            "choose a model of one of these families",
            "config.json",
        )
    refusals = _unsupported(config)
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    refusals += [
        Refusal(
            f"{name} is {config.get(name, 'missing')!r}, a whole number above 0 is needed",
            "restore the file from the model's publisher",
            "config.json",
        )
        for name in needed
        if not isinstance(config.get(name), int) or config[name] < 1
    ]
    if refusals:
        raise RefusedError(refusals)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise refuse(
            f"num_key_value_heads is {kv_heads}, which does not divide num_attention_heads {heads}",
            "restore the file from the model's publisher",
            "config.json",
        )
    layers = config["num_hidden_layers"]
    bias = bool(config.get("attention_bias", False))
    return Architecture(
        family=family,
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        context=config.get("max_position_embeddings", 2048),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        tied=bool(config.get("tie_word_embeddings", False)),
        rope=_rope(config),
        windows=_windows(config, family, layers),
        attention_bias=bias or family.qkv_bias,
        output_bias=bias and not family.qkv_bias,
        feed_forward_bias=bool(config.get("mlp_bias", False)),
    )


def _unsupported(config: Mapping[str, Any]) -> list[Refusal]:
    refusals = []
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        refusals.append(
            Refusal(
                f"hidden_act {activation!r} is not supported, only 'silu' is", "choose another model", "config.json"
            )
        )
    kind = _rope_parameters(config).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        refusals.append(
            Refusal(
                f"rope scaling {kind!r} is not supported; supported are default, linear, llama3",
                "remove the scaling from a copy of config.json (shorter context) or choose another model",
                "config.json",
            )
        )
    if config.get("quantization_config"):
        refusals.append(
            Refusal(
                "the model is quantised already (quantization_config is present)",
                "start from the original float checkpoint",
                "config.json",
            )
        )
    return refusals


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or `rope_theta` with `rope_scaling` of earlier versions."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    parameters.setdefault("rope_type", parameters.pop("type", "default") or "default")
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return parameters


def _rope(config: Mapping[str, Any]) -> Rope:
    parameters = _rope_parameters(config)
    return Rope(
        theta=float(parameters["rope_theta"]),
        kind=parameters["rope_type"],
        factor=float(parameters.get("factor", 1.0)),
        low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_freq_factor=float(parameters.get("high_freq_factor", 4.0)),
        original_context=int(parameters.get("original_max_position_embeddings", 8192)),
    )


def _windows(config: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if window is None or family.model_type == "llama":
        return (None,) * layers
    if family.model_type == "mistral":
        return (window,) * layers
    if not config.get("use_sliding_window", False):
        return (None,) * layers
    types = config.get("layer_types")
    if types:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = config.get("max_window_layers", layers)
    return tuple(window if index >= first else None for index in range(layers))
