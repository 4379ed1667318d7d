"""Perplexity, mean KL and top-1 agreement of anything that gives logits.

Texts are tokenised as one stream without special tokens and cut into whole windows of `context` tokens; each window
starts afresh and its first token is not scored. KL is KL(reference || target) in nats, averaged over all positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from signround.calibration import file_pieces, load_tokenizer, text_tokens
from signround.errors import refuse
from signround.events import Listener, Notice, silent
from signround.recipes import checked_device
from signround.runtimes.protocol import Runtime
from signround.runtimes.targets import kind_of, open_target

PATIENCE = 4.0  # how many times its affordable positions a runtime that is asked once a position is given


@dataclass(frozen=True)
class Score:
    """`tokens` are the scored ones; the fields about a reference are None without one. `relative_error` is
    ||logits - reference|| / ||reference|| after centring each position (runtimes may give log-probabilities)."""

    perplexity: float
    tokens: int
    positions: int
    mean_kl: float | None = None
    top1_agreement: float | None = None
    max_abs_difference: float | None = None
    relative_error: float | None = None
    reference_perplexity: float | None = None
    median_kl: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The answer of `signround evaluate`. `tokens` are the scored ones of `tokens_in_text`."""

    perplexity: float
    tokens: int
    mean_kl: float | None
    top1_agreement: float | None
    runtime: str
    text: str
    tokens_in_text: int
    context: int
    reference: str | None

    def lines(self) -> list[str]:
        """For a person."""
        part = (
            ""
            if self.tokens_in_text - self.tokens < self.context + self.tokens // self.context + 1
            else (
                f" (a part: {self.tokens:,} of {self.tokens_in_text:,} tokens, this runtime is asked once a position)"
            )
        )
        lines = [
            f"{self.runtime}",
            f"perplexity {self.perplexity:.4f} on {self.tokens:,} tokens of {self.text}, context {self.context}{part}",
        ]
        if self.mean_kl is not None and self.top1_agreement is not None:
            lines.append(f"against {self.reference}: mean KL {self.mean_kl:.3e}, top-1 {self.top1_agreement:.2%}")
        return lines


def evaluate_target(
    target: Path,
    text: Path,
    *,
    reference: Path | None = None,
    context: int = 512,
    device: str = "cpu",
    on_event: Listener = silent,
) -> Evaluation:
    """Perplexity of whatever lies at `target` (see `runtimes.targets`) in its runtime, on the tokens of its own
    tokenizer; with `reference`, mean KL and top-1 agreement on the same tokens.

    A .gguf file has no tokenizer that transformers reads: its text is tokenised by llama.cpp.
    """
    _existing(text)
    _check_device(target, device)
    runtime = open_target(target, device)
    try:
        windows = target_windows(target, runtime, text, context)
        part = windows
        if runtime.affordable_positions is not None:
            part = spread(windows, int(PATIENCE * runtime.affordable_positions))
            if part.numel() < windows.numel():
                on_event(
                    Notice(
                        f"{runtime.name} is asked once a position: {part.numel():,} of {windows.numel():,} "
                        "positions are evaluated; `pip install signround[llama-cpp-python]` runs whole texts"
                    )
                )
        other = open_target(reference, device) if reference is not None else None
        if other is not None and other.vocabulary != runtime.vocabulary:
            raise refuse(
                f"the reference has {other.vocabulary} tokens in its vocabulary, the target {runtime.vocabulary}",
                "give the model that the target was made from",
                str(reference),
            )
        measured = score(runtime, part, other)
        if other is not None:
            other.close()
    finally:
        runtime.close()
    return Evaluation(
        measured.perplexity, measured.tokens, measured.mean_kl, measured.top1_agreement, runtime.name, text.name,
        windows.numel(), context, str(reference) if reference is not None else None,
    )  # fmt: skip


def _check_device(target: Path, device: str) -> None:
    """Refuse a device that is unknown or absent, and one that does not apply to the runtime."""
    checked_device(device)
    kind = kind_of(target)
    if device != "cpu" and kind not in ("artifact", "checkpoint"):
        raise refuse(
            f"{device} does not apply to {kind} files, their runtime computes on the processor",
            "leave --device out",
            "--device",
        )


def target_windows(target: Path, runtime: Runtime, text: Path, context: int) -> Tensor:
    """The text in windows of the target's own tokens."""
    kind = kind_of(target)
    if kind != "gguf":
        return text_windows(target / "model" if kind == "artifact" else target, text, context)
    from signround.runtimes.llama_cpp import LlamaCpp

    llama = cast(LlamaCpp, runtime)
    pieces = file_pieces(_existing(text))
    ids = [token for piece in pieces for token in llama.tokenize(piece, add_special=False, parse_special=False)]
    return _windows(torch.tensor(ids, dtype=torch.int64), text, context)


def text_windows(folder: Path, text: Path, context: int) -> Tensor:
    """int64 [windows, context]: the whole text in the tokens of the model in `folder`, the incomplete tail left out.

    Raises RefusedError when the text has fewer tokens than one window, or the file is missing.
    """
    return _windows(text_tokens(load_tokenizer(folder), file_pieces(_existing(text))), text, context)


def _existing(text: Path) -> Path:
    if not text.is_file():
        raise refuse("there is no such text file", "give the path of a UTF-8 text", str(text))
    return text


def _windows(tokens: Tensor, text: Path, context: int) -> Tensor:
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
            totals.add_reference(logits, next(others)[0].to(logits.device), tokens)
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
        self.reference_likelihood = 0.0
        self.scored = 0
        self.positions = 0
        self.divergences: list[Tensor] = []  # float64 [tokens] a window, on the CPU
        self.agreed = 0
        self.compared = 0
        self.largest = 0.0
        self.difference_square = 0.0
        self.reference_square = 0.0

    def add_likelihood(self, logits: Tensor, tokens: Tensor) -> None:
        self.likelihood -= _log_likelihood(logits.log_softmax(-1), tokens)
        self.scored += len(tokens) - 1
        self.positions += len(tokens)

    def add_reference(self, logits: Tensor, reference: Tensor, tokens: Tensor) -> None:
        ours, theirs = logits.log_softmax(-1), reference.log_softmax(-1)
        self.reference_likelihood -= _log_likelihood(theirs, tokens)
        self.divergences.append((theirs.exp() * (theirs - ours)).sum(-1, dtype=torch.float64).cpu())
        self.agreed += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        self.compared += len(logits)
        self.largest = max(self.largest, (ours - theirs).abs().max().item())
        centred = theirs - theirs.mean(-1, keepdim=True)
        difference = ours - ours.mean(-1, keepdim=True) - centred
        self.difference_square += difference.square().sum(dtype=torch.float64).item()
        self.reference_square += centred.square().sum(dtype=torch.float64).item()

    def score(self, *, compared: bool) -> Score:
        perplexity = _perplexity(self.likelihood / self.scored)
        if not compared:
            return Score(perplexity, self.scored, self.positions)
        divergences = torch.cat(self.divergences)
        divergence = divergences.mean().item()
        return Score(
            perplexity,
            self.scored,
            self.positions,
            mean_kl=0.0 if -1e-6 < divergence < 0.0 else divergence,  # a NaN must stay one, or it would pass the gates
            top1_agreement=self.agreed / self.compared,
            max_abs_difference=self.largest,
            relative_error=math.sqrt(self.difference_square / self.reference_square),
            reference_perplexity=_perplexity(self.reference_likelihood / self.scored),
            median_kl=divergences.median().item(),
        )


def _perplexity(mean: float) -> float:
    """Infinite for logits that no model gives: those of a damaged file."""
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def _log_likelihood(log_probabilities: Tensor, tokens: Tensor) -> float:
    """Sum of the log-probabilities of tokens[1:] at the positions before them."""
    return log_probabilities[:-1].gather(-1, tokens[1:, None]).sum(dtype=torch.float64).item()


def spread(windows: Tensor, positions: int) -> Tensor:
    """About `positions` positions of `windows`: evenly spread whole windows, or one shorter one."""
    count, tokens = windows.shape
    if positions >= count * tokens:
        return windows
    length = min(tokens, max(2, positions))
    wanted = max(1, positions // length)
    chosen = torch.arange(wanted) * count // wanted
    return windows[chosen, :length]
