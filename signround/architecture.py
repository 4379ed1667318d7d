"""What we know of one model: the tensors of its blocks, its widths, its multipliers, and how its positions rotate.

Plain data read from `config.json` through the table of families; no transformers, no weights. Everything that is not
known here is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from signround.errors import RESTORE, Refusal, RefusedError, refuse
from signround.families import ALWAYS, COMMON, FAMILIES, Family, Linear
from signround.mixture import Mixture, mixture_refusals, read_mixture
from signround.positions import Rope, head_refusals, read_rope, read_ropes
from signround.rope_parameters import rope_refusals
from signround.windows import read_windows, window_refusals

BLOCK = "model.layers.{}."
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
CONFIG = "config.json"
SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


@dataclass(frozen=True)
class Scales:
    """What a family multiplies or caps. Attention scores are multiplied by `attention`, then capped at
    `attention_cap` (cap * tanh(score / cap)); embeddings by `embedding`; both additions to the residual by `residual`;
    logits are divided by `logits`, then capped at `logits_cap`."""

    attention: float
    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    attention_cap: float | None = None
    logits_cap: float | None = None


@dataclass(frozen=True)
class Architecture:
    """The numbers of one model.

    `windows[i]` is the sliding attention window of block i in tokens, None for full; `ropes[i]` its rotary positions,
    None for none; `rope` those of blocks that see everything. `biased` names the linears that have a bias. `mixture`
    are the experts that stand in every block in place of one feed-forward network `intermediate` wide.
    """

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
    ropes: tuple[Rope | None, ...]
    windows: tuple[int | None, ...]
    biased: frozenset[str]
    scales: Scales
    mixture: Mixture | None = None

    def width(self, name: str) -> int:
        """A width by the name that `Linear` and `Norm` use: hidden, intermediate, queries, keys, head_dim, and with a
        mixture of experts expert and shared."""
        experts = {"expert": self.mixture.intermediate, "shared": self.mixture.shared} if self.mixture else {}
        return {
            **experts,
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "queries": self.heads * self.head_dim,
            "keys": self.kv_heads * self.head_dim,
            "head_dim": self.head_dim,
        }[name]

    def linears(self, index: int) -> tuple[Linear, ...]:
        """The linears of block `index`."""
        return self.family.linears + (self.mixture.linears() if self.mixture else ())

    @property
    def active_intermediate(self) -> int:
        """Intermediate channels that one token goes through in a block."""
        return self.mixture.active if self.mixture else self.intermediate

    def linear_shape(self, linear: Linear) -> tuple[int, int]:
        """(out_features, in_features)."""
        return sum(self.width(part) for part in linear.outputs), self.width(linear.inputs)

    def has_bias(self, linear: str) -> bool:
        """Whether a linear such as `self_attn.q_proj` has a bias."""
        return linear in self.biased

    def block_linears(self, index: int) -> dict[str, tuple[int, int]]:
        """Weight name -> (out_features, in_features) of every linear in block `index`, in checkpoint names."""
        prefix = BLOCK.format(index)
        return {f"{prefix}{linear.name}.weight": self.linear_shape(linear) for linear in self.linears(index)}

    def block_kept(self, index: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what stays unquantised in block `index`: norms, biases, and what routes to experts."""
        prefix = BLOCK.format(index)
        kept: dict[str, tuple[int, ...]] = {
            f"{prefix}{norm.name}.weight": (self.width(norm.width),) for norm in self.family.norms
        }
        for linear in self.linears(index):
            if self.has_bias(linear.name):
                kept[f"{prefix}{linear.name}.bias"] = (self.linear_shape(linear)[0],)
        if self.mixture:
            kept |= {prefix + name: shape for name, shape in self.mixture.kept(self.hidden).items()}
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
    family = _family(config)
    given: dict[str, Any] = {**COMMON, **family.defaults, **config}
    refusals = _unsupported(given, family) + rope_refusals(given, family) + _absurd(given)
    if family.experts:
        refusals += mixture_refusals(given, family.experts)
    if refusals:
        raise RefusedError(refusals)
    heads, layers = given["num_attention_heads"], given["num_hidden_layers"]
    kv_heads = given["num_key_value_heads"] or heads
    head_dim = given["head_dim"] or given["hidden_size"] // heads
    refusals = head_refusals(given, family, head_dim) + window_refusals(given, family, layers)
    if heads % kv_heads:
        problem = f"num_key_value_heads is {kv_heads}, which does not divide num_attention_heads {heads}"
        refusals.append(Refusal(problem, RESTORE, CONFIG))
    if refusals:
        raise RefusedError(refusals)
    windows = read_windows(given, family, layers)
    return Architecture(
        family=family,
        hidden=given["hidden_size"],
        intermediate=given["intermediate_size"],
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=given["vocab_size"],
        context=given["max_position_embeddings"],
        norm_epsilon=given["rms_norm_eps"],
        tied=bool(given["tie_word_embeddings"]),
        rope=read_rope(given, family),
        ropes=read_ropes(given, family, windows),
        windows=windows,
        biased=_biased(given, family),
        scales=_scales(given, family, head_dim),
        mixture=read_mixture(given, family.experts) if family.experts else None,
    )


def _family(config: Mapping[str, Any]) -> Family:
    family = FAMILIES.get(str(config.get("model_type")))
    named = config.get("architectures") or [family.hf_class if family else "none"]
    if family is None or family.hf_class not in named:
        supported = ", ".join(known.hf_class for known in FAMILIES.values())
        raise refuse(
            f"architecture {named[0]} (model_type {config.get('model_type')!r}) is not supported; "
            f"supported are {supported}",
            "choose a model of one of these families",
            CONFIG,
        )
    return family


def _biased(given: Mapping[str, Any], family: Family) -> frozenset[str]:
    return frozenset(
        linear.name for linear in family.linears if linear.bias == ALWAYS or (linear.bias and given.get(linear.bias))
    )


def _scales(given: Mapping[str, Any], family: Family, head_dim: int) -> Scales:
    caps = [given.get(key) if key in family.soft_caps else None for key in SOFT_CAPS]
    if family.multipliers:
        return Scales(
            attention=float(given["attention_multiplier"]),
            embedding=float(given["embedding_multiplier"]),
            residual=float(given["residual_multiplier"]),
            logits=float(given["logits_scaling"]),
        )
    return Scales(
        attention=(given["query_pre_attn_scalar"] if family.query_scalar else head_dim) ** -0.5,
        embedding=given["hidden_size"] ** 0.5 if family.root_embedding else 1.0,
        attention_cap=caps[0],
        logits_cap=caps[1],
    )


def _absurd(given: Mapping[str, Any]) -> list[Refusal]:
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return [
        Refusal(f"{name} is {given.get(name, 'missing')!r}, a whole number above 0 is needed", RESTORE, CONFIG)
        for name in (*sizes, "max_position_embeddings")
        if not isinstance(given.get(name), int) or given[name] < 1
    ]


def _unsupported(given: Mapping[str, Any], family: Family) -> list[Refusal]:
    refusals = []
    activation = given[family.activation_key]
    if activation != family.activation:
        problem = f"{family.activation_key} {activation!r} is not supported, only {family.activation!r} is"
        refusals.append(Refusal(problem, "choose another model", CONFIG))
    for key, allowed in family.only.items():
        if given.get(key) not in allowed:
            values = " or ".join(map(repr, allowed))
            problem = f"{key} is {given[key]!r}, {family.hf_class} is supported with {values}"
            refusals.append(Refusal(problem, "choose another model", CONFIG))
    if given.get("quantization_config"):
        refusals.append(
            Refusal(
                "the model is quantised already (quantization_config is present)",
                "start from the original float checkpoint",
                CONFIG,
            )
        )
    return refusals
