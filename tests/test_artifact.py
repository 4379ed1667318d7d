"""The artifact: committed or absent, resumable after a kill at any moment, and jealous of its folder."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from signround import files
from signround.artifact import ArtifactWriter, BlockRecord, QuantizedCheckpoint, artifact_bytes, block_file, is_artifact
from signround.checkpoint import SourceCheckpoint
from signround.errors import FailedError, RefusedError
from signround.plan import CalibrationSpec, ModelPlan, make_plan
from signround.qtensor import QuantizedTensor
from signround.recipes import settings_for
from tests.small_artifacts import rounded_tensor
from tests.small_models import write_small_model
from tests.test_files import fill_disk


@dataclass(frozen=True)
class Job:
    """Everything that a run would write, kept in memory."""

    plan: ModelPlan
    model_files: list[Path]
    outer: dict[str, torch.Tensor]
    blocks: list[tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]]

    def writer(self, folder: Path) -> ArtifactWriter:
        return ArtifactWriter(folder, self.plan, self.model_files)

    def run(self, folder: Path, seconds: float = 1.0, stop_after: int | None = None) -> list[int]:
        """Write what is missing, as a resumed run does; returns the blocks that were written."""
        writer = self.writer(folder)
        written = []
        try:
            writer.set_calibration({"source": "self", "tokens": 32, "sha256": "00"})
            for name, tensor in self.outer.items():
                writer.commit_outer(name, tensor)
            for index, (quantized, kept) in enumerate(self.blocks[:stop_after]):
                if not writer.has_block(index):
                    writer.commit_block(index, quantized, kept, BlockRecord(index, seconds, 2.0, 1.0, {}, 5, 6), {})
                    written.append(index)
            if stop_after is None:
                writer.finish()
        finally:
            writer.close()
        return written


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Three blocks of a very small model."""
    model = write_small_model(
        tmp_path_factory.mktemp("job") / "model", layers=3, hidden_size=32, intermediate_size=64, vocab_size=512
    )
    checkpoint = SourceCheckpoint(model)
    plan = make_plan(checkpoint, "w4g32", settings_for("rtn", context=64, samples=2), CalibrationSpec("self"))
    blocks = [
        (
            {layer.name: rounded_tensor(checkpoint.read(layer.name), layer.grid) for layer in block.layers},
            {kept.name: checkpoint.read(kept.name) for kept in block.kept},
        )
        for block in plan.blocks
    ]
    outer = {kept.name: checkpoint.read(kept.name) for kept in plan.outer}
    return Job(plan, checkpoint.files, outer, blocks)


def test_named_chat_templates_are_carried_along(job: Job, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(job.model_files[0].parent, model)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    replace(job, model_files=SourceCheckpoint(model).files).run(tmp_path / "artifact")
    carried = tmp_path / "artifact" / "model" / "additional_chat_templates" / "rag.jinja"
    assert carried.read_text() == "{{ documents }}"


def contents(folder: Path, *, records: bool = False) -> dict[str, bytes]:
    """Path -> bytes of every file; block records (times) only on request, the empty lock file never."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != ".lock"
        and (records or path.parent.name != "blocks" or path.suffix != ".json")
    }


def sentence_of(error: type[RefusedError | FailedError], action: object) -> str:
    assert callable(action)
    with pytest.raises(error) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# ---- writing and reading


def test_what_is_committed_is_read_back(job: Job, tmp_path: Path) -> None:
    assert job.run(tmp_path / "artifact") == [0, 1, 2]
    artifact = QuantizedCheckpoint(tmp_path / "artifact")
    for quantized, kept in job.blocks:
        for name, tensor in quantized.items():
            loaded = artifact.quantized(name)
            assert loaded.grid == tensor.grid
            assert torch.equal(loaded.codes, tensor.codes)
            assert set(loaded.fields) == set(tensor.fields)
            assert all(torch.equal(loaded.fields[field], tensor.fields[field]) for field in tensor.fields)
            assert torch.equal(artifact.weight(name), tensor.decode())
        for name, plain in kept.items():
            assert torch.equal(artifact.tensor(name), plain)
    for name, plain in job.outer.items():
        assert artifact.tensor(name).dtype == plain.dtype
        assert torch.equal(artifact.weight(name), plain.float())
    assert artifact.plan.identity == job.plan.identity
    assert [record.index for record in artifact.records()] == [0, 1, 2]
    assert artifact.records()[1] == BlockRecord(1, 1.0, 2.0, 1.0, {}, 5, 6)
    assert artifact.damaged() == []
    carried = {path.name: path.read_bytes() for path in (artifact.folder / "model").iterdir()}
    assert carried == {path.name: path.read_bytes() for path in job.model_files}


def test_the_estimate_is_close(job: Job, tmp_path: Path) -> None:
    job.run(tmp_path / "a")
    tensors = sum(path.stat().st_size for path in (tmp_path / "a").rglob("*.safetensors"))
    headers = 200 * (len(job.plan.blocks) * 16 + 2)
    assert artifact_bytes(job.plan) <= tensors <= artifact_bytes(job.plan) + headers


def test_equal_content_gives_equal_bytes(job: Job, tmp_path: Path) -> None:
    job.run(tmp_path / "a", seconds=1.0)
    job.run(tmp_path / "b", seconds=2.0)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a", records=True) != contents(tmp_path / "b", records=True)
    assert QuantizedCheckpoint(tmp_path / "a").fingerprint == QuantizedCheckpoint(tmp_path / "b").fingerprint


def test_other_integers_have_another_fingerprint(job: Job, tmp_path: Path) -> None:
    quantized, kept = job.blocks[2]
    name, tensor = next(iter(quantized.items()))
    changed = QuantizedTensor(tensor.grid, tensor.codes ^ 1, tensor.fields)
    replace(job, blocks=[*job.blocks[:2], (quantized | {name: changed}, kept)]).run(tmp_path / "a")
    job.run(tmp_path / "b")
    assert QuantizedCheckpoint(tmp_path / "a").fingerprint != QuantizedCheckpoint(tmp_path / "b").fingerprint


# ---- resuming


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
def test_a_resumed_run_ends_with_the_same_bytes(job: Job, tmp_path: Path, stop_after: int) -> None:
    job.run(tmp_path / "a", stop_after=stop_after)
    assert job.run(tmp_path / "a") == list(range(stop_after, 3))
    job.run(tmp_path / "b")
    assert contents(tmp_path / "a", records=True) == contents(tmp_path / "b", records=True)


def test_a_finished_run_writes_nothing_again(job: Job, tmp_path: Path) -> None:
    job.run(tmp_path / "a")
    before = contents(tmp_path / "a", records=True)
    assert job.run(tmp_path / "a", seconds=9.0) == []
    assert contents(tmp_path / "a", records=True) == before


class Killed(BaseException):
    """No handler of ours may stop it, and nothing is cleaned up: as near to SIGKILL as one process can get."""


def _kill_at(monkeypatch: pytest.MonkeyPatch, step: int, half: bool) -> None:
    """Die at the `step`-th replacement of a final file, before it, with the temporary file whole or cut in half."""
    count = iter(range(10**6))
    real = os.replace

    def replacing(source: Path, target: Path) -> None:
        if next(count) == step:
            if half:
                os.truncate(source, source.stat().st_size // 2)
            raise Killed
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replacing)
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)


def test_killed_at_any_write_and_started_again(job: Job, tmp_path: Path) -> None:
    job.run(tmp_path / "whole")
    expected = contents(tmp_path / "whole", records=True)
    for step in range(200):
        folder = tmp_path / f"killed{step}"
        with pytest.MonkeyPatch.context() as monkeypatch:
            _kill_at(monkeypatch, step, half=step % 2 == 0)
            try:
                job.run(folder)
                break
            except Killed:
                left = [path.name for path in folder.rglob(".partial-*")]
                assert left, "the kill left nothing behind, so it proves nothing"
        job.run(folder)
        assert contents(folder, records=True) == expected, f"killed at write {step}"
    assert step >= 15, "the job has more writes than that"


def test_a_real_kill_in_the_middle_of_a_block(job: Job, tmp_path: Path) -> None:
    """Another process holds the lock, has half a block under a temporary name, and is killed."""
    folder = tmp_path / "a"
    job.run(folder, stop_after=1)
    program = (
        "import fcntl, sys, time\n"
        "lock = open(sys.argv[1] + '/.lock', 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "open(sys.argv[1] + '/blocks/.partial-00001.safetensors', 'wb').write(bytes(1000))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        text = sentence_of(RefusedError, lambda: job.writer(folder))
        assert "another signround run is writing" in text
        other.kill()
    assert job.run(folder) == [1, 2]
    job.run(tmp_path / "b")
    assert contents(folder, records=True) == contents(tmp_path / "b", records=True)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name", [block_file(1), "outer/model.norm.weight.safetensors", "model/tokenizer.json"])
def test_a_damaged_file_is_found_and_written_again(job: Job, tmp_path: Path, name: str, damage: str) -> None:
    job.run(tmp_path / "a")
    expected = contents(tmp_path / "a", records=True)
    path = tmp_path / "a" / name
    data = path.read_bytes()
    changed = {"flip": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[: len(data) // 2], "remove": b""}[damage]
    path.write_bytes(changed)
    if damage == "remove":
        path.unlink()
    assert QuantizedCheckpoint(tmp_path / "a").damaged() == [name]
    assert job.run(tmp_path / "a") == ([1] if name == block_file(1) else [])
    assert QuantizedCheckpoint(tmp_path / "a").damaged() == []
    assert contents(tmp_path / "a", records=True) == expected


def test_a_block_that_the_manifest_does_not_name_does_not_exist(job: Job, tmp_path: Path) -> None:
    job.run(tmp_path / "b")
    job.run(tmp_path / "a", stop_after=1)
    shutil.copy(tmp_path / "b" / block_file(1), tmp_path / "a" / block_file(1))
    assert job.run(tmp_path / "a") == [1, 2]


# ---- refusals of the writer


def test_another_plan_is_refused_with_both_fingerprints(job: Job, tmp_path: Path) -> None:
    job.run(tmp_path / "a", stop_after=1)
    before = contents(tmp_path / "a", records=True)
    other = replace(job, plan=replace(job.plan, scheme="w4g32-asym", tuning=replace(job.plan.tuning, seed=3)))
    text = sentence_of(RefusedError, lambda: other.writer(tmp_path / "a"))
    assert job.plan.fingerprint[:12] in text
    assert other.plan.fingerprint[:12] in text
    assert "they differ in scheme, tuning)" in text
    assert "choose another -o folder" in text
    assert contents(tmp_path / "a", records=True) == before


def test_other_calibration_tokens_are_refused(job: Job, tmp_path: Path) -> None:
    job.run(tmp_path / "a", stop_after=1)
    writer = job.writer(tmp_path / "a")
    text = sentence_of(RefusedError, lambda: writer.set_calibration({"source": "self", "sha256": "ff" * 32}))
    assert "other calibration tokens" in text
    assert "ffffffffffff" in text
    writer.close()


@pytest.mark.parametrize("content", ["notes.txt", "sub/notes.txt"])
def test_a_folder_that_holds_something_else_is_refused_and_untouched(job: Job, tmp_path: Path, content: str) -> None:
    path = tmp_path / "a" / content
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    text = sentence_of(RefusedError, lambda: job.writer(tmp_path / "a"))
    assert "something that is not a signround artifact" in text
    assert contents(tmp_path / "a") == {content: b"mine"}
    assert not (tmp_path / "a" / ".lock").exists()


def test_a_file_in_place_of_the_folder_is_refused(job: Job, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    assert "a file of this name exists" in sentence_of(RefusedError, lambda: job.writer(tmp_path / "a"))


@pytest.mark.parametrize("prepare", ["missing", "empty", "killed before the manifest"])
def test_a_new_folder_is_taken(job: Job, tmp_path: Path, prepare: str) -> None:
    if prepare != "missing":
        (tmp_path / "a").mkdir()
    if prepare == "killed before the manifest":
        (tmp_path / "a" / ".lock").touch()
        (tmp_path / "a" / "model").mkdir()
    assert job.run(tmp_path / "a") == [0, 1, 2]


def test_the_lock_is_held_until_close(job: Job, tmp_path: Path) -> None:
    writer = job.writer(tmp_path / "a")
    assert "another signround run" in sentence_of(RefusedError, lambda: job.writer(tmp_path / "a"))
    writer.close()
    job.writer(tmp_path / "a").close()


# ---- a full disk


def test_a_full_disk_is_one_sentence_and_keeps_earlier_blocks(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.run(tmp_path / "a", stop_after=1)
    before = contents(tmp_path / "a", records=True)
    with monkeypatch.context() as patch:
        fill_disk(patch, after=500)
        text = sentence_of(FailedError, lambda: job.run(tmp_path / "a"))
    assert "the disk is full" in text
    assert "finished blocks are kept" in text
    after = contents(tmp_path / "a", records=True)
    assert after.items() >= before.items()
    assert set(after) - set(before) <= {"blocks/00001.json"}
    assert job.run(tmp_path / "a") == [1, 2]


def test_a_full_disk_at_the_start_lets_the_folder_go(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr("signround.artifact.shutil.copyfile", full)
        with pytest.raises(FailedError, match="the disk is full") as caught:
            job.writer(tmp_path / "a")
    assert contents(tmp_path / "a") == {}
    job.run(tmp_path / "a")  # while `caught` still holds the failed writer
    assert caught.value.exit_code == 1


# ---- refusals of the reader


def test_an_unfinished_artifact_is_refused(job: Job, tmp_path: Path) -> None:
    job.run(tmp_path / "a", stop_after=2)
    text = sentence_of(RefusedError, lambda: QuantizedCheckpoint(tmp_path / "a"))
    assert "not finished" in text
    assert "run the same `signround quantize` command again" in text
    partial = QuantizedCheckpoint(tmp_path / "a", allow_unfinished=True)
    assert [record.index for record in partial.records()] == [0, 1]


def test_a_folder_without_an_artifact_is_refused(job: Job, tmp_path: Path) -> None:
    assert "no manifest.json" in sentence_of(RefusedError, lambda: QuantizedCheckpoint(tmp_path))
    assert "no manifest.json" in sentence_of(RefusedError, lambda: QuantizedCheckpoint(tmp_path / "nowhere"))
    job.run(tmp_path / "out" / "artifact")
    text = sentence_of(RefusedError, lambda: QuantizedCheckpoint(tmp_path / "out"))
    assert f"give {tmp_path / 'out' / 'artifact'}" in text
    assert is_artifact(tmp_path / "out" / "artifact")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"schema_version": 1}', "\x00"])
def test_a_damaged_manifest_is_refused(job: Job, tmp_path: Path, content: str) -> None:
    job.run(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text(content)
    for action in (lambda: QuantizedCheckpoint(tmp_path / "a"), lambda: job.writer(tmp_path / "a")):
        assert "manifest.json is damaged" in sentence_of(RefusedError, action)


def test_another_schema_is_refused(job: Job, tmp_path: Path) -> None:
    job.run(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    for action in (lambda: QuantizedCheckpoint(tmp_path / "a"), lambda: job.writer(tmp_path / "a")):
        text = sentence_of(RefusedError, action)
        assert "schema 2, this release reads 1" in text


@pytest.mark.parametrize("damage", ["cut", "remove", "other tensors"])
def test_reading_a_damaged_block_fails_with_the_way_out(job: Job, tmp_path: Path, damage: str) -> None:
    job.run(tmp_path / "a")
    path = tmp_path / "a" / block_file(0)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "remove":
        path.unlink()
    else:
        shutil.copy(tmp_path / "a" / block_file(1), path)
    artifact = QuantizedCheckpoint(tmp_path / "a")
    name = next(iter(artifact.layers))
    text = sentence_of(FailedError, lambda: artifact.quantized(name))
    assert str(path) in text
    assert "it repairs the artifact" in text


def test_the_lock_is_a_lock_of_the_system(job: Job, tmp_path: Path) -> None:
    """So a killed run never leaves the folder locked."""
    writer = job.writer(tmp_path / "a")
    with open(tmp_path / "a" / ".lock") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    writer.close()
    with open(tmp_path / "a" / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
