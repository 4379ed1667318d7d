"""Events drawn on stderr with rich: a bar for what runs, a line for what is finished."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from signround.events import BlockTuned, Event, Notice, StageAdvanced, StageStarted
from signround.experts import unit_of

# Set by Ctrl-C. The exception alone is not enough: raised while Python runs a callback from C, it is lost.
INTERRUPTED = threading.Event()
MOST_NAMES = 8  # more untuned layers than this are counted, not named
TITLES = {
    "calibrate": "calibration text",
    "tune": "tuning",
    "evaluate": "perplexity",
    "export": "writing",
    "verify": "running",
}


class ProgressDisplay:
    """A context manager that is also a `Listener`. On a terminal it draws bars; elsewhere only finished lines."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._current: tuple[str, TaskID] | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        if INTERRUPTED.is_set():
            raise KeyboardInterrupt
        if isinstance(event, StageStarted):
            self._show(event.stage, 0, event.total, event.detail)
            self.console.print(f"[bold]{TITLES.get(event.stage, event.stage)}[/] {escape(event.detail)}")
        elif isinstance(event, StageAdvanced):
            self._show(event.stage, event.done, event.total, event.detail)
        elif isinstance(event, BlockTuned):
            self.console.print(_block_line(event), soft_wrap=True, markup=False)
        elif isinstance(event, Notice):
            self.console.print(f"[yellow]note[/] {escape(event.text)}", soft_wrap=True)

    def _show(self, stage: str, done: int, total: int | None, detail: str) -> None:
        if self._current is None or self._current[0] != stage:
            if self._current is not None:
                self._bars.remove_task(self._current[1])
            title = TITLES.get(stage, stage)
            self._current = (stage, self._bars.add_task(title, total=total, detail=detail))
        self._bars.update(self._current[1], completed=done, total=total, detail=detail)


def _block_line(event: BlockTuned) -> str:
    where = f"  block {event.index + 1}/{event.total}"
    if event.resumed:
        return f"{where}  kept from an earlier run"
    units = {unit_of(name).removesuffix(".weight") for name in event.kept}
    untuned = sorted(
        {unit_of(name).removesuffix(".weight") for name, choice in event.kept.items() if choice != "tuned"}
    )
    named = ", ".join(untuned) if len(untuned) <= MOST_NAMES else f"{len(untuned)} of {len(units)}"
    fallen = f", not tuned: {named}" if untuned and len(untuned) < len(units) else ""
    if event.loss_rounded == 0:
        return f"{where}  rounded in {event.seconds:.1f} s"
    ratio = event.loss_tuned / event.loss_rounded
    return f"{where}  loss {ratio:.2f} of rounding, {event.seconds:.1f} s{fallen}"
