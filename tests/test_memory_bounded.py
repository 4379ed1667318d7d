"""Memory is bounded by one block or one tensor: what is read and still alive does not grow with the layers, and no file
stays mapped. benchmarks/memory.py shows the same in resident bytes, on models that are large enough for it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from exporters.gguf import container, slices
from signround import parallel
from signround.artifact import QuantizedCheckpoint
from signround.checkpoint import SourceCheckpoint
from signround.evaluate import score
from signround.exporting import make_exporters
from signround.loading import whole_model
from signround.parity import compare_weights
from signround.pipeline import Job, export, prepare, tune
from signround.runtimes.torch_blocks import float_model, rounded_model, tuned_model
from tests.small_models import write_small_model

FORMATS = ("gguf", "onnx")  # GPTQ is read by a process of its own; its exporter is among the stages
FEW, MANY = 2, 5


class Alive:
    """Bytes of the tensors that were read and are still referenced, by whomever; `most` since `start`."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def start(self) -> None:
        self.most = self.now

    def watched(self, tensor: Tensor) -> Tensor:
        """The same numbers in memory that tells when its last user lets go."""
        raw = np.array(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        self.now += raw.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(raw, self._freed, raw.nbytes)
        return torch.from_numpy(raw).view(tensor.dtype).reshape(tensor.shape)

    def _freed(self, count: int) -> None:
        self.now -= count


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Alive:
    """Every tensor that a checkpoint or an artifact reads is watched. Float32 models keep it: no cast makes a copy.
    GGUF's slices are made one at a time: how far threads get ahead of the disk (tests/test_parallel.py) is chance."""
    watch = Alive()
    read, read_parts = SourceCheckpoint.read, QuantizedCheckpoint._read

    def watched_parts(
        self: QuantizedCheckpoint, name: str, parts: list[str], rows: range | None = None, *, optional: bool = False
    ) -> dict[str, Tensor]:
        found = read_parts(self, name, parts, rows, optional=optional)
        return {part: watch.watched(tensor) for part, tensor in found.items()}

    monkeypatch.setattr(SourceCheckpoint, "read", lambda self, name: watch.watched(read(self, name)))
    monkeypatch.setattr(QuantizedCheckpoint, "_read", watched_parts)
    monkeypatch.setattr(container, "in_order", lambda jobs: (job() for job in jobs))
    return watch


def write_job(folder: Path, layers: int, method: str) -> Job:
    model = write_small_model(folder / "model", layers=layers, dtype=torch.float32)
    text = folder / "calibration.txt"
    text.write_text("\n".join(f"word{i} {i * 7919} some more text number {i}" for i in range(400)))
    steps = {} if method == "rtn" else {"iters": 1}
    return prepare(
        model, "w4g32", folder / "out", ("gguf", "onnx", "gptq"), method=method, calibration=str(text), samples=4,
        seqlen=16, **steps,
    )  # fmt: skip


def stages(folder: Path, layers: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and work of each stage of a job, in order."""
    folder.mkdir()
    jobs: list[Job] = []
    yield "plan", lambda: jobs.append(write_job(folder, layers, "signround"))
    job = jobs[0]
    yield "tune", lambda: tune(job)
    artifact = QuantizedCheckpoint(job.out / "artifact")
    windows = torch.arange(64).view(4, 16)
    yield "evaluate float", lambda: score(float_model(job.checkpoint), windows)
    yield "evaluate rounded", lambda: score(rounded_model(job.checkpoint, job.plan), windows)
    yield "evaluate tuned", lambda: score(tuned_model(artifact), windows)
    for exporter in job.exporters:
        yield f"export {exporter.name}", lambda exporter=exporter: export(artifact, exporter, job.out / exporter.name)
    for exporter in make_exporters(FORMATS):
        exported = exporter.opened(job.out / exporter.name)
        yield (
            f"check {exporter.name}",
            lambda exporter=exporter, exported=exported: compare_weights(artifact, exporter, exported),
        )
        yield (
            f"read {exporter.name}",
            lambda exporter=exporter, exported=exported: [name for name, _ in exporter.read_back(exported)],
        )


def mapped_files(folder: Path) -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if str(folder) in line]


def test_what_is_alive_does_not_grow_with_the_layers(alive: Alive, tmp_path: Path) -> None:
    most: dict[int, dict[str, int]] = {FEW: {}, MANY: {}}
    for layers, found in most.items():
        for name, work in stages(tmp_path / str(layers), layers):
            alive.start()
            work()
            found[name] = alive.most
            if sys.platform == "linux":
                assert not mapped_files(tmp_path), name
    assert alive.now == 0
    assert most[FEW] == most[MANY]
    assert all(most[FEW][name] > 0 for name in most[FEW] if not name.startswith("read"))


def test_rounding_without_tuning_holds_one_block(alive: Alive, tmp_path: Path) -> None:
    most = {}
    for layers in (FEW, MANY):
        (tmp_path / str(layers)).mkdir()
        job = write_job(tmp_path / str(layers), layers, "rtn")
        alive.start()
        tune(job)
        most[layers] = alive.most
    assert most[FEW] == most[MANY]
    names = list(job.checkpoint.tensors)
    model = whole_model(job.checkpoint.folder, names, job.checkpoint.read, torch.float32)  # this must be seen
    assert alive.most > 2 * most[MANY]
    del model


def test_threads_hold_a_few_slices(alive: Alive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, values = 2, 1500
    artifact = tune(write_job(tmp_path, 3, "rtn"))
    monkeypatch.setattr(container, "in_order", parallel.in_order)
    monkeypatch.setattr(parallel, "processors", lambda: threads)
    monkeypatch.setattr(slices, "SLICE", values)
    alive.start()
    export(artifact, "gguf", tmp_path / "gguf")
    assert values < alive.most <= (threads + 2) * 4 * values


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages of a mapping are read from /proc/self/smaps")
@pytest.mark.parametrize("name", FORMATS)
def test_files_are_not_resident_while_they_are_checked(name: str, tmp_path: Path) -> None:
    """Pages of a mapped file count as resident memory until it is unmapped."""
    model = write_small_model(tmp_path / "model", layers=6, hidden_size=256, intermediate_size=768)
    artifact = tune(prepare(model, "w4g32", tmp_path / "out", (name,), method="rtn", samples=2, seqlen=16))
    exporter = make_exporters([name])[0]
    exported = export(artifact, exporter, tmp_path / name)
    size = sum(path.stat().st_size for path in exported.files)
    for read in (exporter.decode_independently, exporter.read_back):
        highest = max(resident_bytes(tmp_path) for _ in read(exported))
        assert highest < size / 4, read


def resident_bytes(folder: Path) -> int:
    """Resident pages of mapped files below `folder`."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            inside = str(folder) in line
        elif inside and first == "Rss:":
            total += int(line.split()[1]) * 1024
    return total
