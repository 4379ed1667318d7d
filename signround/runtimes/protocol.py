"""What evaluation and parity ask of a runtime: logits of every position of token windows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class Runtime(Protocol):
    """A loaded model file in the runtime that its users run.

    `name` says what ran and how ("onnxruntime 1.31.1, accuracy_level 4"). `vocabulary` is the width of the logits.
    `seconds_per_position` is None when a whole window is one forward pass; otherwise it estimates the cost of one
    position, and callers take a stated subset of positions.
    """

    name: str
    vocabulary: int
    seconds_per_position: float | None

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """`windows` int64 [count, tokens] -> float32 [n, tokens, vocabulary] batches that add up to `count`, in order.

        Values may be log-probabilities: only differences within a position carry meaning. Raises FailedError when the
        runtime cannot load or run the file.
        """
        ...

    def close(self) -> None:
        """Free the model; the object is not used afterwards."""
        ...
