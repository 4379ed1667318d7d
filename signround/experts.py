"""Mixture of experts: the experts of a block as linears of their own, and as transformers stacks them.

Checkpoints hold one tensor an expert and linear; transformers 5 stacks them into `experts.gate_up_proj` [experts,
2 x intermediate, hidden] and `experts.down_proj` [experts, hidden, intermediate]. The tuner wants them apart: each
linear has its own grid, its own calibration tokens and its own gradient, and a gradient through a slice of a stack is
as large as the whole stack. So `DecoderBlocks` runs `RoutedExperts` in place of the stacked module; router, routing
weights and shared expert stay transformers' own. Whole models (`signround.loading`) get the stacks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_EXPERT = re.compile(r"(?P<prefix>.*\.experts\.)(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight")
# Mixtral's checkpoints keep the names of its first release; transformers' modules have those of the other families.
_RENAMED = {".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}


def module_name(name: str) -> str:
    """The name of checkpoint tensor `name` (whole, or within its block) among the parameters of the modules."""
    before, mixtral, after = name.rpartition("block_sparse_moe.")
    if not mixtral:
        return name
    for theirs, ours in _RENAMED.items():
        after = after.replace(theirs, ours)
    return f"{before}mlp.{after}"


class Expert(nn.Module):
    """One gated feed-forward network: down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.act_fn = activation

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        result: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return result


class RoutedExperts(nn.ModuleList):
    """The experts of one block; called as transformers calls its stacked ones."""

    def __init__(self, experts: int, hidden: int, intermediate: int, activation: nn.Module) -> None:
        super().__init__(Expert(hidden, intermediate, activation) for _ in range(experts))

    def forward(self, hidden: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        """`hidden` [tokens, hidden], the `chosen` experts int64 [tokens, k] of each token and their `scores` ->
        [tokens, hidden]. An expert that no token chose is not called."""
        pairs = chosen.reshape(-1)
        order = pairs.argsort(stable=True)
        counts = pairs.bincount(minlength=len(self)).tolist()  # the one look at the device in a block's forward pass
        parts: tuple[Tensor, ...] = torch.split(hidden[order // chosen.shape[1]], counts)
        outputs = [expert(part) for expert, part in zip(self, parts, strict=True) if len(part)]
        weighted = torch.cat(outputs) * scores.reshape(-1)[order, None]
        # Back to the order of tokens by a permutation: adding at indices is not deterministic on a GPU.
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return weighted[back].view(*chosen.shape, -1).sum(1).to(hidden.dtype)


def apart(block: nn.Module) -> nn.Module:
    """`block` with `RoutedExperts` where transformers has stacked experts; other blocks are returned as they are."""
    for _, module in list(block.named_modules()):
        for name, child in list(module.named_children()):
            if name == "experts" and not isinstance(child, RoutedExperts):
                stack: Tensor = child.get_parameter("down_proj")
                experts, hidden, intermediate = stack.shape
                with torch.device(stack.device):
                    setattr(module, name, RoutedExperts(experts, hidden, intermediate, child.get_submodule("act_fn")))
    return block


def is_expert(name: str) -> bool:
    """Whether checkpoint tensor `name` is a linear of a routed expert."""
    return _EXPERT.fullmatch(module_name(name)) is not None


def unit_of(name: str) -> str:
    """What is judged together with weight `name`: the three linears of its expert; any other linear by itself."""
    return name.removesuffix(".weight").rpartition(".")[0] if is_expert(name) else name


def stacked(
    names: Iterable[str], read: Callable[[str], Tensor], shapes: Mapping[str, torch.Size], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Weights by the names of transformers' modules: experts in their stacks (`shapes` knows them), one read at a
    time into its place; every other tensor as it is."""
    weights: dict[str, Tensor] = {}
    for name in names:
        match = _EXPERT.fullmatch(module_name(name))
        if match is None:
            weights[module_name(name)] = read(name)
            continue
        stack = match["prefix"] + ("down_proj" if match["part"] == "down" else "gate_up_proj")
        if stack not in weights:
            weights[stack] = torch.empty(shapes[stack], dtype=dtype)
        place: Any = weights[stack][int(match["expert"])]
        if match["part"] != "down":
            place = place.chunk(2)[match["part"] == "up"]
        place.copy_(read(name))
    return weights
