"""Killed at any moment and started again with the same command, a job ends with the bytes of one that never stopped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from signround.artifact import QuantizedCheckpoint
from signround.cli.main import main
from signround.pipeline import export
from tests.small_models import write_small_model

BLOCKS = 3
SETTINGS = ("--scheme", "w4g32", "--samples", "4", "--seqlen", "16", "--iters", "3")
FORMATS = ("gguf", "onnx", "gptq")
MIXED = ("--scheme", "q4_k_m", *SETTINGS[2:])  # llama.cpp's mix: embedding and head are quantised too
MIXED_BLOCKS = 2
MOMENTS = ("writing:0", *(f"after:{block}" for block in range(BLOCKS)), "within:1")
MIXED_MOMENTS = {
    "llama": ("embedding:0",),
    "llama-untied": ("embedding:0", "after:0", "after:1", "head:0"),
}
# The command line in processes of its own, each ended by a real SIGKILL at its moment. They are forked from one that
# has done the imports and nothing else.
KILLED = """
import os, signal, sys
import signround.artifact as room
import signround.pipeline, transformers.models.llama.modeling_llama
from signround.cli.main import main
from signround.cli.progress import ProgressDisplay

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def arm(kind, block):
    commit, save, show = room.ArtifactWriter.commit_block, room.save_tensors, ProgressDisplay.__call__
    outer = room.ArtifactWriter.commit_outer_layer
    def commit_block(self, index, *rest):
        commit(self, index, *rest)
        if kind == "after" and index == block:
            kill()
    def commit_outer_layer(self, name, *rest):
        outer(self, name, *rest)
        if kind == "embedding" and name == "model.embed_tokens.weight":
            kill()
    def save_tensors(path, *rest):
        save(path, *rest)
        if kind == "within" and f"{block:05d}" in path.name or kind == "head" and "lm_head" in path.name:
            os.truncate(path, path.stat().st_size // 2)
            kill()
    def call(self, event):
        if kind == "writing" and type(event).__name__ == "StageAdvanced" and event.stage == "calibrate":
            kill()
        show(self, event)
    room.ArtifactWriter.commit_block, room.save_tensors, ProgressDisplay.__call__ = commit_block, save_tensors, call
    room.ArtifactWriter.commit_outer_layer = commit_outer_layer

folder, moments, arguments = sys.argv[1], sys.argv[2].split(","), sys.argv[3:]
for moment in moments:
    child = os.fork()
    if child == 0:
        kind, block = moment.split(":")
        arm(kind, int(block))
        main([*arguments, "-o", os.path.join(folder, moment)])
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model") / "small", layers=BLOCKS)


def run(model: Path, out: Path, settings: Sequence[str] = SETTINGS) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(model), "-o", str(out), *settings])
    assert ended.value.code == 0


def content(folder: Path) -> dict[str, bytes]:
    """Everything but times: `blocks/*.json`, the report and the empty lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and not path.name.startswith("report.")
        and not (path.parent.name == "blocks" and path.suffix == ".json")
    }


def all_content(out: Path, formats: Sequence[str] = FORMATS) -> dict[str, bytes]:
    """The artifact and the formats that are written from it."""
    artifact = QuantizedCheckpoint(out / "artifact")
    for name in formats:
        export(artifact, name, out / name)
    return content(out)


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    run(model, out)
    found = all_content(out)
    assert any(name.endswith(".gguf") for name in found)
    return found


def same(found: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    return True


@pytest.fixture(scope="module")
def killed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the output folder of each killed run, by its moment."""
    return kill_at(MOMENTS, model, tmp_path_factory.mktemp("killed"), SETTINGS)


def kill_at(moments: Sequence[str], model: Path, folder: Path, settings: Sequence[str]) -> Path:
    subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), ",".join(moments), "quantize", str(model), *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again(model: Path, uninterrupted: dict[str, bytes], killed: Path, moment: str) -> None:
    """After each block, while one is written, and before the first."""
    out = killed / moment
    finished = sorted(path.stem for path in (out / "artifact" / "blocks").glob("[0-9]*.safetensors"))
    kind, block = moment.split(":")
    assert finished == [f"{index:05d}" for index in range({"after": int(block) + 1, "within": 1}.get(kind, 0))]
    run(model, out)
    assert same(all_content(out), uninterrupted)


@pytest.mark.parametrize("family", MIXED_MOMENTS)
def test_killed_around_embedding_and_head(family: str, tmp_path: Path) -> None:
    """After the embedding, which comes before the blocks; after each block; while the head is written. The importance
    matrix beside the model is among the bytes."""
    model, moments = write_small_model(tmp_path / "small", family, layers=MIXED_BLOCKS), MIXED_MOMENTS[family]
    text = tmp_path / "text.txt"
    text.write_text("word1 and word2\n" * 200)
    settings = (*MIXED, "--calibration", str(text))
    run(model, tmp_path / "uninterrupted", settings)
    expected = all_content(tmp_path / "uninterrupted", ["gguf"])
    assert "gguf/imatrix.gguf" in expected
    folder = kill_at(moments, model, tmp_path / "killed", settings)
    for moment in moments:
        kind, block = moment.split(":")
        files = [path.stem for path in (folder / moment / "artifact").rglob("*.safetensors")]
        assert "model.embed_tokens.weight" in files
        assert "lm_head.weight" not in files  # nor is half of it, under its own name
        assert sum(name.isdigit() for name in files) == {"embedding": 0, "head": MIXED_BLOCKS}.get(kind, int(block) + 1)
        run(model, folder / moment, settings)
        assert same(all_content(folder / moment, ["gguf"]), expected), moment


@pytest.mark.parametrize("method", ["rtn", "signround-400", "signround"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_lost_embedding_or_head_is_made_again(tmp_path: Path, method: str, name: str) -> None:
    """With every block in place: they are run, none is tuned again."""
    model = write_small_model(tmp_path / "small", "llama-untied")
    effort = ["--method", method] if method == "rtn" else ["--method", method, "--iters", "2"]
    arguments = ["--scheme", "q4_k_m", "--samples", "4", "--seqlen", "16", *effort]
    out = tmp_path / "out"
    run(model, out, arguments)
    expected = content(out)
    lost = out / "artifact" / "outer" / f"{name}.safetensors"
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in (out / "artifact" / "blocks").iterdir()}
    run(model, out, arguments)
    assert lost.is_file()
    assert same(content(out), expected)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_finished_job_says_so_and_changes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(model, out)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    run(model, out)
    assert "this job is done already" in " ".join(capsys.readouterr().err.split())
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    run(model, out)
    return out


@pytest.mark.parametrize("damage", ["deleted", "flipped", "cut"])
@pytest.mark.parametrize(
    "name",
    ["artifact/blocks/00001.safetensors", "artifact/outer/model.norm.weight.safetensors", "artifact/model/config.json",
     "artifact/calibration.safetensors"],
)  # fmt: skip
def test_a_damaged_file_is_repaired(finished: Path, model: Path, tmp_path: Path, name: str, damage: str) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    path = out / name
    if damage == "deleted":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:] if damage == "flipped" else data[:-9])
    run(model, out)
    assert path.is_file()
    assert same(content(out), content(finished))


@pytest.mark.parametrize("name", ["report.md", "report.html", "report.json"])
def test_a_deleted_report_is_written_again(finished: Path, model: Path, tmp_path: Path, name: str) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / name).unlink()
    run(model, out)
    assert (out / name).is_file()


def test_a_damaged_report_is_written_again(finished: Path, model: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "report.json").write_text('{"schema_version": 1, "jo')
    run(model, out)
    assert (out / "report.json").read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("method", ["rtn", "signround-400"])
def test_other_methods_resume_too(model: Path, tmp_path: Path, method: str) -> None:
    """Here a block is taken away instead of a process: what lies before and after it stays."""
    effort = [] if method == "rtn" else ["--iters", "2"]
    arguments = [
        "quantize",
        str(model),
        "--scheme",
        "w4g32-asym",
        "--method",
        method,
        "--samples",
        "4",
        "--seqlen",
        "16",
    ]
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        main([*arguments, *effort, "-o", str(out)])
    expected = content(out)
    (out / "artifact" / "blocks" / "00001.safetensors").unlink()
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *effort, "-o", str(out)])
    assert ended.value.code == 0
    assert same(content(out), expected)
