"""Mixture of experts as one config.json tells it: how many experts, how wide, which tensors. Plain data.

Refuses models in which some blocks have experts and others have none: no format of ours can say which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from signround.errors import RESTORE, Refusal
from signround.families import Experts, Linear

CONFIG = "config.json"


@dataclass(frozen=True)
class Mixture:
    """The experts of every block: `experts` of them, `used` for each token, `intermediate` wide; `shared` is the width
    of the expert that every token goes through (0: there is none)."""

    names: Experts
    experts: int
    used: int
    intermediate: int
    shared: int
    norms_scores: bool

    @property
    def active(self) -> int:
        """Intermediate channels that one token goes through."""
        return self.used * self.intermediate + self.shared

    def linears(self) -> tuple[Linear, ...]:
        """Expert by expert, then the shared one; widths "expert" and "shared"."""
        module = self.names.module
        found = [self._gated(f"{module}.experts.{expert}", "expert") for expert in range(self.experts)]
        if self.shared:
            found.append(self._gated(f"{module}.shared_expert", "shared"))
        return tuple(linear for part in found for linear in part)

    def _gated(self, prefix: str, width: str) -> tuple[Linear, ...]:
        gate, up, down = (f"{prefix}.{part}" for part in self.names.parts)
        return Linear(gate, (width,), "hidden"), Linear(up, (width,), "hidden"), Linear(down, ("hidden",), width)

    def kept(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Tensor name within the block -> shape: the router and the gate of the shared expert, which decide and are
        small, so they keep their precision."""
        kept: dict[str, tuple[int, ...]] = {f"{self.names.module}.gate.weight": (self.experts, hidden)}
        if self.shared:
            kept[f"{self.names.module}.shared_expert_gate.weight"] = (1, hidden)
        return kept


def read_mixture(config: Mapping[str, Any], names: Experts) -> Mixture:
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


def mixture_refusals(config: Mapping[str, Any], names: Experts) -> list[Refusal]:
    """Every reason for which the experts of a `config.json` are not supported."""
    count, used = _count(config, names), config.get("num_experts_per_tok")
    sizes = {names.count[-1]: count, "num_experts_per_tok": used}
    sizes |= {key: config.get(key) for key in (names.width, names.shared_width) if key}
    refusals = [
        Refusal(
            f"{name} is {'missing' if size is None else repr(size)}, a whole number above 0 is needed", RESTORE, CONFIG
        )
        for name, size in sizes.items()
        if not isinstance(size, int) or size < 1
    ]
    if not refusals and used > count:
        refusals.append(Refusal(f"num_experts_per_tok is {used}, there are {count} experts", RESTORE, CONFIG))
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if step != 1 or dense:
        found = f"decoder_sparse_step is {step}" if step != 1 else f"mlp_only_layers is {dense}"
        problem = f"{found}: some blocks have no experts, and llama.cpp wants them in every block"
        refusals.append(Refusal(problem, "choose a model with experts in every block", CONFIG))
    return refusals


def _count(config: Mapping[str, Any], names: Experts) -> Any:
    return next((config[key] for key in names.count if config.get(key) is not None), None)
