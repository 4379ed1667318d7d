"""Files that are whole or absent, hashes, and the safetensors that we write ourselves."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from signround.errors import FailedError
from signround.files import (
    PARTIAL,
    canonical_json,
    disk_errors,
    files_written_whole,
    folder_written_whole,
    sha256_of,
    sha256_of_json,
    write_json,
    written_whole,
)
from signround.safetensors_stream import save_tensors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Killed(BaseException):
    """Stands for anything that ends the work."""


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with written_whole(target) as temporary:
        temporary.write_text("done")
        assert not target.exists()
        assert temporary.parent == target.parent  # os.replace must not cross a file system
    assert target.read_text() == "done"
    assert names(target.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Killed])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write() -> None:
        with written_whole(target) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(error):
        write()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_what_a_kill_left_behind_is_replaced(tmp_path: Path) -> None:
    (tmp_path / f"{PARTIAL}a.txt").write_text("half of an older wri")
    with written_whole(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("name", ["gguf", "out[1]", "a*b", "with space"])
def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    (tmp_path / f"{PARTIAL}{name}-killed").mkdir()
    for text in ("first", "second"):
        with folder_written_whole(target) as temporary:
            (temporary / text).write_text(text)
            assert not (target / text).exists()
        assert names(target) == [text]
        assert names(tmp_path) == [name]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_folder_leaves_what_was_there(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "gguf"
    if exists:
        target.mkdir()
        (target / "old").write_text("old")

    def write() -> None:
        with folder_written_whole(target) as temporary:
            (temporary / "new").write_text("ne")
            raise Killed

    with pytest.raises(Killed):
        write()
    assert names(tmp_path) == (["gguf"] if exists else [])
    assert not exists or names(target) == ["old"]


@pytest.mark.parametrize(
    ("number", "fragment"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EROFS, "cannot be written"),
        (errno.EACCES, "choose another -o folder"),
    ],
)
def test_errors_of_the_disk_are_one_sentence(number: int, fragment: str) -> None:
    with pytest.raises(FailedError, match=fragment) as caught, disk_errors(Path("out/x")):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith("out/x: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_other_errors_pass_through() -> None:
    with pytest.raises(OSError, match="I/O") as caught, disk_errors(Path("x")):
        raise OSError(errno.EIO, "I/O")
    assert caught.value.errno == errno.EIO


def test_json_is_hashed_by_meaning(tmp_path: Path) -> None:
    assert canonical_json({"b": [1, 2.5], "a": None}) == '{"a":null,"b":[1,2.5]}'
    assert sha256_of_json({"a": 1, "b": 2}) == sha256_of_json({"b": 2, "a": 1})
    assert sha256_of_json({"a": 1}) != sha256_of_json({"a": "1"})
    write_json(tmp_path / "a.json", {"b": 1, "a": [2]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1, "a": [2]}
    assert sha256_of(tmp_path / "a.json") == hashlib.sha256((tmp_path / "a.json").read_bytes()).hexdigest()


TENSORS = {
    "z.codes": torch.arange(7, dtype=torch.uint8),
    "a": torch.randn(3, 5).bfloat16(),
    "half": torch.randn(2, 2).half(),
    "single": torch.randn(4, 1, 3),
    "scalar": torch.tensor(2.5),
    "long": torch.tensor([-1, 2**40]),
    "int": torch.tensor([[3, -4]], dtype=torch.int32),
    "small": torch.tensor([-128, 127], dtype=torch.int8),
    "empty": torch.zeros(0, 4),
    "turned": torch.randn(4, 6).T,
    "größe": torch.ones(1),
}


def test_our_safetensors_are_read_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {"format": "pt"})
    loaded = load_file(path)
    assert set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_equal_tensors_give_equal_bytes_in_any_order_and_layout(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", TENSORS, {"b": "1", "a": "2"})
    turned = {name: TENSORS[name].contiguous() for name in reversed(TENSORS)}
    save_tensors(tmp_path / "y", turned, {"a": "2", "b": "1"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_every_tensor_is_aligned_to_its_element(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", TENSORS)
    data = (tmp_path / "x").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % TENSORS[name].element_size() == 0


def test_a_dtype_that_we_never_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="float64"):
        save_tensors(tmp_path / "x", {"a": torch.zeros(1, dtype=torch.float64)})


def test_safetensors_are_readable_by_other_users(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", {"a": torch.zeros(1)})
    (tmp_path / "y").write_bytes(b"")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_a_disk_that_fills_while_tensors_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, after=100)
    target = tmp_path / "x.safetensors"
    with pytest.raises(FailedError, match="the disk is full"), written_whole(target) as temporary:
        save_tensors(temporary, {"a": torch.zeros(1000)})
    assert names(tmp_path) == []


def fill_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """From now on, the writer finds the disk full after `after` bytes of any one tensor file."""

    class Stream:
        def __init__(self, path: Path) -> None:
            self.inner = open(path, "wb")  # noqa: SIM115
            self.left = after

        def write(self, data: bytes) -> None:
            room = memoryview(data)[: self.left]
            self.left -= self.inner.write(room)
            if len(room) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def seek(self, offset: int) -> None:
            self.inner.seek(offset)

        def close(self) -> None:
            self.inner.close()

    def opened(path: Path, mode: str) -> Any:
        return Stream(path) if mode == "wb" else open(path, mode)

    monkeypatch.setattr("signround.safetensors_stream.open", opened, raising=False)


def test_a_set_of_files_appears_together(tmp_path: Path) -> None:
    paths = [tmp_path / "out" / name for name in ("a", "b", "c")]
    with files_written_whole(paths) as temporaries:
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.write_text(path.name)
        assert not any(path.exists() for path in paths)
    assert [path.read_text() for path in paths] == ["a", "b", "c"]
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_set_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    old = tmp_path / "older"
    for path in (*paths, old):
        path.write_text("old")

    def failing() -> None:
        with files_written_whole(paths, [old]) as temporaries:
            temporaries[0].write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old", "older": "old"}


@pytest.mark.parametrize("kill_at", range(5))
def test_no_first_file_stands_beside_another_set(kill_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between any two steps: the first file, if there is one, is of the set that the others are of."""
    paths, older = [tmp_path / name for name in ("a", "b", "c")], tmp_path / "older"
    for path in (*paths, older):
        path.write_text("old")
    steps = 0

    def counted(step: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            nonlocal steps
            if steps == kill_at:
                raise KeyboardInterrupt
            steps += 1
            step(*arguments, **options)

        return run

    def replaced() -> None:
        with files_written_whole(paths, [older]) as temporaries:
            for temporary in temporaries:
                temporary.write_text("new")

    with monkeypatch.context() as patched:
        patched.setattr("signround.files.os.replace", counted(os.replace))
        patched.setattr("pathlib.Path.unlink", counted(Path.unlink))
        with pytest.raises(KeyboardInterrupt):
            replaced()
    if paths[0].exists():
        assert len({path.read_text() for path in paths}) == 1
    assert older.exists()
