"""The story: plan, calibrate, tune, evaluate, export, verify, report. Read this file first; all else lies below it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from signround.architecture import read_architecture
from signround.artifact import TOKENS, ArtifactWriter, QuantizedCheckpoint, artifact_bytes, is_artifact
from signround.calibration import (
    EVALUATION_WINDOWS,
    CalibrationTokens,
    fit_to_text,
    kept_tokens,
    leading_bos,
    load_tokenizer,
    read_spec,
    read_tokens,
    self_written,
    stream_tokens,
    windows_of,
    write_tokens,
)
from signround.checkpoint import SourceCheckpoint
from signround.errors import FailedError, Refusal, RefusedError, refuse
from signround.evaluate import score, text_windows
from signround.events import Listener, Notice, StageAdvanced, StageStarted, silent
from signround.exporting import ExportedModel, Exporter, changed_options, make_exporters
from signround.file_types import parse_overrides
from signround.files import sha256_of, sha256_of_json
from signround.importance import Importance, ImportanceFiles
from signround.measure import peak_memory, physical_memory, reset_peak_memory
from signround.parity import LogitParity, Parity
from signround.parity import verify as verify_files
from signround.plan import ModelPlan, make_plan
from signround.recipes import TuningSettings, fit_to_memory, least_samples, settings_for
from signround.report import REPORT_FILES, ExportResult, Perplexities, build_report, write_report
from signround.runtimes.targets import kind_of
from signround.runtimes.torch_blocks import float_model, rounded_model, tuned_model
from signround.tuning.chain import TuningChain

IMATRIX = "imatrix.gguf"  # beside the model, for tools that take llama.cpp's importance matrices
SINGLE_FILES = frozenset({"gguf"})  # formats whose files stand beside others and leave them alone
EVALUATION_CONTEXT = 512  # tokens a window of the user's text


@dataclass(frozen=True)
class Job:
    """A request that was checked: nothing known speaks against it."""

    checkpoint: SourceCheckpoint
    plan: ModelPlan
    exporters: Sequence[Exporter]
    calibration: str
    out: Path
    tokens: CalibrationTokens | None = None  # of a calibration file: a text that is too short is refused at plan time
    importance: Importance | None = None  # of an importance matrix that the user gave
    notes: tuple[str, ...] = ()  # what the user did not ask for, sentences


def prepare(
    model: str | Path,
    scheme: str,
    out: str | Path | None,
    to: Sequence[str] = (),
    *,
    method: str = "signround",
    recipe: str = "default",
    calibration: str = "self",
    samples: int | None = None,
    seqlen: int | None = None,
    iters: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    tensor_types: Sequence[str] = (),
    imatrix: str | Path | None = None,
    options: Mapping[str, Mapping[str, str]] | None = None,
) -> Job:
    """Resolve a request into a job. Raises RefusedError with every reason at once; does no work.

    Without `out` the output folder is not looked at (the job then names `out`): a plan needs none.
    """
    checkpoint = SourceCheckpoint(model)
    exporters = make_exporters(to, options)
    architecture = read_architecture(checkpoint.config)
    tuning = settings_for(
        method, recipe, device,
        context=architecture.context, samples=samples, seqlen=seqlen, iters=iters, batch_size=batch_size, seed=seed,
        experts=architecture.mixture is not None,
    )  # fmt: skip
    recipe_samples, least = tuning.samples, least_samples(tuning, samples)
    tuning = fit_to_memory(tuning, architecture.hidden, physical_memory(), least)
    floor = max((exporter.zero_floor for exporter in exporters), default=0)
    plan = make_plan(
        checkpoint, scheme, tuning, read_spec(calibration), floor,
        mixes=bool(exporters) and all(exporter.file_types for exporter in exporters),
        overrides=parse_overrides(tensor_types), imatrix_sha256=_sha256_of_imatrix(imatrix, tuning),
    )  # fmt: skip
    tokens: CalibrationTokens | None = None
    unreadable: Sequence[Refusal] = ()
    try:
        tokenizer = load_tokenizer(checkpoint.folder)
        if plan.calibration.source == "file":
            plan, tokens = _fitted_to_text(plan, calibration, tokenizer, least)
    except RefusedError as error:
        unreadable = error.refusals
    refusals = [refusal for exporter in exporters for refusal in _format_refusals(exporter, plan)]
    if out is not None:
        refusals += _output_refusals(Path(out), plan, () if refusals else exporters)
    refusals += _self_writing_refusals(checkpoint, calibration)
    refusals += checkpoint.non_finite()
    refusals += unreadable
    if refusals:
        raise RefusedError(list(dict.fromkeys(refusals)))
    given = None if imatrix is None else _read_imatrix(Path(imatrix), exporters, plan)
    notes = _fewer_samples_notes(recipe_samples, tuning.samples, plan.tuning.samples)
    return Job(checkpoint, plan, exporters, calibration, Path(out or "out"), tokens, given, notes)


def _fewer_samples_notes(recipe: int, in_memory: int, in_text: int) -> tuple[str, ...]:
    if in_text == recipe:
        return ()
    why = "the calibration text has no more" if in_text < in_memory else "more hidden states do not fit in memory"
    return (f"{in_text} samples are taken instead of the recipe's {recipe}: {why}",)


def _sha256_of_imatrix(imatrix: str | Path | None, tuning: TuningSettings) -> str:
    if imatrix is None:
        return ""
    if tuning.start != "search":
        raise refuse(f"--method {tuning.method} does not use an importance matrix", "leave --imatrix out", "--imatrix")
    if not Path(imatrix).is_file():
        raise refuse("no such importance matrix", "check the path", str(imatrix))
    return sha256_of(Path(imatrix))


def _read_imatrix(path: Path, exporters: Sequence[Exporter], plan: ModelPlan) -> Importance:
    reader = next((exporter for exporter in exporters if isinstance(exporter, ImportanceFiles)), None)
    if reader is None:
        raise refuse("no format that was asked for reads importance matrices", "add --to gguf", "--imatrix")
    return reader.read_importance(path, plan)


def tune(job: Job, on_event: Listener = silent) -> QuantizedCheckpoint:
    """Calibrate and tune, or continue where an earlier run of the same job stopped."""
    folder = job.out / "artifact"
    cached = read_tokens(folder / TOKENS)
    given = cached or job.tokens
    if given is None and job.plan.calibration.source != "self":  # before the folder is begun: it may be refused
        on_event(StageStarted("calibrate", job.calibration))
        given = _read_windows(job.plan, job.calibration, load_tokenizer(job.checkpoint.folder))
    writer = ArtifactWriter(folder, job.plan, job.checkpoint.files)
    try:
        tokens = given or _self_written(job, on_event)
        source = job.calibration if job.plan.calibration.source != "file" else Path(job.calibration).name
        writer.set_calibration({"source": source, "tokens": tokens.tuning.numel(), "sha256": tokens.sha256})
        if cached is None:
            write_tokens(folder / TOKENS, tokens)
        on_event(StageStarted("tune", f"{job.plan.tuning.method}, {job.plan.scheme}", len(job.plan.blocks)))
        reset_peak_memory()
        for kept in job.plan.outer:
            writer.commit_outer(kept.name, job.checkpoint.read(kept.name))
        TuningChain(job.checkpoint, job.plan, writer, tokens.tuning, on_event, job.importance).run()
        return writer.finish()
    finally:
        writer.close()


def _fitted_to_text(plan: ModelPlan, source: str, tokenizer: Any, least: int) -> tuple[ModelPlan, CalibrationTokens]:
    """The windows of a text file, and the plan with as many samples as it has. Raises RefusedError when it has fewer
    than `least`."""
    stream, bos = stream_tokens(plan.calibration, source, tokenizer, 0), leading_bos(tokenizer)
    plan = replace(plan, tuning=fit_to_text(plan.tuning, len(stream), bos, least))
    return plan, windows_of(stream, plan.tuning, bos, source)


def _read_windows(plan: ModelPlan, source: str, tokenizer: Any) -> CalibrationTokens:
    """Calibration windows of a hub data set, when the work begins. Raises RefusedError when it is too short."""
    needed = (plan.tuning.samples + EVALUATION_WINDOWS) * plan.tuning.seqlen
    stream = stream_tokens(plan.calibration, source, tokenizer, needed)
    return windows_of(stream, plan.tuning, leading_bos(tokenizer), source)


def _self_written(job: Job, on_event: Listener) -> CalibrationTokens:
    on_event(StageStarted("calibrate", job.calibration))
    tokenizer = load_tokenizer(job.checkpoint.folder)
    return self_written(job.checkpoint, job.plan.skipped, tokenizer, job.plan.tuning, on_event)


def export(
    artifact: str | Path | QuantizedCheckpoint,
    to: str | Exporter,
    out: str | Path,
    *,
    options: Mapping[str, str] | None = None,
    on_event: Listener = silent,
) -> ExportedModel:
    """Write one more format from a finished artifact into the folder `out`; no tuning.

    Raises RefusedError when the format cannot hold the artifact's grids, and when something is in the way that writing
    would remove.
    """
    checkpoint = artifact if isinstance(artifact, QuantizedCheckpoint) else QuantizedCheckpoint(artifact)
    exporter = make_exporters([to], {to: options} if options else None)[0] if isinstance(to, str) else to
    refusals = _format_refusals(exporter, checkpoint.plan) + _target_refusals(exporter, Path(out))
    if refusals:
        raise RefusedError(refusals)
    return _written(checkpoint, exporter, Path(out), on_event)


def _written(checkpoint: QuantizedCheckpoint, exporter: Exporter, out: Path, on_event: Listener) -> ExportedModel:
    """The files of one format, in place of those that an earlier run of the job left in `out`."""
    damaged = checkpoint.damaged()
    if damaged:
        raise FailedError(
            f"{checkpoint.folder}: {len(damaged)} files are damaged ({damaged[0]}, ...); "
            "run the `signround quantize` command that made it again, it repairs them."
        )
    on_event(StageStarted("export", exporter.name))
    exported = exporter.export(checkpoint, out, on_event)
    if isinstance(exporter, ImportanceFiles) and (importance := checkpoint.importance()) is not None:
        exporter.write_importance(importance, out / IMATRIX, checkpoint.plan)
    return exported


def quantize(
    model: str | Path,
    scheme: str,
    out: str | Path,
    to: Sequence[str] = (),
    *,
    method: str = "signround",
    recipe: str = "default",
    calibration: str = "self",
    samples: int | None = None,
    seqlen: int | None = None,
    iters: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    tensor_types: Sequence[str] = (),
    imatrix: str | Path | None = None,
    text: str | Path | None = None,
    options: Mapping[str, Mapping[str, str]] | None = None,
    on_event: Listener = silent,
) -> dict[str, Any]:
    """The main job: plan, tune, export, verify, report. Returns report.json as a dict (`report.passed` judges it).

    Killed and started again with the same arguments it continues; when nothing is left to do it says so and returns.
    Raises RefusedError before any work, FailedError when the work cannot go on.
    """
    job = prepare(
        model, scheme, out, to, method=method, recipe=recipe, calibration=calibration, samples=samples, seqlen=seqlen,
        iters=iters, batch_size=batch_size, seed=seed, device=device, tensor_types=tensor_types, imatrix=imatrix,
        options=options,
    )  # fmt: skip
    return run(job, Path(text) if text else None, on_event)


def run(job: Job, text: Path | None = None, on_event: Listener = silent) -> dict[str, Any]:
    """Do a prepared job, or recognise that it is done. A text that cannot be used is refused before the work."""
    unseen = _text_windows(job, text) if text is not None else None
    fingerprint = sha256_of_json(
        [job.plan.fingerprint, [repr(exporter) for exporter in job.exporters], sha256_of(text) if text else ""]
    )
    finished = _finished_report(job.out, fingerprint)
    if finished is not None:
        on_event(Notice("this job is done already, every file is in place; delete the -o folder to start again"))
        return finished
    for note in job.notes:
        on_event(Notice(note))
    artifact = tune(job, on_event)
    windows, name = unseen or _spare_windows(job)
    perplexities = _perplexities(job, artifact, windows, name, on_event)
    exports = [_exported(job, exporter, artifact, windows, on_event) for exporter in job.exporters]
    report = build_report(artifact, fingerprint, str(job.checkpoint.folder), perplexities, exports, job.out)
    write_report(report, job.out)
    return report


def _finished_report(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """The report of an earlier run of this very job, when everything it wrote is still there, unchanged."""
    if not all((out / name).is_file() for name in REPORT_FILES) or not is_artifact(out / "artifact"):
        return None
    try:
        report: dict[str, Any] = json.loads((out / "report.json").read_text())
    except ValueError:
        return None  # damaged: the run writes it again
    if read_tokens(out / "artifact" / TOKENS) is None:
        return None
    if report.get("job") != fingerprint or QuantizedCheckpoint(out / "artifact", allow_unfinished=True).damaged():
        return None
    files = [file for export in report["exports"].values() for file in export["files"]]
    intact = all((out / file["path"]).is_file() and sha256_of(out / file["path"]) == file["sha256"] for file in files)
    return report if intact else None


def _text_windows(job: Job, text: Path) -> tuple[Tensor, str]:
    """Windows of the user's text for perplexity and parity, and what to call them."""
    context = min(job.plan.architecture.context, EVALUATION_CONTEXT)
    return text_windows(job.checkpoint.folder, text, context), text.name


def _spare_windows(job: Job) -> tuple[Tensor, str]:
    """The same from the calibration text: the part that no tuning saw, if there is one."""
    tokens = kept_tokens(job.out / "artifact" / TOKENS)
    kind = "the held-out part" if tokens.reused else "an unseen part"
    return tokens.evaluation, f"{kind} of the calibration text"


def _perplexities(
    job: Job, artifact: QuantizedCheckpoint, windows: Tensor, name: str, on_event: Listener
) -> Perplexities:
    device = job.plan.tuning.device
    models = (
        float_model(job.checkpoint, device),
        rounded_model(job.checkpoint, job.plan, device),
        tuned_model(artifact, device),
    )
    reset_peak_memory()
    scores = []
    for done, model in enumerate(models):
        on_event(StageAdvanced("evaluate", done, len(models), model.name))
        scores.append(score(model, windows))
    on_event(StageAdvanced("evaluate", len(models), len(models)))
    of_float, rounded, tuned = (measured.perplexity for measured in scores)
    return Perplexities(name, scores[0].tokens, of_float, rounded, tuned, peak_memory()[0])


def _exported(
    job: Job, exporter: Exporter, artifact: QuantizedCheckpoint, windows: Tensor, on_event: Listener
) -> ExportResult:
    """Write and judge one format. Where the file is right but the runtime's own rounding of activations misses the
    gate, or what was aimed at, the exporter's next more exact variant is written instead."""
    reset_peak_memory()
    started = time.monotonic()
    exported = _written(artifact, exporter, job.out / exporter.name, on_event)
    seconds, (peak, _) = time.monotonic() - started, peak_memory()
    on_event(StageStarted("verify", exporter.name))
    reset_peak_memory()
    parity = verify_files(artifact, exporter, exported, windows, on_event)
    gentler = exporter.more_exact(job.plan)
    if parity.only_activations_failed:
        assert parity.logits is not None
        coarse = _coarse(exporter, parity.logits)
        if gentler is not None:
            on_event(Notice(f"{coarse}; writing it again with {changed_options(exporter, gentler)}"))
            return _exported(job, gentler, artifact, windows, on_event)
        if parity.passed:
            on_event(Notice(f"{coarse}; it stays, a more exact form would be far slower"))
    options = changed_options(type(exporter)(), exporter)
    return ExportResult(exported, parity, seconds, peak, peak_memory()[0], options)


def _coarse(exporter: Exporter, run: LogitParity) -> str:
    """What a runtime does to a file that is exact."""
    wanted = (run.aim or run.gate).mean_kl
    return (
        f"{exporter.name}: the file is exact, but {run.runtime} rounds activations too coarsely for this model "
        f"(mean KL {run.score.mean_kl:.1e}, {wanted:.0e} is wanted)"
    )


def verify(
    target: str | Path, artifact: str | Path, format: str | None = None, *, on_event: Listener = silent
) -> Parity:
    """Judge files written earlier against their artifact. `format` is found from the files when it is not given."""
    path, checkpoint = Path(target), QuantizedCheckpoint(artifact)
    kind = format or kind_of(path)
    if kind in ("artifact", "checkpoint"):
        raise refuse(
            f"this is a {kind}, not an exported file", "give a .gguf file, an ONNX or a GPTQ folder", str(path)
        )
    exporter = make_exporters([kind])[0]
    tokens = kept_tokens(checkpoint.folder / TOKENS)
    parity = verify_files(checkpoint, exporter, exporter.opened(path), tokens.evaluation, on_event)
    if parity.only_activations_failed and not parity.passed and (forms := _more_exact_forms(exporter, checkpoint.plan)):
        assert parity.logits is not None
        on_event(Notice(f"{_coarse(exporter, parity.logits)}; export it again with {' or '.join(forms)}"))
    return parity


def _more_exact_forms(exporter: Exporter, plan: ModelPlan) -> list[str]:
    """The options of every step that `quantize` would try, the fastest first."""
    forms, form = [], exporter.more_exact(plan)
    while form is not None:
        forms.append(" ".join(f"--set {option}" for option in changed_options(exporter, form).split()))
        form = form.more_exact(plan)
    return forms


def _format_refusals(exporter: Exporter, plan: ModelPlan) -> list[Refusal]:
    """The exporter's refusals, each saying whose it is."""
    return [
        refusal
        if refusal.subject.startswith(exporter.name)
        else replace(refusal, subject=": ".join(filter(None, (exporter.name, refusal.subject))))
        for refusal in exporter.refusals(plan)
    ]


def _target_refusals(exporter: Exporter, out: Path) -> list[Refusal]:
    """What lies where a format is to be written. Most exporters replace the whole folder, and that may be anything: the
    model itself, the job, a repository."""
    if out.exists() and not out.is_dir():
        return [Refusal("a file of this name exists", "choose another -o folder", str(out))]
    if exporter.name not in SINGLE_FILES and out.is_dir() and any(out.iterdir()):
        problem = f"the folder is not empty, and {exporter.name} would replace all that it holds"
        return [Refusal(problem, "choose an empty or new -o folder, or delete this one first", str(out))]
    return []


def _output_refusals(out: Path, plan: ModelPlan, exporters: Sequence[Exporter]) -> list[Refusal]:
    """Something else in the way, or a disk that is too small for artifact and files (with 5 % to spare)."""
    if out.exists() and not out.is_dir():
        return [Refusal("a file of this name exists", "choose another -o folder", str(out))]
    if out.is_dir() and any(out.iterdir()) and not (out / "artifact").is_dir():
        return [
            Refusal(
                "the folder holds something that signround did not write", "choose an empty or new -o folder", str(out)
            )
        ]
    files = [out / exporter.name for exporter in exporters if (out / exporter.name).is_file()]
    if files:
        return [Refusal("a file is where a folder is to be written", "move it away", str(path)) for path in files]
    if is_artifact(out / "artifact"):
        return []  # space was checked when it was begun; what is there already counts twice otherwise
    existing = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    needed = int(1.05 * (artifact_bytes(plan) + sum(exporter.estimated_bytes(plan) for exporter in exporters)))
    free = shutil.disk_usage(existing).free
    if free < needed:
        return [
            Refusal(
                f"{needed / 1e9:.1f} GB are needed, the disk has {free / 1e9:.1f} GB free",
                "free some space or choose another -o folder",
                str(out),
            )
        ]
    return []


def _self_writing_refusals(checkpoint: SourceCheckpoint, calibration: str) -> list[Refusal]:
    """Text that the model writes itself needs the whole model in memory while it writes."""
    if calibration != "self":
        return []
    needed = sum(info.bytes for info in checkpoint.tensors.values()) + (1 << 30)
    if needed < physical_memory():
        return []
    return [
        Refusal(
            f"the model needs {needed / 1e9:.0f} GB of memory to write its own text, this machine has "
            f"{physical_memory() / 1e9:.0f} GB",
            "give a text file (tuning itself holds two blocks at a time)",
            "--calibration self",
        )
    ]
