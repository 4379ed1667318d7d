"""What can go wrong, as values: a refusal says what, got, allowed, next step in one sentence.

`RefusedError` means that nothing was done (exit code 2); `FailedError` means that work was started and did not
succeed (exit code 1). The library raises; only the CLI prints and exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RESTORE = "restore the file from the model's publisher"  # the next step where a model's file is damaged


@dataclass(frozen=True)
class Refusal:
    """One reason why a request is not served. `problem` says what was asked, what was found and what is allowed;
    `next_step` is an imperative the user can follow; `subject` is the format, tensor or file it is about."""

    problem: str
    next_step: str
    subject: str = ""

    def sentence(self) -> str:
        prefix = f"{self.subject}: " if self.subject else ""
        return f"{prefix}{self.problem}; {self.next_step}."


class SignroundError(Exception):
    """Base of every error that a user can mend."""

    exit_code = 1


class RefusedError(SignroundError):
    """The request was refused before any work. Holds every reason at once."""

    exit_code = 2

    def __init__(self, refusals: Refusal | Sequence[Refusal]) -> None:
        self.refusals = (refusals,) if isinstance(refusals, Refusal) else tuple(refusals)
        super().__init__("\n".join(refusal.sentence() for refusal in self.refusals))


class UnavailableError(RefusedError):
    """Nothing that is installed can read or run a file, which says nothing about the file. Any other refusal of a file
    that is being verified is about the file."""


class FailedError(SignroundError):
    """The work was started and failed; what was committed stays. The message is one sentence with the next step."""


def unavailable(problem: str, next_step: str, subject: str = "") -> UnavailableError:
    """As `refuse`, of a reader or runtime that is missing or does not know such files."""
    return UnavailableError(Refusal(problem, next_step, subject))


def refuse(problem: str, next_step: str, subject: str = "") -> RefusedError:
    """Shorthand for the common single refusal: `raise refuse("...", "...")`."""
    return RefusedError(Refusal(problem, next_step, subject))
