"""Perplexity, KL and top-1 against direct computations, and every kind of target through its runtime."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from signround.artifact import QuantizedCheckpoint
from signround.calibration import load_tokenizer
from signround.checkpoint import SourceCheckpoint
from signround.errors import RefusedError
from signround.evaluate import Evaluation, evaluate_target, score, spread, text_windows
from signround.events import Event, Notice
from signround.pipeline import export
from signround.runtimes.protocol import Speed
from signround.runtimes.torch_blocks import float_model, tuned_model

SENTENCES = "".join(f"The quick brown fox number {i} jumps over the lazy dog.\n" for i in range(40))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text(SENTENCES)
    return path


class Scripted:
    """A runtime whose logits are given; they come in uneven batches, as runtimes may."""

    affordable_positions: int | None = None
    name = "scripted"

    def __init__(self, logits: Tensor, batches: list[int]) -> None:
        self._logits, self._batches = logits, batches
        self.vocabulary = logits.shape[-1]

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        yield from torch.split(self._logits, self._batches)

    def speed(self, prompt: int = 128, new: int = 16) -> Speed | None:
        return None

    def close(self) -> None:
        """Nothing is held."""


def scripted_pair() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = 3 * torch.randn(5, 7, 50, generator=generator)
    target = reference + 0.3 * torch.randn(5, 7, 50, generator=generator)
    windows = torch.randint(0, 50, (5, 7), generator=generator)
    return target, reference, windows


def test_figures_against_float64() -> None:
    target, reference, windows = scripted_pair()
    found = score(Scripted(target, [2, 2, 1]), windows, Scripted(reference, [4, 1]))
    ours, theirs = target.double().log_softmax(-1), reference.double().log_softmax(-1)
    likelihood = -ours[:, :-1].gather(-1, windows[:, 1:, None]).mean()
    other = -theirs[:, :-1].gather(-1, windows[:, 1:, None]).mean()
    assert found.perplexity == pytest.approx(likelihood.exp().item(), rel=1e-6)
    assert found.reference_perplexity == pytest.approx(other.exp().item(), rel=1e-6)
    assert found.tokens == 5 * 6  # the first token of a window has nothing before it
    divergence = torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()
    assert found.mean_kl == pytest.approx(divergence.item(), rel=1e-5)
    agreed = (target.argmax(-1) == reference.argmax(-1)).double().mean()
    assert 0 < agreed < 1
    assert found.top1_agreement == pytest.approx(agreed.item(), abs=1e-12)
    assert found.max_abs_difference == pytest.approx((ours - theirs).abs().max().item(), rel=1e-5)
    centred = theirs - theirs.mean(-1, keepdim=True)
    gap = ours - ours.mean(-1, keepdim=True) - centred
    assert found.relative_error == pytest.approx((gap.norm() / centred.norm()).item(), rel=1e-5)


def test_a_constant_a_position_is_no_difference() -> None:
    """Some runtimes give log-probabilities, others logits."""
    _, reference, windows = scripted_pair()
    shifted = Scripted(reference.log_softmax(-1) + 5.0, [5])
    found = score(shifted, windows, Scripted(reference, [5]))
    assert found.mean_kl == pytest.approx(0.0, abs=1e-6)
    assert found.top1_agreement == 1.0
    assert found.relative_error is not None
    assert found.relative_error < 1e-6


def test_broken_logits_do_not_look_perfect() -> None:
    """A runtime that gives NaN must miss every gate."""
    target, reference, windows = scripted_pair()
    target[2, 3, 4] = float("nan")
    found = score(Scripted(target, [5]), windows, Scripted(reference, [5]))
    for value in (found.perplexity, found.mean_kl, found.relative_error):
        assert value is not None
        assert math.isnan(value)


def test_absurd_logits_have_an_infinite_perplexity() -> None:
    """Those of a file with one damaged scale; `math.exp` would raise."""
    target, _, windows = scripted_pair()
    assert score(Scripted(1e6 * target, [5]), windows).perplexity == float("inf")


def test_without_a_reference_nothing_is_compared() -> None:
    target, _, windows = scripted_pair()
    found = score(Scripted(target, [5]), windows)
    assert (found.mean_kl, found.top1_agreement, found.relative_error) == (None, None, None)


def test_perplexity_is_that_of_transformers(llama_folder: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32, local_files_only=True).eval()
    ids = AutoTokenizer.from_pretrained(llama_folder)(SENTENCES, add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.double() for window in windows]  # mean over 31 tokens
    measured = evaluate_target(llama_folder, text, context=32)
    assert measured.perplexity == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-5)
    assert measured.tokens == 31 * len(windows)
    assert measured.tokens_in_text == windows.numel()
    assert measured.mean_kl is None


def test_windows_of_a_text(llama_folder: Path, text: Path) -> None:
    windows = text_windows(llama_folder, text, 32)
    whole = load_tokenizer(llama_folder).decode(windows.flatten())
    assert SENTENCES.startswith(whole)  # in order, no special tokens
    assert len(SENTENCES) - len(whole) < 32 * 8  # the tail of less than a window
    with pytest.raises(RefusedError, match=r"the text has \d+ tokens, one window needs 4096.*smaller --context"):
        text_windows(llama_folder, text, 4096)
    with pytest.raises(RefusedError, match="no such text file"):
        text_windows(llama_folder, text.with_name("none.txt"), 32)


@pytest.mark.parametrize("positions", [1, 2, 7, 16, 40, 95, 96, 1000])
def test_a_stated_part_is_spread_evenly(positions: int) -> None:
    windows = torch.arange(96).view(6, 16)
    part = spread(windows, positions)
    assert part.numel() <= max(positions, 2)  # a window of one token would have nothing to predict
    assert part.shape[1] >= 2
    starts = part[:, 0].tolist()
    assert all(start % 16 == 0 for start in starts)
    assert len(set(starts)) == len(starts)
    if positions >= 96:
        assert torch.equal(part, windows)
    if positions == 40:
        assert starts == [0, 48]


# ---- targets


def test_an_artifact_against_its_source(llama_folder: Path, rounded_artifact: QuantizedCheckpoint, text: Path) -> None:
    measured = evaluate_target(rounded_artifact.folder, text, reference=llama_folder, context=32)
    windows = text_windows(llama_folder, text, 32)
    expected = score(tuned_model(rounded_artifact), windows, float_model(SourceCheckpoint(llama_folder)))
    assert measured.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert measured.mean_kl == pytest.approx(expected.mean_kl, rel=1e-6)
    assert measured.top1_agreement == expected.top1_agreement
    assert measured.mean_kl is not None
    assert measured.mean_kl > 1e-3
    assert any("mean KL" in line for line in measured.lines())
    itself = evaluate_target(llama_folder, text, reference=llama_folder, context=32)
    assert itself.mean_kl == pytest.approx(0.0, abs=1e-9)
    assert itself.top1_agreement == 1.0


def exported(artifact: QuantizedCheckpoint, name: str, folder: Path) -> Path:
    return export(artifact, name, folder / name).target


def agrees(measured: Evaluation, artifact: QuantizedCheckpoint, text: Path, kl: float) -> None:
    """The runtime's perplexity and KL against the tuned model in float."""
    assert measured.mean_kl is not None
    assert measured.mean_kl < kl
    assert math.isfinite(measured.perplexity)
    if measured.tokens_in_text - measured.tokens < measured.context + measured.tokens // measured.context + 1:
        expected = evaluate_target(artifact.folder, text, context=measured.context).perplexity
        assert measured.perplexity == pytest.approx(expected, rel=0.02)


def test_an_onnx_folder(rounded_artifact: QuantizedCheckpoint, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    target = exported(rounded_artifact, "onnx", tmp_path)
    measured = evaluate_target(target, text, reference=rounded_artifact.folder, context=32)
    assert "onnxruntime" in measured.runtime
    agrees(measured, rounded_artifact, text, kl=5e-3)


def test_a_gguf_file(
    rounded_artifact: QuantizedCheckpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few positions where llama.cpp is asked once a position; the part is stated."""
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr("signround.evaluate.PATIENCE", 0.01)
    target = exported(rounded_artifact, "gguf", tmp_path)
    events: list[Event] = []
    measured = evaluate_target(target, text, reference=rounded_artifact.folder, context=32, on_event=events.append)
    agrees(measured, rounded_artifact, text, kl=2e-2)
    if measured.tokens < measured.tokens_in_text * 31 // 32:
        notices = [event.text for event in events if isinstance(event, Notice)]
        assert any("positions are evaluated" in notice for notice in notices)
        assert "a part" in measured.lines()[1]


@pytest.mark.slow
def test_a_gptq_folder(rounded_artifact: QuantizedCheckpoint, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    target = exported(rounded_artifact, "gptq", tmp_path)
    measured = evaluate_target(target, text, reference=rounded_artifact.folder, context=32)
    assert "gptqmodel" in measured.runtime
    agrees(measured, rounded_artifact, text, kl=1e-4)


# ---- refusals


def test_another_vocabulary_is_refused(llama_folder: Path, text: Path, tmp_path: Path) -> None:
    from tests.small_models import write_small_model

    other = write_small_model(tmp_path / "other", vocab_size=576)
    with pytest.raises(RefusedError, match=r"576 tokens in its vocabulary, the target 512"):
        evaluate_target(llama_folder, text, reference=other, context=32)


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_a_device_that_is_not_there_is_refused(llama_folder: Path, text: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(RefusedError, match="--device"):
        evaluate_target(llama_folder, text, context=32, device=device)


def test_a_device_that_does_not_apply_is_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    def present(device: str) -> Any:
        return "cuda", "bf16"

    monkeypatch.setattr("signround.evaluate.checked_device", present)
    with pytest.raises(RefusedError, match="cuda does not apply to gguf files"):
        evaluate_target(tmp_path / "model.gguf", text, device="cuda")


def test_what_is_no_model_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no model is found here"):
        evaluate_target(tmp_path / "none", text)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RefusedError, match="not valid JSON"):
        evaluate_target(tmp_path, text)
