"""What evaluation and parity ask of a runtime: logits of every position of token windows, and how fast it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one sequence: `prompt` tokens in one pass, then `new` tokens one at a time.

    One noisy measurement on this machine, with whatever else runs on it: to compare formats roughly, never a gate.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prompt: int
    new: int


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

    def speed(self, prompt: int = 128, new: int = 16) -> Speed | None:
        """Time `prompt` tokens in one pass and `new` single-token steps after them, on the keys and values kept
        (runtimes/speed.py says how often). None where this is a reader, not what users run for its speed.

        `prompt` and `new` are at least 1 and their sum fits the model's context. Raises FailedError when the runtime
        cannot run the file so.
        """
        ...

    def close(self) -> None:
        """Free the model; the object is not used afterwards."""
        ...
