"""Speed from the runtime to the report: the best of a few bounded passes, for the run as shipped, judged by nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exporters.gguf.exporter import GgufExporter
from signround import parity
from signround.artifact import QuantizedCheckpoint
from signround.errors import FailedError
from signround.events import Event, Notice
from signround.exporting import ExportedModel
from signround.parity import Gate, Parity
from signround.report import (
    COLUMNS,
    ExportResult,
    build_report,
    markdown,
    parity_json,
    parity_lines,
    table_rows,
    web_page,
)
from signround.runtimes import speed
from signround.runtimes.protocol import Speed
from signround.runtimes.speed import any_tokens, best_speed, fitting
from signround.runtimes.torch_blocks import TorchBlocks, tuned_model
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

pytest.importorskip("gguf")
MEASURED = Speed(5210.4, 83.25, 48, 16)


class Clock:
    """A clock that only the passes move."""

    def __init__(self, passes: list[tuple[float, float]]) -> None:
        self.now, self._passes = 0.0, iter(passes)

    def perf_counter(self) -> float:
        return self.now

    def one_pass(self) -> tuple[float, float]:
        seconds = next(self._passes)
        self.now += sum(seconds)
        return seconds


@pytest.mark.parametrize(
    ("passes", "left", "best"),
    [
        (
            [(0.4, 0.2), (0.1, 0.2), (0.2, 0.05), (0.2, 0.2), (0.0, 0.0)],
            1,
            (0.1, 0.05),
        ),  # best of either part, at most 4
        ([(1.0, 0.5), (0.2, 0.5), (0.0, 0.0)], 1, (0.2, 0.5)),  # no pass begins after two seconds
        ([(30.0, 8.0), (0.0, 0.0)], 1, (30.0, 8.0)),  # a large model: one pass
    ],
)
def test_the_best_of_bounded_passes(
    monkeypatch: pytest.MonkeyPatch, passes: list[tuple[float, float]], left: int, best: tuple[float, float]
) -> None:
    clock = Clock(passes)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    found = best_speed(clock.one_pass, 100, 10)
    assert found == Speed(pytest.approx(100 / best[0]), pytest.approx(10 / best[1]), 100, 10)
    assert len(list(clock._passes)) == left


def test_shapes_fit_the_context() -> None:
    assert fitting(4096) == (128, 16)
    assert fitting(144) == (128, 16)
    for context in (2, 3, 16, 17, 143):
        prompt, new = fitting(context)
        assert prompt >= 1
        assert new >= 1
        assert prompt + new <= context
    assert all(0 <= token < 5 for token in any_tokens(40, 5))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedCheckpoint, ExportedModel]:
    folder = tmp_path_factory.mktemp("speed")
    model = write_small_model(folder / "model", max_position_embeddings=64)
    artifact = write_rounded_artifact(model, folder / "artifact", "w4g32")
    return artifact, GgufExporter().export(artifact, folder / "gguf", lambda event: None)


class Timed(TorchBlocks):
    """The tuned model as if it were a runtime with a speed."""

    def __init__(self, artifact: QuantizedCheckpoint, fails: bool = False) -> None:
        super().__init__("timed", tuned_model(artifact).blocks)
        self.asked: list[tuple[int, int]] = []
        self._fails = fails

    def speed(self, prompt: int = 128, new: int = 16) -> Speed | None:
        self.asked.append((prompt, new))
        if self._fails:
            raise FailedError("file.gguf: no room for the cache.")
        return MEASURED


Run = tuple[str, Callable[[Path, object], AbstractContextManager[TorchBlocks]], Gate]


def runs_of(**runtimes: TorchBlocks) -> tuple[Run, ...]:
    def opened(runtime: TorchBlocks) -> Callable[[Path, object], AbstractContextManager[TorchBlocks]]:
        @contextmanager
        def open_it(target: Path, _: object) -> Iterator[TorchBlocks]:
            yield runtime

        return open_it

    return tuple((label, opened(runtime), Gate(relative_error=1e-5)) for label, runtime in runtimes.items())


def verified(
    exported: tuple[QuantizedCheckpoint, ExportedModel], monkeypatch: pytest.MonkeyPatch, **runtimes: TorchBlocks
) -> tuple[Parity, list[Event]]:
    artifact, files = exported
    events: list[Event] = []
    monkeypatch.setitem(parity._RUNS, "gguf", runs_of(**runtimes))
    windows = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    return parity.verify(artifact, GgufExporter(), files, windows, events.append), events


def reported(exported: tuple[QuantizedCheckpoint, ExportedModel], found: Parity) -> dict[str, Any]:
    artifact, files = exported
    exports = [ExportResult(files, found, 1.0, 1)]
    report = build_report(artifact, "job", "model", None, exports, files.target.parent)
    return report | {"calibration": {"tokens": 32, "source": "self"}}  # an artifact made without tuning has none


def test_only_the_run_as_shipped_is_timed(
    exported: tuple[QuantizedCheckpoint, ExportedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, shipped = Timed(exported[0]), Timed(exported[0])
    found, _ = verified(exported, monkeypatch, exact=exact, shipped=shipped)
    assert exact.asked == []
    assert shipped.asked == [(48, 16)]  # the model's context is 64
    assert found.logits is not None
    assert found.logits.speed == MEASURED
    assert found.exact_logits is not None
    assert found.exact_logits.speed is None


def test_the_report_says_it(
    exported: tuple[QuantizedCheckpoint, ExportedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = verified(exported, monkeypatch, shipped=Timed(exported[0]))
    fields = {"prefill_tokens_per_second": 5210.4, "decode_tokens_per_second": 83.25, "prompt": 48, "new": 16}
    report = reported(exported, found)
    assert report["exports"]["gguf"]["speed"] == fields
    assert parity_json(found)["speed"] == fields
    assert "speed: 5,210 tokens a second of a prompt of 48, 83.2 of 16 new ones" in "\n".join(parity_lines(found))
    (row,) = table_rows(report)
    assert dict(zip(COLUMNS, row, strict=True))["prefill / decode tokens/s"] == "5,210 / 83"
    for page in (markdown(report), web_page(report)):
        assert "prefill / decode tokens/s" in page
        assert "5,210 / 83" in page


def test_a_reader_has_no_speed(
    exported: tuple[QuantizedCheckpoint, ExportedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, events = verified(exported, monkeypatch, shipped=tuned_model(exported[0]))
    report = reported(exported, found)
    assert report["exports"]["gguf"]["speed"] is None
    assert "not timed" in table_rows(report)[0]
    assert not [event for event in events if isinstance(event, Notice)]
    assert not any(line.startswith("speed") for line in parity_lines(found))
    del report["exports"]["gguf"]["speed"]  # a report from before the field
    assert "not timed" in table_rows(report)[0]


def test_a_failure_is_told_and_fails_nothing(
    exported: tuple[QuantizedCheckpoint, ExportedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, events = verified(exported, monkeypatch, shipped=Timed(exported[0], fails=True))
    assert found.passed
    assert reported(exported, found)["exports"]["gguf"]["speed"] is None
    assert [event.text for event in events if isinstance(event, Notice)] == [
        "gguf: the speed was not measured, file.gguf: no room for the cache."
    ]
