"""What the library tells while it works: frozen records handed to one callable. It never prints; the CLI draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StageStarted:
    """A stage of the job begins: `stage` is one of plan, calibrate, tune, evaluate, export, verify."""

    stage: str
    detail: str = ""
    total: int | None = None


@dataclass(frozen=True)
class StageAdvanced:
    """`done` of `total` units of the current stage are finished."""

    stage: str
    done: int
    total: int
    detail: str = ""


@dataclass(frozen=True)
class BlockTuned:
    """One block is committed. Losses are those of tuning (`BlockProblem.loss`) on the held-out subset; `kept` names
    what each layer ended as ("tuned" or the start it fell back to)."""

    index: int
    total: int
    seconds: float
    loss_rounded: float
    loss_tuned: float
    kept: dict[str, str]
    resumed: bool = False


@dataclass(frozen=True)
class Notice:
    """Something that the user should know and that is not an error (a fallback, a resumed run, a skipped check)."""

    text: str


Event = StageStarted | StageAdvanced | BlockTuned | Notice
Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """The default listener."""
