"""What evaluation and parity ask of a runtime: logits of every position of token windows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class Runtime(Protocol):
    """A loaded model file in the runtime that its users run.

    `name` says what ran and how ("onnxruntime 1.31.1, accuracy_level 4"). `vocabulary` is the width of the logits.
    `affordable_positions` is None when a whole window is one forward pass; a runtime that must be asked once a position
    says how many take about half a minute, and callers take a stated subset. The number depends on the file alone,
    so that the same job looks at the same positions on every machine.
    """

    name: str
    vocabulary: int
    affordable_positions: int | None

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """`windows` int64 [count, tokens] -> float32 [n, tokens, vocabulary] batches that add up to `count`, in order.

        Values may be log-probabilities: only differences within a position carry meaning. Raises FailedError when the
        runtime cannot load or run the file.
        """
        ...

    def close(self) -> None:
        """Free the model; the object is not used afterwards."""
        ...
