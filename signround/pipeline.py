"""The story: plan, calibrate, tune, evaluate, export, verify, report. Read this file first; all else lies below it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from signround.architecture import read_architecture
from signround.artifact import TOKENS, ArtifactWriter, QuantizedCheckpoint, artifact_bytes, is_artifact
from signround.calibration import (
    EVALUATION_WINDOWS,
    CalibrationTokens,
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
from signround.errors import FailedError, Refusal, RefusedError
from signround.events import Listener, StageStarted, silent
from signround.exporting import ExportedModel, Exporter, make_exporters
from signround.measure import physical_memory, reset_peak_memory
from signround.plan import ModelPlan, make_plan
from signround.recipes import fit_to_memory, settings_for
from signround.tuning.chain import TuningChain


@dataclass(frozen=True)
class Job:
    """A request that was checked: nothing known speaks against it."""

    checkpoint: SourceCheckpoint
    plan: ModelPlan
    exporters: Sequence[Exporter]
    calibration: str
    out: Path


def prepare(
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
    options: Mapping[str, Mapping[str, str]] | None = None,
) -> Job:
    """Resolve a request into a job. Raises RefusedError with every reason at once; does no work."""
    checkpoint = SourceCheckpoint(model)
    exporters = make_exporters(to, options)
    architecture = read_architecture(checkpoint.config)
    tuning = settings_for(
        method, recipe, device,
        context=architecture.context, samples=samples, seqlen=seqlen, iters=iters, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    tuning = fit_to_memory(tuning, architecture.hidden, physical_memory())
    floor = max((exporter.zero_floor for exporter in exporters), default=0)
    plan = make_plan(checkpoint, scheme, tuning, read_spec(calibration), floor)
    refusals = [refusal for exporter in exporters for refusal in exporter.refusals(plan)]
    refusals += _output_refusals(Path(out), plan, exporters)
    refusals += _self_writing_refusals(checkpoint, calibration)
    refusals += checkpoint.non_finite()
    load_tokenizer(checkpoint.folder)
    if refusals:
        raise RefusedError(refusals)
    return Job(checkpoint, plan, exporters, calibration, Path(out))


def tune(job: Job, on_event: Listener = silent) -> QuantizedCheckpoint:
    """Calibrate and tune, or continue where an earlier run of the same job stopped."""
    writer = ArtifactWriter(job.out / "artifact", job.plan, job.checkpoint.files)
    try:
        tokens = calibration_tokens(job, writer.folder, on_event)
        source = job.calibration if job.plan.calibration.source != "file" else Path(job.calibration).name
        writer.set_calibration({"source": source, "tokens": tokens.tuning.numel(), "sha256": tokens.sha256})
        on_event(StageStarted("tune", f"{job.plan.tuning.method}, {job.plan.scheme}", len(job.plan.blocks)))
        reset_peak_memory()
        for kept in job.plan.outer:
            writer.commit_outer(kept.name, job.checkpoint.read(kept.name))
        TuningChain(job.checkpoint, job.plan, writer, tokens.tuning, on_event).run()
        return writer.finish()
    finally:
        writer.close()


def calibration_tokens(job: Job, folder: Path, on_event: Listener = silent) -> CalibrationTokens:
    """The windows of this job, from the artifact when an earlier run put them there."""
    cached = folder / TOKENS
    if cached.is_file():
        return read_tokens(cached)
    on_event(StageStarted("calibrate", job.calibration))
    tokenizer = load_tokenizer(job.checkpoint.folder)
    settings = job.plan.tuning
    if job.plan.calibration.source == "self":
        tokens = self_written(job.checkpoint, tokenizer, settings, on_event)
    else:
        needed = (settings.samples + EVALUATION_WINDOWS) * settings.seqlen
        stream = stream_tokens(job.plan.calibration, job.calibration, tokenizer, needed)
        tokens = windows_of(stream, settings, leading_bos(tokenizer), job.calibration)
    write_tokens(cached, tokens)
    return tokens


def export(
    artifact: str | Path | QuantizedCheckpoint,
    to: str | Exporter,
    out: str | Path,
    *,
    options: Mapping[str, str] | None = None,
    on_event: Listener = silent,
) -> ExportedModel:
    """Write one more format from a finished artifact into the folder `out`; no tuning.

    Raises RefusedError when the format cannot hold the artifact's grids.
    """
    checkpoint = artifact if isinstance(artifact, QuantizedCheckpoint) else QuantizedCheckpoint(artifact)
    exporter = make_exporters([to], {to: options} if options else None)[0] if isinstance(to, str) else to
    refusals = exporter.refusals(checkpoint.plan)
    if refusals:
        raise RefusedError(refusals)
    damaged = checkpoint.damaged()
    if damaged:
        raise FailedError(
            f"{checkpoint.folder}: {len(damaged)} files are damaged ({damaged[0]}, ...); "
            "run the `signround quantize` command that made it again, it repairs them."
        )
    on_event(StageStarted("export", exporter.name))
    return exporter.export(checkpoint, Path(out), on_event)


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
            "give a text file (tuning itself holds one block at a time)",
            "--calibration self",
        )
    ]
