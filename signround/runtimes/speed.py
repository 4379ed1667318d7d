"""How fast a runtime reads a prompt and writes tokens: the best of a few passes, bounded in time.

The tokens are arbitrary, no logits are judged and nothing is gated. Other work on the machine makes a pass slower and
never faster, so the best pass is the least wrong one; the first, which warms caches up, counts only if it is that.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from signround.runtimes.protocol import Speed

PASSES = 4  # at most, the warm-up included
PATIENCE = 2.0  # seconds after which no further pass begins: one pass of a large model takes longer


def best_speed(one_pass: Callable[[], tuple[float, float]], prompt: int, new: int) -> Speed:
    """`one_pass` runs `prompt` tokens and then `new` steps, and gives the seconds of either part."""
    started = time.perf_counter()
    passes = [one_pass()]
    while len(passes) < PASSES and time.perf_counter() - started < PATIENCE:
        passes.append(one_pass())
    prefill, decode = (min(seconds) for seconds in zip(*passes, strict=True))
    return Speed(prompt / prefill, new / decode, prompt, new)


def any_tokens(count: int, vocabulary: int) -> list[int]:
    """`count` token ids that differ from their neighbours; which ones does not matter for the time."""
    return [(7 * index + 3) % vocabulary for index in range(count)]


def fitting(context: int, prompt: int = 128, new: int = 16) -> tuple[int, int]:
    """`prompt` and `new`, less where the model's context (at least 2) is shorter than their sum."""
    new = min(new, context // 2)
    return min(prompt, context - new), new
