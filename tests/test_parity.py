"""The verdict: a file that is the tuned model passes, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from signround import parity
from signround.artifact import QuantizedCheckpoint
from signround.errors import unavailable
from signround.evaluate import Score
from signround.events import Event, Notice
from signround.exporting import ExportedModel
from signround.file_types import Overrides
from signround.parity import (
    HALF_GRAPH,
    INT8_PRODUCTS,
    ROUTED,
    ROUTED_EXACT,
    Gate,
    LogitParity,
    Parity,
    WeightParity,
    compare_logits,
    compare_weights,
    gates_of,
    verify,
)
from signround.pipeline import export, make_exporters
from signround.qtensor import QuantizedTensor
from signround.runtimes.protocol import Runtime
from signround.runtimes.torch_blocks import tuned_model
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

LINEAR = "model.layers.1.mlp.up_proj.weight"
WINDOWS = torch.randint(3, 512, (4, 32), generator=torch.Generator().manual_seed(0))


@dataclass
class Altered:
    """Stands for an exporter whose files a test decides: the artifact's own tensors, with changes."""

    artifact: QuantizedCheckpoint
    changes: dict[str, Tensor | None] = field(default_factory=dict)
    more: dict[str, Tensor] = field(default_factory=dict)
    independent: bool = True

    def decode_independently(self, exported: ExportedModel) -> Iterator[tuple[str, Tensor]]:
        if not self.independent:
            raise unavailable("the reader is not installed", "install it")
        return self._tensors()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in [*self.artifact.layers, *self.artifact.kept]:
            tensor = self.changes.get(name, self.artifact.weight(name))
            if tensor is not None:
                yield name, tensor
        yield from self.more.items()

    def read_back(self, exported: ExportedModel) -> Iterator[tuple[str, QuantizedTensor]]:
        for name in self.artifact.layers:
            if self.changes.get(name, True) is not None:
                yield name, self.artifact.quantized(name)


def weights_of(altered: Altered, kept_dtype: torch.dtype | None = None) -> WeightParity:
    exported = ExportedModel("test", Path("x"), (), kept_dtype)
    return compare_weights(altered.artifact, altered, exported)  # type: ignore[arg-type]  # the two readers are enough


def test_equal_weights_pass(rounded_artifact: QuantizedCheckpoint) -> None:
    found = weights_of(Altered(rounded_artifact))
    assert found == WeightParity("independent", 14 + 6, 14 + 6, 0.0, (), ())
    assert found.passed


def test_one_bit_is_found(rounded_artifact: QuantizedCheckpoint) -> None:
    """The least step of one weight of one tensor."""
    weight = rounded_artifact.weight(LINEAR)
    weight[7, 5] = torch.nextafter(weight[7, 5], torch.tensor(9.0))
    found = weights_of(Altered(rounded_artifact, {LINEAR: weight}))
    assert not found.passed
    assert found.different == (LINEAR,)
    assert found.exact == found.tensors - 1
    assert 0 < found.worst_abs_difference < 1e-6


@pytest.mark.parametrize("kind", ["missing", "another shape", "NaN", "twice", "of another model"])
def test_other_faults_are_found(rounded_artifact: QuantizedCheckpoint, kind: str) -> None:
    weight = rounded_artifact.weight(LINEAR)
    altered = {
        "missing": Altered(rounded_artifact, {LINEAR: None}),
        "another shape": Altered(rounded_artifact, {LINEAR: weight.T.contiguous()}),
        "NaN": Altered(rounded_artifact, {LINEAR: torch.full_like(weight, float("nan"))}),
        "twice": Altered(rounded_artifact, more={LINEAR: weight}),
        "of another model": Altered(rounded_artifact, more={"model.layers.9.mlp.up_proj.weight": weight}),
    }[kind]
    found = weights_of(altered)
    assert not found.passed
    assert found.missing == ((LINEAR,) if kind == "missing" else ())
    assert bool(found.different) == (kind != "missing")


def test_logits_of_another_model_are_not_compared(rounded_artifact: QuantizedCheckpoint) -> None:
    """They may not even have the same vocabulary."""
    weight = rounded_artifact.weight(LINEAR)
    altered = Altered(rounded_artifact, {LINEAR: weight[:-1]})
    assert not weights_of(altered).comparable
    assert weights_of(Altered(rounded_artifact, {LINEAR: weight + 1})).comparable
    events: list[Event] = []
    exported = ExportedModel("onnx", Path("x"), ())
    found = verify(rounded_artifact, altered, exported, WINDOWS, events.append)  # type: ignore[arg-type]
    assert (found.passed, found.logits, found.exact_logits) == (False, None, None)
    assert any("logits were not compared" in event.text for event in events if isinstance(event, Notice))


def test_kept_matrices_may_be_stored_in_another_dtype(llama_folder: Path, tmp_path: Path) -> None:
    """Only where the exporter says so, only matrices, and only by one rounding."""
    from tests.small_artifacts import write_rounded_artifact
    from tests.small_models import write_small_model

    source = write_small_model(tmp_path / "model", dtype=torch.float32)
    artifact = write_rounded_artifact(source, tmp_path / "artifact", "w4g32")
    name = "model.embed_tokens.weight"
    half = artifact.weight(name).half().float()
    assert not torch.equal(half, artifact.weight(name))
    assert weights_of(Altered(artifact, {name: half}), torch.float16).passed
    assert not weights_of(Altered(artifact, {name: half})).passed
    norm = "model.norm.weight"
    altered = Altered(artifact, {name: half, norm: artifact.weight(norm).half().float()})
    assert weights_of(altered, torch.float16).different == (norm,)


def test_without_an_independent_reader_our_own_is_named(rounded_artifact: QuantizedCheckpoint) -> None:
    events: list[Event] = []
    altered = Altered(rounded_artifact, independent=False)
    exported = ExportedModel("test", Path("x"), ())
    found = compare_weights(rounded_artifact, altered, exported, events.append)  # type: ignore[arg-type]
    assert (found.reader, found.tensors, found.exact, found.passed) == ("own parser", 14, 14, True)
    assert any("own parser only" in event.text for event in events if isinstance(event, Notice))
    altered.changes[LINEAR] = None
    assert weights_of(altered).missing == (LINEAR,)


class Noisy:
    """The tuned model with noise on its logits."""

    name = "noisy"
    affordable_positions: int | None = None

    def __init__(self, artifact: QuantizedCheckpoint, noise: float) -> None:
        self._model = tuned_model(artifact)
        self.vocabulary = self._model.vocabulary
        self._noise = noise

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for batch in self._model.logits(windows):
            yield batch + self._noise * torch.randn(batch.shape, generator=generator)

    def speed(self, prompt: int = 128, new: int = 16) -> None:
        """Not timed."""

    def close(self) -> None:
        """Nothing is held."""


def test_gates_on_logits(rounded_artifact: QuantizedCheckpoint) -> None:
    """Noise of variance s^2 on logits has a mean KL of about s^2 / 2."""
    gate = Gate(mean_kl=1e-3)
    near = compare_logits(rounded_artifact, Noisy(rounded_artifact, 0.02), gate, WINDOWS)
    far = compare_logits(rounded_artifact, Noisy(rounded_artifact, 0.1), gate, WINDOWS)
    assert near.passed
    assert not far.passed
    assert near.score.mean_kl == pytest.approx(0.02**2 / 2, rel=0.2)
    assert far.score.mean_kl == pytest.approx(0.1**2 / 2, rel=0.2)
    assert near.tokens == WINDOWS.numel()
    assert compare_logits(rounded_artifact, Noisy(rounded_artifact, 0.0), Gate(0.0, 1.0, 1e-5), WINDOWS).passed


def test_a_dear_runtime_is_asked_a_stated_part(rounded_artifact: QuantizedCheckpoint) -> None:
    runtime = Noisy(rounded_artifact, 0.0)
    runtime.affordable_positions = 40
    found = compare_logits(rounded_artifact, runtime, Gate(), WINDOWS)
    assert found.tokens == 32
    assert found.score.tokens == 31


@pytest.mark.parametrize(
    ("gate", "passes"),
    [(Gate(), True), (Gate(mean_kl=2e-3), True), (Gate(mean_kl=0.5e-3), False), (Gate(top1_agreement=0.95), True),
     (Gate(top1_agreement=0.999), False), (Gate(relative_error=0.1), True), (Gate(relative_error=0.001), False),
     (Gate(2e-3, 0.95, 0.1), True), (Gate(2e-3, 0.95, 0.001), False)],
)  # fmt: skip
def test_a_gate_judges_what_it_names(gate: Gate, passes: bool) -> None:
    measured = Score(
        10.0, 99, 10_000, mean_kl=1e-3, top1_agreement=0.97, max_abs_difference=1.0, relative_error=0.01,
        reference_perplexity=9.0,
    )  # fmt: skip
    assert gate.passes(measured) is passes


@pytest.mark.parametrize("figure", ["median_kl", "mean_kl", "top1_agreement", "relative_error"])
def test_a_nan_passes_no_gate(figure: str) -> None:
    perfect = Score(
        1.0, 9, 10, mean_kl=0.0, top1_agreement=1.0, max_abs_difference=0.0, relative_error=0.0,
        reference_perplexity=1.0, median_kl=0.0,
    )  # fmt: skip
    gate = Gate(**{figure: {"top1_agreement": 0.5}.get(figure, 1.0)})
    assert gate.passes(perfect)
    assert not gate.passes(replace(perfect, **{figure: float("nan")}))


def test_a_mixture_of_experts_may_differ_in_few_positions_only() -> None:
    """Other experts in a few positions move the mean, a wrong file moves the median."""
    figures = Score(
        1.0, 9, 4000, mean_kl=2e-3, top1_agreement=0.98, max_abs_difference=0.1, relative_error=0.1,
        reference_perplexity=1.0, median_kl=1e-4,
    )  # fmt: skip
    assert ROUTED.passes(figures)
    assert not ROUTED.passes(replace(figures, median_kl=2e-3))
    assert not ROUTED.passes(replace(figures, mean_kl=2e-2))
    assert not ROUTED.passes(replace(figures, median_kl=None))


USUAL = Gate(mean_kl=5e-4)


@pytest.mark.parametrize(
    ("family", "scheme", "overrides", "gate", "aim"),
    [
        ("llama", "w4g32", [], USUAL, None),
        ("llama", "w3g32", [], USUAL, None),
        ("llama", "w8g32", [], INT8_PRODUCTS[8], USUAL),
        ("llama", "w2g32", [], INT8_PRODUCTS[2], USUAL),
        ("llama", "w8g32", [("o_proj", "w2g32")], INT8_PRODUCTS[2], USUAL),
        ("llama-untied", "w4g32", [("lm_head", "w8g32")], INT8_PRODUCTS[8], USUAL),
        ("llama-untied", "w4g32", [("embed", "w8g32")], USUAL, None),  # looked up, and multiplied with nothing
        ("qwen2-moe", "w8g32", [], ROUTED, None),
    ],
)
def test_the_gate_of_an_onnx_file_is_that_of_its_coarsest_product(
    tmp_path: Path, family: str, scheme: str, overrides: Overrides, gate: Gate, aim: Gate | None
) -> None:
    model = write_small_model(tmp_path / "model", family)
    plan = write_rounded_artifact(model, tmp_path / "artifact", scheme, overrides=overrides).plan
    exported = ExportedModel("onnx", tmp_path, ())
    assert gates_of(plan, exported, "shipped", USUAL) == (gate, aim)
    exact = ROUTED_EXACT if plan.architecture.mixture else USUAL
    assert gates_of(plan, exported, "exact", USUAL) == (exact, None)  # bits excuse nothing there
    half = replace(exported, kept_dtype=torch.float16)
    assert gates_of(plan, half, "shipped", USUAL) == (gate, aim)
    assert gates_of(plan, half, "exact", USUAL) == (ROUTED_EXACT if exact is ROUTED_EXACT else HALF_GRAPH, None)


def test_few_positions_leave_room_for_chance() -> None:
    """Two errors among 40 positions do not prove that agreement is below 97.5 %, a thousand in 20000 do."""
    gate = Gate(top1_agreement=0.975)
    figures = Score(
        1.0, 9, 40, mean_kl=0.0, top1_agreement=0.95, max_abs_difference=0.0, relative_error=0.0,
        reference_perplexity=1.0,
    )  # fmt: skip
    assert gate.passes(figures)
    assert not gate.passes(replace(figures, positions=20_000))


def test_the_verdict_needs_everything() -> None:
    good = WeightParity("independent", 2, 2, 0.0, (), ())
    bad = replace(good, exact=1, different=("x",))
    figures = Score(1.0, 9, 9, 0.0, 1.0, 0.0, 0.0, 1.0)
    passed = LogitParity("runtime", 9, figures, 1.0, Gate(), passed=True)
    failed = replace(passed, passed=False)
    assert Parity(good, passed, passed).passed
    assert Parity(good, None, None).passed
    for verdict in (Parity(bad, passed, passed), Parity(good, failed, passed), Parity(good, passed, failed)):
        assert not verdict.passed
    assert Parity(good, failed, passed).only_activations_failed
    far = replace(passed, score=replace(figures, mean_kl=1e-3), aim=Gate(mean_kl=5e-4))
    assert Parity(good, far, passed).passed
    assert Parity(good, far, passed).only_activations_failed
    assert not Parity(good, replace(far, aim=Gate(mean_kl=2e-3)), passed).only_activations_failed
    for verdict in (Parity(bad, failed, passed), Parity(good, failed, failed), Parity(good, failed, None)):
        assert not verdict.only_activations_failed


def test_a_runtime_that_is_not_installed_is_told(
    rounded_artifact: QuantizedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = export(rounded_artifact, "onnx", tmp_path / "onnx")
    (exporter,) = make_exporters(["onnx"])

    @contextmanager
    def absent(target: Path, _: object) -> Iterator[Runtime]:
        raise unavailable("running ONNX files needs onnxruntime, which is not installed", "pip install it", "onnx")
        yield

    monkeypatch.setitem(parity._RUNS, "onnx", (("shipped", absent, Gate()),))
    events: list[Event] = []
    found = verify(rounded_artifact, exporter, exported, WINDOWS, events.append)
    assert found.logits is None
    assert found.passed  # its weights were compared
    assert any("logits were not compared" in event.text for event in events if isinstance(event, Notice))


@pytest.mark.parametrize("format", ["gguf", "onnx", pytest.param("gptq", marks=pytest.mark.slow)])
def test_real_files_are_read_by_others(rounded_artifact: QuantizedCheckpoint, tmp_path: Path, format: str) -> None:
    """And a byte that is flipped in the written file is found."""
    exported = export(rounded_artifact, format, tmp_path / format)
    (exporter,) = make_exporters([format])
    assert compare_weights(rounded_artifact, exporter, exported).passed
    largest = max(exported.files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) * 3 // 5] ^= 1
    largest.write_bytes(data)
    assert not compare_weights(rounded_artifact, exporter, exporter.opened(exported.target)).passed
