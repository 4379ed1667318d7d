"""Perplexity, mean KL and top-1 agreement of anything that gives logits.

Texts are tokenised as one stream without special tokens and cut into whole windows of `context` tokens; each window
starts afresh and its first token is not scored. KL is KL(reference || target) in nats, averaged over all positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from signround.calibration import file_pieces, load_tokenizer, text_tokens
from signround.errors import refuse
from signround.runtimes.protocol import Runtime


@dataclass(frozen=True)
class Score:
    """`tokens` are the scored ones; the fields about a reference are None without one. `relative_error` is
    ||logits - reference|| / ||reference|| after centring each position (runtimes may give log-probabilities)."""

    perplexity: float
    tokens: int
    mean_kl: float | None = None
    top1_agreement: float | None = None
    max_abs_difference: float | None = None
    relative_error: float | None = None


def text_windows(folder: Path, text: Path, context: int) -> Tensor:
    """int64 [windows, context]: the whole text in the tokens of the model in `folder`, the incomplete tail left out.

    Raises RefusedError when the text has fewer tokens than one window, or the file is missing.
    """
    if not text.is_file():
        raise refuse("there is no such text file", "give the path of a UTF-8 text", str(text))
    tokens = text_tokens(load_tokenizer(folder), file_pieces(text))
    count = len(tokens) // context
    if count == 0:
        raise refuse(
            f"the text has {len(tokens)} tokens, one window needs {context}",
            "give a longer text or a smaller --context",
            str(text),
        )
    return tokens[: count * context].view(count, context)


def score(target: Runtime, windows: Tensor, reference: Runtime | None = None) -> Score:
    """Run `windows` [count, tokens] through `target`, and through `reference` beside it."""
    totals = _Totals()
    others = _exact_batches(reference.logits(windows), windows) if reference is not None else None
    for logits, tokens in _exact_batches(target.logits(windows), windows):
        totals.add_likelihood(logits, tokens)
        if others is not None:
            totals.add_reference(logits, next(others)[0].to(logits.device))
    return totals.score(compared=reference is not None)


def _exact_batches(batches: Iterator[Tensor], windows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """One window at a time with its tokens, whatever batches the runtime prefers."""
    index = 0
    for batch in batches:
        for logits in batch:
            yield logits, windows[index].to(logits.device)
            index += 1
    assert index == len(windows), "the runtime must give one row of logits for each window"


class _Totals:
    """Running sums in float64 over float32 log-probabilities."""

    def __init__(self) -> None:
        self.likelihood = 0.0
        self.scored = 0
        self.divergence = 0.0
        self.agreed = 0
        self.compared = 0
        self.largest = 0.0
        self.difference_square = 0.0
        self.reference_square = 0.0

    def add_likelihood(self, logits: Tensor, tokens: Tensor) -> None:
        log_probabilities = logits[:-1].log_softmax(-1)
        self.likelihood -= log_probabilities.gather(-1, tokens[1:, None]).double().sum().item()
        self.scored += len(tokens) - 1

    def add_reference(self, logits: Tensor, reference: Tensor) -> None:
        ours, theirs = logits.log_softmax(-1), reference.log_softmax(-1)
        self.divergence += (theirs.exp() * (theirs - ours)).sum(dtype=torch.float64).item()
        self.agreed += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        self.compared += len(logits)
        self.largest = max(self.largest, (ours - theirs).abs().max().item())
        centred = theirs - theirs.mean(-1, keepdim=True)
        difference = ours - ours.mean(-1, keepdim=True) - centred
        self.difference_square += difference.square().sum(dtype=torch.float64).item()
        self.reference_square += centred.square().sum(dtype=torch.float64).item()

    def score(self, *, compared: bool) -> Score:
        perplexity = math.exp(self.likelihood / self.scored)
        if not compared:
            return Score(perplexity, self.scored)
        return Score(
            perplexity,
            self.scored,
            mean_kl=self.divergence / self.compared,
            top1_agreement=self.agreed / self.compared,
            max_abs_difference=self.largest,
            relative_error=math.sqrt(self.difference_square / self.reference_square),
        )


def spread(windows: Tensor, positions: int) -> Tensor:
    """At most `positions` positions of `windows`, as evenly spread whole windows, the last resort being shorter ones."""
    count, tokens = windows.shape
    if positions >= count * tokens:
        return windows
    length = min(tokens, max(2, positions))
    chosen = torch.linspace(0, count - 1, max(1, positions // length)).round().long()
    return windows[chosen, :length]
