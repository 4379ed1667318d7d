"""Mixture of experts as config.json tells it: how many experts, which tensors they have. Plain data.

Refuses models in which some blocks have experts and others have none: no file format of ours can say which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from signround.errors import Refusal


@dataclass(frozen=True)
class ExpertNames:
    """What a family calls its parts in checkpoints. `norms_scores`: whether the scores of the chosen experts are made
    to sum to one; None where config.json says so (norm_topk_prob)."""

    module: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    count: tuple[str, ...] = ("num_experts", "num_local_experts")  # transformers 5 writes the second for Qwen3-MoE
    width: str = "moe_intermediate_size"
    shared_width: str | None = None
    norms_scores: bool | None = None


MIXTRAL = ExpertNames(
    "block_sparse_moe", "w1", "w3", "w2", count=("num_local_experts",), width="intermediate_size", norms_scores=True
)


@dataclass(frozen=True)
class Mixture:
    """The experts of every block: `experts` of them, `used` for each token, `intermediate` wide; `shared` is the width
    of the expert that every token goes through (0: there is none)."""

    names: ExpertNames
    experts: int
    used: int
    intermediate: int
    shared: int
    norms_scores: bool

    @property
    def active(self) -> int:
        """Intermediate channels that one token goes through."""
        return self.used * self.intermediate + self.shared

    def linears(self, hidden: int) -> dict[str, tuple[int, int]]:
        """Weight name within the block, without `.weight` -> (out_features, in_features), expert by expert."""
        names = self.names
        found: dict[str, tuple[int, int]] = {}
        for expert in range(self.experts):
            prefix = f"{names.module}.experts.{expert}"
            found |= _gated(prefix, (names.gate, names.up, names.down), self.intermediate, hidden)
        if self.shared:
            found |= _gated(f"{names.module}.shared_expert", (names.gate, names.up, names.down), self.shared, hidden)
        return found

    def kept(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Tensor name within the block -> shape of router and shared gate, which choose and so are not quantised."""
        kept: dict[str, tuple[int, ...]] = {f"{self.names.module}.gate.weight": (self.experts, hidden)}
        if self.shared:
            kept[f"{self.names.module}.shared_expert_gate.weight"] = (1, hidden)
        return kept


def _gated(prefix: str, parts: tuple[str, str, str], intermediate: int, hidden: int) -> dict[str, tuple[int, int]]:
    gate, up, down = (f"{prefix}.{part}" for part in parts)
    return {gate: (intermediate, hidden), up: (intermediate, hidden), down: (hidden, intermediate)}


def read_mixture(config: Mapping[str, Any], names: ExpertNames) -> Mixture:
    """The mixture of a `config.json` for which `mixture_refusals` has nothing to say."""
    norms = names.norms_scores
    return Mixture(
        names=names,
        experts=_count(config, names),
        used=config["num_experts_per_tok"],
        intermediate=config[names.width],
        shared=config[names.shared_width] if names.shared_width else 0,
        norms_scores=bool(config.get("norm_topk_prob", False)) if norms is None else norms,
    )


def mixture_refusals(config: Mapping[str, Any], names: ExpertNames) -> list[Refusal]:
    """Every reason for which the experts of a `config.json` are not supported."""
    sizes = {names.count[0]: _count(config, names), "num_experts_per_tok": config.get("num_experts_per_tok")}
    sizes |= {key: config.get(key) for key in (names.width, names.shared_width) if key}
    refusals = [
        Refusal(
            f"{name} is {'missing' if size is None else repr(size)}, a whole number above 0 is needed",
            "restore the file from the model's publisher",
            "config.json",
        )
        for name, size in sizes.items()
        if not isinstance(size, int) or size < 1
    ]
    if not refusals and sizes["num_experts_per_tok"] > sizes[names.count[0]]:
        refusals.append(
            Refusal(
                f"num_experts_per_tok is {sizes['num_experts_per_tok']}, there are {sizes[names.count[0]]} experts",
                "restore the file from the model's publisher",
                "config.json",
            )
        )
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if step != 1 or dense:
        found = f"decoder_sparse_step is {step}" if step != 1 else f"mlp_only_layers is {dense}"
        refusals.append(
            Refusal(
                f"{found}, so some blocks have no experts; llama.cpp wants experts in every block",
                "choose a model with decoder_sparse_step 1 and empty mlp_only_layers",
                "config.json",
            )
        )
    return refusals


def _count(config: Mapping[str, Any], names: ExpertNames) -> Any:
    return next((config[key] for key in names.count if config.get(key) is not None), None)
