"""Without an extra there is one sentence that names it, or a note and a weaker check; never a traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from exporters.gguf.exporter import GgufExporter
from exporters.onnx.exporter import OnnxExporter
from signround.artifact import QuantizedCheckpoint
from signround.errors import RefusedError
from signround.events import Event, Notice
from signround.exporting import Exporter, missing_packages
from signround.parity import compare_weights
from signround.pipeline import export
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    folder = tmp_path_factory.mktemp("extras")
    return write_rounded_artifact(write_small_model(folder / "model", "llama"), folder / "artifact", "w4g32")


def without(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)


def test_nothing_is_said_of_what_is_there() -> None:
    assert missing_packages(("json", "torch"), "all", "test") == []


def test_all_that_is_missing_is_named_at_once() -> None:
    (refusal,) = missing_packages(("json", "no_such_one", "nor_this"), "gguf", "test")
    wanted = "test: no_such_one, nor_this must be installed, and are not; run `pip install 'signround[gguf]'`."
    assert refusal.sentence() == wanted


@pytest.mark.parametrize("module", ["onnx", "onnx_ir"])
def test_onnx_is_refused_before_the_work(
    artifact: QuantizedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    without(monkeypatch, module)
    with pytest.raises(RefusedError, match=rf"{module} must be installed, .* 'signround\[onnx\]'"):
        export(artifact, "onnx", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(("exporter", "module"), [(GgufExporter(), "gguf"), (OnnxExporter(), "onnxruntime")])
def test_our_own_parser_stands_in_and_a_note_says_so(
    artifact: QuantizedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exporter: Exporter, module: str
) -> None:
    exported = export(artifact, exporter, tmp_path / "out")
    without(monkeypatch, module)
    events: list[Event] = []
    weights = compare_weights(artifact, exporter, exported, events.append)
    assert (weights.passed, weights.reader, weights.tensors) == (True, "own parser", len(artifact.layers))
    (note,) = events
    assert isinstance(note, Notice)
    assert f"{module} must be installed" in note.text
