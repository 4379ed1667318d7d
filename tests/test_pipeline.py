"""The story from Python: what a job is, what it may refuse, and what happens when a runtime misses its gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import signround
from signround import pipeline
from signround.artifact import QuantizedCheckpoint
from signround.calibration import EVALUATION_WINDOWS
from signround.errors import FailedError, RefusedError
from signround.estimate import describe
from signround.evaluate import Score
from signround.events import BlockTuned, Event, Notice, StageStarted
from signround.parity import Gate, LogitParity, Parity, WeightParity
from signround.pipeline import prepare
from signround.recipes import settings_for
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

FAST: dict[str, Any] = {"samples": 4, "seqlen": 16, "iters": 2}
RTN: dict[str, Any] = {"method": "rtn", "samples": 2, "seqlen": 16}


@pytest.mark.parametrize("method", ["signround", "signround-400", "rtn"])
@pytest.mark.parametrize(("family", "scheme"), [("llama-untied", "w2g64"), ("qwen3", "w4g32-asym"), ("qwen2", "q4_1")])
def test_every_method_on_several_families(family: str, scheme: str, method: str, tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", family)
    settings = RTN if method == "rtn" else FAST | {"method": method}
    events: list[Event] = []
    report = signround.quantize(model, scheme, tmp_path / "out", **settings, on_event=events.append)
    assert report["recipe"]["method"] == method
    assert [event.index for event in events if isinstance(event, BlockTuned)] == [0, 1]
    assert [event.stage for event in events if isinstance(event, StageStarted)] == ["calibrate", "tune"]
    for block in report["tuning"]["blocks"]:
        assert block["loss_tuned"] <= block["loss_rounded"]
        assert len(block["kept"]) == 7
    if method == "rtn":
        assert report["perplexity"]["tuned"] == pytest.approx(report["perplexity"]["rounded"], rel=1e-6)
    assert signround.load(tmp_path / "out" / "artifact").config.model_type == model_type(family)


def model_type(family: str) -> str:
    return family.split("-", maxsplit=1)[0]


SENTENCE = "The quick brown fox jumps over the lazy dog.\n"


def test_a_recipe_is_cut_to_the_text(llama_folder: Path, tmp_path: Path) -> None:
    """A text that is shorter than the recipe would like is used up, and the plan says so; a number that the user gave
    is not touched."""
    recipe = settings_for("signround", "fast", context=512).samples
    text = tmp_path / "text.txt"
    text.write_text(SENTENCE * 700)
    request: dict[str, Any] = {"calibration": str(text), "recipe": "fast", "seqlen": 128}
    job = prepare(llama_folder, "w4g32", None, **request)
    samples = job.plan.tuning.samples
    assert recipe // 4 < samples < recipe
    assert job.tokens is not None
    assert job.tokens.tuning.shape == (samples, 128)
    assert len(job.tokens.evaluation) == EVALUATION_WINDOWS
    (note,) = job.notes
    assert note == f"{samples} samples are taken instead of the recipe's {recipe}: the calibration text has no more"
    assert note in describe(job)["notes"]
    events: list[Event] = []
    signround.quantize(llama_folder, "w4g32", tmp_path / "out", **request, iters=1, on_event=events.append)
    assert Notice(note) in events
    assert prepare(llama_folder, "w4g32", None, **request).plan.fingerprint == job.plan.fingerprint
    with pytest.raises(RefusedError, match=rf"are needed \({recipe} samples of 128\)"):
        prepare(llama_folder, "w4g32", None, samples=recipe, **request)
    for short in ({"samples": 8}, {"seqlen": 16}):
        assert not prepare(llama_folder, "w4g32", None, **(request | short)).notes


def test_a_recipe_is_cut_to_the_memory(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SENTENCE * 1000)
    request: dict[str, Any] = {"calibration": str(text), "recipe": "fast", "seqlen": 16}
    whole = prepare(llama_folder, "w4g32", None, **request)
    need = 2 * whole.plan.tuning.samples * 16 * 128 * 2  # of both chains in bfloat16
    monkeypatch.setattr(pipeline, "physical_memory", lambda: need)
    half = prepare(llama_folder, "w4g32", None, **request)
    assert (half.plan.tuning.samples, half.plan.tuning.hidden_states) == (whole.plan.tuning.samples // 2, "bf16")
    (note,) = half.notes
    assert note.endswith(": more hidden states do not fit in memory")
    assert not whole.notes


def test_a_text_of_the_user_is_evaluated(llama_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 60)
    report = signround.quantize(llama_folder, "w4g32", tmp_path / "out", **RTN, text=text)
    assert report["perplexity"]["text"] == "text.txt"
    assert report["perplexity"]["tokens"] % 511 == 0
    text.write_text("Something else entirely.\n" * 200)
    again = signround.quantize(llama_folder, "w4g32", tmp_path / "out", **RTN, text=text)
    assert again["perplexity"]["float"] != report["perplexity"]["float"]  # another text is another job ...
    assert again["artifact"] == report["artifact"]  # ... on the same artifact


def test_a_short_calibration_text_leaves_its_held_out_part(llama_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word1 and word2\n" * 12)
    report = signround.quantize(llama_folder, "w4g32", tmp_path / "out", **FAST, calibration=str(text))
    assert "of the calibration text" in report["perplexity"]["text"]
    assert report["calibration"]["source"] == "text.txt"
    assert report["calibration"]["tokens"] == 64


def test_a_plan_does_no_work(llama_folder: Path, tmp_path: Path) -> None:
    job = pipeline.prepare(llama_folder, "w4g128-asym", tmp_path / "out", ["gptq", "onnx"], **FAST)
    assert not (tmp_path / "out").exists()
    assert all(layer.grid.zero_floor == 1 for layer in job.plan.layers())  # GPTQ is among the targets
    alone = pipeline.prepare(llama_folder, "w4g128-asym", tmp_path / "out", ["onnx"], **FAST)
    assert all(layer.grid.zero_floor == 0 for layer in alone.plan.layers())


def test_too_large_a_model_cannot_write_its_own_text(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "physical_memory", lambda: 1 << 28)
    with pytest.raises(RefusedError, match=r"to write its own text.*give a text file"):
        pipeline.prepare(llama_folder, "w4g32", tmp_path / "out", **FAST)


def test_a_format_more_from_a_finished_artifact(rounded_artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    exported = signround.export(rounded_artifact.folder, "gguf", tmp_path / "gguf")
    assert exported.target.is_file()
    with pytest.raises(RefusedError, match="format 'coreml' is not known"):
        signround.export(rounded_artifact.folder, "coreml", tmp_path / "x")


def test_export_refuses_what_the_format_cannot_hold(llama_folder: Path, tmp_path: Path) -> None:
    artifact = write_rounded_artifact(llama_folder, tmp_path / "artifact", "w3g128")
    with pytest.raises(RefusedError, match=r"^gguf: "):
        signround.export(artifact, "gguf", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_a_damaged_artifact_is_not_exported(llama_folder: Path, tmp_path: Path) -> None:
    artifact = write_rounded_artifact(llama_folder, tmp_path / "artifact", "w4g32")
    block = artifact.folder / "blocks" / "00001.safetensors"
    data = bytearray(block.read_bytes())
    data[-5] ^= 1
    block.write_bytes(data)
    with pytest.raises(FailedError, match=r"1 files are damaged \(blocks/00001.safetensors"):
        signround.export(artifact.folder, "gptq", tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()


def test_what_is_not_exported_is_not_verified(rounded_artifact: QuantizedCheckpoint, llama_folder: Path) -> None:
    for target in (rounded_artifact.folder, llama_folder):
        with pytest.raises(RefusedError, match="not an exported file"):
            signround.verify(target, rounded_artifact.folder)


# ---- a runtime that misses its gate


def verdicts(*passes: bool, exact: bool = True, aim: Gate | None = None) -> Callable[..., Parity]:
    """In place of `verify`: shipped logits pass or fail, call by call; a mean KL of 1e-2 is what was measured."""
    remaining = iter(passes)

    def verify(*arguments: object) -> Parity:
        figures = Score(10.0, 9, 10, 1e-2, 0.9, 1.0, 0.1, 10.0)
        run = LogitParity("runtime", 10, figures, 10.0, Gate(mean_kl=5e-4), next(remaining), aim=aim)
        return Parity(WeightParity("independent", 1, 1, 0.0, (), ()), run, replace(run, passed=exact))

    return verify


@pytest.mark.parametrize(
    ("passes", "levels"), [((True,), [4]), ((False, True), [4, 4]), ((False, False, True), [4, 4, 0])]
)
def test_a_coarse_runtime_gets_a_more_exact_file(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: tuple[bool, ...], levels: list[int]
) -> None:
    """And each step is told, and the report speaks of the last one."""
    written: list[Any] = []
    real = pipeline._written

    def write(artifact: Any, exporter: Any, out: Path, on_event: Any) -> Any:
        written.append(exporter)
        return real(artifact, exporter, out, on_event)

    monkeypatch.setattr(pipeline, "_written", write)
    monkeypatch.setattr(pipeline, "verify_files", verdicts(*passes))
    events: list[Event] = []
    report = signround.quantize(llama_folder, "w4g32", tmp_path / "out", ["onnx"], **RTN, on_event=events.append)
    assert [exporter.accuracy_level for exporter in written] == levels
    assert report["exports"]["onnx"]["passed"]
    options = ["", "onnx.exact_down_proj=true", "onnx.accuracy_level=0"]
    assert report["exports"]["onnx"]["options"] == options[len(levels) - 1]
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert sum("writing it again" in notice for notice in notices) == len(levels) - 1


def test_verify_names_the_more_exact_forms(
    rounded_artifact: QuantizedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`export` writes what it is told and falls back to nothing; whoever then verifies is told what to ask for."""
    monkeypatch.setattr(pipeline, "verify_files", verdicts(False, True))
    monkeypatch.setattr(pipeline, "kept_tokens", lambda path: SimpleNamespace(evaluation=None))
    target = signround.export(rounded_artifact, "onnx", tmp_path / "onnx").target
    events: list[Event] = []
    signround.verify(target, rounded_artifact.folder, on_event=events.append)
    (notice,) = [event.text for event in events if isinstance(event, Notice)]
    assert "the file is exact, but runtime rounds activations too coarsely" in notice
    assert notice.endswith("export it again with --set onnx.exact_down_proj=true or --set onnx.accuracy_level=0")
    signround.verify(target, rounded_artifact.folder, on_event=events.append)
    assert len(events) == 1


@pytest.mark.parametrize(
    ("scheme", "overrides", "levels"),
    [
        ("w2g64", [], [4]),
        ("w8g32", [], [4]),
        ("w2g64", ["o_proj=w4g32"], [4, 0]),
        ("w4g32", ["lm_head=w8g32"], [4, 4, 0]),
    ],
)
def test_products_of_2_and_8_bits_stay_fast(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, overrides: list[str],
    levels: list[int],
) -> None:  # fmt: skip
    """What is aimed at is missed again and again; the last form is shipped, and that is told."""
    events: list[Event] = []
    monkeypatch.setattr(pipeline, "verify_files", verdicts(*[True] * len(levels), aim=Gate(mean_kl=5e-4)))
    report = signround.quantize(
        llama_folder, scheme, tmp_path / "out", ["onnx"], **RTN, tensor_types=overrides, on_event=events.append
    )
    assert report["exports"]["onnx"]["passed"]
    notices = [event.text for event in events if isinstance(event, Notice)]
    again = [notice for notice in notices if "writing it again with" in notice]
    assert [4, *(0 if "accuracy_level=0" in notice else 4 for notice in again)] == levels
    assert all("onnx.keep_fast=true" in notice for notice in again if "accuracy_level=0" in notice)
    assert sum("(mean KL 1.0e-02, 5e-04 is wanted); it stays" in notice for notice in notices) == 1


def test_a_wrong_file_is_not_written_again(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float activations fail as well, a more exact runtime would only hide it."""
    monkeypatch.setattr(pipeline, "verify_files", verdicts(False, exact=False))
    report = signround.quantize(llama_folder, "w4g32", tmp_path / "out", ["onnx"], **RTN)
    assert not report["exports"]["onnx"]["passed"]


def test_random_numbers_of_the_caller_do_not_matter(llama_folder: Path, tmp_path: Path) -> None:
    reports = []
    for index in range(2):
        torch.manual_seed(index)
        reports.append(signround.quantize(llama_folder, "w4g32", tmp_path / str(index), **FAST))
    assert reports[0]["artifact"]["fingerprint"] == reports[1]["artifact"]["fingerprint"]
    other = signround.quantize(llama_folder, "w4g32", tmp_path / "other", **FAST, seed=1)
    assert other["artifact"]["fingerprint"] != reports[0]["artifact"]["fingerprint"]
