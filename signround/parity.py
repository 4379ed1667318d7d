"""Is the file the tuned model? Weights bit for bit through a reader that is not ours, logits in the real runtime.

Gates, and why they are what they are (docs/formats.md has the measurements):
- weights: every tensor exact. There is no tolerance: exporters lay out bits, they do not compute.
- onnxruntime, accuracy_level 0 (float32 activations): relative error 1e-5. It differs from transformers only in the
  order of sums, measured 6e-7 to 1.4e-6.
- onnxruntime as shipped: mean KL 5e-4. Level 4 (int8 activations) measured 1.9e-4 to 2.8e-3 on trained models of 4 and
  26 million weights; where it is above, a more exact graph is shipped (`Exporter.more_exact`). With products of 8 or 2
  bits 5e-4 is only aimed at and the gate is 2e-3 or 2e-2: onnxruntime has no other fast level for them. Measured on 4
  million weights 8.1e-4 at 8 bits, 2.3e-3 to 1.4e-2 at 2 bits, rounded.
- onnxruntime, a graph of fp16 activations at level 0: relative error 1e-2 and mean KL 1e-4. Every operator rounds to 11
  bits: measured 3.7e-4 to 1.6e-3 and at most 1.4e-5 on 4 and 26 million trained weights and on random models of every
  family, 2.3e-3 with 32 layers; a misread zero point makes 0.3 to 2.
- onnxruntime with a mixture of experts: median KL 1e-7 and relative error 1e-2 at level 0 (measured 1e-8 and 1.2e-6,
  no other experts in 65 000 choices), as shipped what llama.cpp is allowed: measured mean KL 5.8e-4 to 4.7e-3.
- llama.cpp (8-bit activations always): mean KL 1e-3, top-1 97.5 % less two standard errors of the measurement.
  Measured 3e-4 and 98.7 % for Q8_0 on 26 million weights, 6.4e-4 and 97.9 % on the bundled model.
- llama.cpp with a mixture of experts: median KL 1e-3, mean KL 1e-2, top-1 95 %. Rounded activations change the experts
  of tokens whose scores are close. Measured, random Mixtral in Q4_0: median 7.1e-4 and mean 8.3e-4 when all experts
  are used, 7.6e-4 and 6.3e-3 when two of eight are.
- GPTQ with exact products: relative error 1e-5 (2e-4 where the loader turns float32 biases into fp16); as shipped the
  kernel rounds weights to fp16: 2e-3, measured 6e-4.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from signround.artifact import QuantizedCheckpoint
from signround.errors import FailedError, UnavailableError
from signround.evaluate import Score, score, spread
from signround.events import Listener, Notice, silent
from signround.exporting import ExportedModel, Exporter, ForeignFiles
from signround.plan import ModelPlan
from signround.runtimes.protocol import Runtime, Speed
from signround.runtimes.speed import fitting
from signround.runtimes.torch_blocks import tuned_model

if TYPE_CHECKING:
    from signround.runtimes.gptq_child import Child

MOST_POSITIONS = 4096


@dataclass(frozen=True)
class WeightParity:
    """How many tensors an independent reader decodes to exactly the tuned values. `reader` is "own parser" when the
    independent one is not installed. `missing` and `different` name tensors."""

    reader: str
    tensors: int
    exact: int
    worst_abs_difference: float
    missing: tuple[str, ...]
    different: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.exact == self.tensors and not self.missing and not self.different

    @property
    def comparable(self) -> bool:
        """False for a file with names, shapes or values that no artifact of this model has: its logits may not even
        have the same vocabulary."""
        return math.isfinite(self.worst_abs_difference)


@dataclass(frozen=True)
class Gate:
    """The most that a runtime may differ from the tuned model in float; None is not judged."""

    mean_kl: float | None = None
    top1_agreement: float | None = None
    relative_error: float | None = None
    median_kl: float | None = None

    def passes(self, measured: Score) -> bool:
        assert measured.mean_kl is not None
        assert measured.top1_agreement is not None
        assert measured.relative_error is not None
        # n positions know an agreement only to within its standard error; two of them are not a failure.
        median = math.inf if measured.median_kl is None else measured.median_kl
        doubt = 2 * math.sqrt(measured.top1_agreement * (1 - measured.top1_agreement) / measured.positions)
        return not (
            (self.median_kl is not None and not median <= self.median_kl)
            or (self.mean_kl is not None and not measured.mean_kl <= self.mean_kl)
            or (self.top1_agreement is not None and not measured.top1_agreement + doubt >= self.top1_agreement)
            or (self.relative_error is not None and not measured.relative_error <= self.relative_error)
        )


# A token whose experts lie close together may take others once activations are rounded: a few positions differ much.
ROUTED = Gate(median_kl=1e-3, mean_kl=1e-2, top1_agreement=0.95)
# With float32 activations that happens where scores agree to six digits: hardly ever, and still not never.
ROUTED_EXACT = Gate(median_kl=1e-7, relative_error=1e-2)
# K-quants and IQ4_XS are multiplied with activations that share one scale in 256, not in 32: a coarser rounding.
SUPER_BLOCKS = Gate(mean_kl=8e-3, top1_agreement=0.93)
ROUTED_SUPER_BLOCKS = Gate(median_kl=8e-3, mean_kl=2e-2, top1_agreement=0.9)
HALF_BIASES = Gate(relative_error=2e-4)
HALF_GRAPH = Gate(relative_error=1e-2, mean_kl=1e-4)
# bits of a product -> the gate: onnxruntime is fast with int8 activations only, so the usual gate is an aim there.
INT8_PRODUCTS = {2: Gate(mean_kl=2e-2), 8: Gate(mean_kl=2e-3)}


@dataclass(frozen=True)
class LogitParity:
    """One run of the file in a runtime over `tokens` positions; `tuned_perplexity` is the tuned model's on the same.
    `speed` is measured as shipped, and judged by nobody; None where the runtime is a reader or could not be timed.
    `aim`: a narrower gate that a more exact form of the file is tried for, if there is one."""

    runtime: str
    tokens: int
    score: Score
    tuned_perplexity: float
    gate: Gate
    passed: bool
    speed: Speed | None = None
    aim: Gate | None = None

    @property
    def reached_aim(self) -> bool:
        return self.passed and (self.aim is None or self.aim.passes(self.score))


@dataclass(frozen=True)
class Parity:
    """The verdict on one exported model. `logits` is the runtime as shipped; `exact_logits` the same runtime without
    its own activation rounding, where it has such a mode; both are None when no runtime is known for the format.
    `problems`: what `signround inspect` finds wrong with the files, where the format can tell."""

    weights: WeightParity
    logits: LogitParity | None
    exact_logits: LogitParity | None
    problems: tuple[str, ...] = ()

    @property
    def only_activations_failed(self) -> bool:
        """The file is the tuned model, and still the runtime as shipped is farther from it than it should be."""
        exact = self.exact_logits is not None and self.exact_logits.passed
        return self._file_passed and exact and self.logits is not None and not self.logits.reached_aim

    @property
    def passed(self) -> bool:
        runs = (run for run in (self.logits, self.exact_logits) if run is not None)
        return self._file_passed and all(run.passed for run in runs)

    @property
    def _file_passed(self) -> bool:
        return self.weights.passed and not self.problems


def verify(
    artifact: QuantizedCheckpoint,
    exporter: Exporter,
    exported: ExportedModel,
    windows: Tensor,
    on_event: Listener = silent,
) -> Parity:
    """Judge written files against the artifact. `windows` int64 [count, tokens] feed the runtimes."""
    weights = compare_weights(artifact, exporter, exported, on_event)
    found = exporter.inspected(exported.target)["problems"] if isinstance(exporter, ForeignFiles) else ()
    problems = tuple(found)
    if not weights.comparable:
        on_event(Notice(f"{exported.format}: the tensors are not those of the artifact, logits were not compared"))
        return Parity(weights, None, None, problems)
    runs: dict[str, LogitParity] = {}
    with ExitStack() as at_end:
        workers = _Workers(at_end)
        for label, opened, usual in _RUNS.get(exported.format, ()):
            gate, aim = gates_of(artifact.plan, exported, label, usual)
            try:
                with opened(exported.target, workers) as runtime:
                    runs[label] = replace(compare_logits(artifact, runtime, gate, windows), aim=aim)
                    if label == "shipped":
                        speed = measured_speed(artifact, runtime, exported.format, on_event)
                        runs[label] = replace(runs[label], speed=speed)
            except UnavailableError as missing:
                on_event(Notice(f"{exported.format}: logits were not compared, {missing}"))
    if exported.format not in _RUNS:
        on_event(Notice(f"{exported.format}: no runtime is known for this format, only its weights were compared"))
    return Parity(weights, runs.get("shipped"), runs.get("exact"), problems)


def gates_of(plan: ModelPlan, exported: ExportedModel, label: str, usual: Gate) -> tuple[Gate, Gate | None]:
    """The gate of one run ("exact" or "shipped") of a file, `usual` unless its format or content allows another, and
    the narrower one that is aimed at, if there is one."""
    exact, mixture = label == "exact", plan.architecture.mixture is not None
    match exported.format:
        case "gptq":
            return (HALF_BIASES if exact and _has_float_biases(plan) else usual), None
        case "gguf":
            return _llama_cpp_gate(plan, usual), None
        case "onnx" if mixture:
            return (ROUTED_EXACT if exact else ROUTED), None
        case "onnx" if exact:  # a graph that computes in fp16 has nothing that is not fp16, vectors included
            return (HALF_GRAPH if exported.kept_dtype == torch.float16 else usual), None
        case "onnx":
            coarse = {layer.grid.bits for layer in plan.products()} & INT8_PRODUCTS.keys()
            return (INT8_PRODUCTS[min(coarse)], usual) if coarse else (usual, None)
    return usual, None


def _has_float_biases(plan: ModelPlan) -> bool:
    """GPTQ loaders keep biases in fp16 even where the file holds float32: measured 8e-5 of the logits' norm."""
    return any(kept.name.endswith(".bias") and kept.dtype == "float32" for kept in plan.kept())


def compare_weights(
    artifact: QuantizedCheckpoint, exporter: Exporter, exported: ExportedModel, on_event: Listener = silent
) -> WeightParity:
    """Every tensor of the artifact against the independent reader; codes and fields against our own parser."""
    try:
        decoded = exporter.decode_independently(exported)
        return _compared(artifact, exported, decoded, "independent")
    except UnavailableError as missing:
        on_event(Notice(f"{exported.format}: weights were read by our own parser only, {missing}"))
    own = ((name, tensor.decode()) for name, tensor in exporter.read_back(exported))
    quantized_only = _compared(artifact, exported, own, "own parser")
    missing_linears = tuple(name for name in quantized_only.missing if name in artifact.layers)
    return WeightParity(
        "own parser",
        len(artifact.layers),
        quantized_only.exact,
        quantized_only.worst_abs_difference,
        missing_linears,
        quantized_only.different,
    )


def _compared(
    artifact: QuantizedCheckpoint, exported: ExportedModel, decoded: Iterator[tuple[str, Tensor]], reader: str
) -> WeightParity:
    names = {*artifact.layers, *artifact.kept}
    exact, worst, different = 0, 0.0, []
    for name, found in decoded:
        if name not in names:  # twice in the file, or of another model
            different.append(name)
            worst = float("inf")
            continue
        names.discard(name)
        expected = _expected(artifact, exported, name)
        if torch.equal(found, expected):
            exact += 1
            continue
        different.append(name)
        gap = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
        worst = max(worst, gap)
    total = len(artifact.layers) + len(artifact.kept)
    return WeightParity(reader, total, exact, worst, tuple(sorted(names)), tuple(different))


def _expected(artifact: QuantizedCheckpoint, exported: ExportedModel, name: str) -> Tensor:
    weight = artifact.weight(name)
    if name in exported.added:
        weight = weight + exported.added[name]
    cast = name in artifact.kept and name not in exported.untouched and (weight.ndim > 1 or exported.casts_vectors)
    if exported.kept_dtype is not None and cast:
        return weight.to(exported.kept_dtype).float()
    return weight


def _llama_cpp_gate(plan: ModelPlan, usual: Gate) -> Gate:
    coarse = any(layer.grid.super_block for layer in plan.layers())
    if plan.architecture.mixture:
        return ROUTED_SUPER_BLOCKS if coarse else ROUTED
    return SUPER_BLOCKS if coarse else usual


def compare_logits(artifact: QuantizedCheckpoint, runtime: Runtime, gate: Gate, windows: Tensor) -> LogitParity:
    """Run `windows` (a stated, evenly spread part when a position is dear) and judge the differences."""
    positions = MOST_POSITIONS
    if runtime.affordable_positions is not None:
        positions = min(positions, runtime.affordable_positions)
    part = spread(windows, positions)
    measured = score(runtime, part, tuned_model(artifact))
    assert measured.reference_perplexity is not None
    return LogitParity(runtime.name, part.numel(), measured, measured.reference_perplexity, gate, gate.passes(measured))


def measured_speed(
    artifact: QuantizedCheckpoint, runtime: Runtime, format: str, on_event: Listener = silent
) -> Speed | None:
    """The runtime's speed on a prompt that fits the model; a failure is told, it does not fail the job."""
    try:
        return runtime.speed(*fitting(artifact.plan.architecture.context))
    except FailedError as error:
        on_event(Notice(f"{format}: the speed was not measured, {error}"))
        return None


class _Workers:
    """Processes that the runs of one file share, each started by the first run that needs it (imports take 8 s)."""

    def __init__(self, at_end: ExitStack) -> None:
        self._at_end = at_end

    @cached_property
    def gptq(self) -> Child:
        from signround.runtimes.gptq import start_gptq_child

        return self._at_end.enter_context(start_gptq_child())


@contextmanager
def _onnx_exact(folder: Path, _: _Workers) -> Iterator[Runtime]:
    from signround.runtimes.ort import open_onnxruntime

    with _closing(open_onnxruntime(folder, accuracy_level=0)) as runtime:
        yield runtime


@contextmanager
def _as_shipped(target: Path, _: _Workers) -> Iterator[Runtime]:
    from signround.runtimes.targets import open_target

    with _closing(open_target(target)) as runtime:
        yield runtime


@contextmanager
def _gptq_as_shipped(folder: Path, workers: _Workers) -> Iterator[Runtime]:
    from signround.runtimes.gptq import open_gptq

    with _closing(open_gptq(folder, child=workers.gptq)) as runtime:
        yield runtime


@contextmanager
def _gptq_exact(folder: Path, workers: _Workers) -> Iterator[Runtime]:
    """gptqmodel with float32 products; without that extra the onnxruntime-genai builder, a lighter reader."""
    from signround.runtimes.gptq import open_gptq, open_gptq_through_builder

    try:
        runtime: Runtime = open_gptq(folder, exact_products=True, child=workers.gptq)
    except UnavailableError:
        with (
            tempfile.TemporaryDirectory() as workdir,
            _closing(open_gptq_through_builder(folder, Path(workdir))) as built,
        ):
            yield built
        return
    with _closing(runtime):
        yield runtime


@contextmanager
def _closing(runtime: Runtime) -> Iterator[Runtime]:
    try:
        yield runtime
    finally:
        runtime.close()


_RUNS: dict[str, tuple[tuple[str, Callable[[Path, _Workers], AbstractContextManager[Runtime]], Gate], ...]] = {
    "onnx": (
        ("exact", _onnx_exact, Gate(relative_error=1e-5)),
        ("shipped", _as_shipped, Gate(mean_kl=5e-4)),
    ),
    "gguf": (("shipped", _as_shipped, Gate(mean_kl=1e-3, top1_agreement=0.975)),),
    "gptq": (
        ("exact", _gptq_exact, Gate(relative_error=1e-5)),
        ("shipped", _gptq_as_shipped, Gate(relative_error=2e-3)),
    ),
}
