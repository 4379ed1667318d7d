"""What each linear of a block saw: the mean square of its inputs, and how many tokens reached it.

For an expert those are the tokens that the router sent to it, not all of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from signround.importance import InputSquares


@dataclass
class LinearInputs:
    """`squares` float32 [columns] is the sum of squares over `tokens` inputs."""

    squares: Tensor
    tokens: int

    @property
    def mean_square(self) -> Tensor:
        """float32 [columns]: llama.cpp's importance of each column."""
        return self.squares / self.tokens


@contextmanager
def recorded(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, LinearInputs]]:
    """Within it, every call of a linear adds to its record, by the names given. A linear that is never called has no
    record."""
    seen: dict[str, LinearInputs] = {}

    def watch(name: str, linear: nn.Module) -> RemovableHandle:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens = inputs[0].detach().float().flatten(0, -2)
            squares = tokens.square().sum(0)
            if name in seen:
                seen[name] = LinearInputs(seen[name].squares + squares, seen[name].tokens + len(tokens))
            else:
                seen[name] = LinearInputs(squares, len(tokens))

        return linear.register_forward_pre_hook(add)

    hooks = [watch(name, linear) for name, linear in linears.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def tokens_of(seen: Mapping[str, LinearInputs], name: str) -> int:
    """Tokens that reached linear `name`."""
    return seen[name].tokens if name in seen else 0


def squares_of(seen: Mapping[str, LinearInputs], name: str, columns: int) -> InputSquares:
    """What linear `name` of `columns` inputs saw, as importance matrices hold it; zeros where no token came."""
    found = seen.get(name, LinearInputs(torch.zeros(columns), 0))
    return InputSquares(found.squares[None].cpu(), torch.tensor([found.tokens]))
