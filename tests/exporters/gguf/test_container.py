"""The container against gguf-py's reader, and against damaged bytes."""

from __future__ import annotations

import errno
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.gguf.container import GgufFile, KeyValue, PartOfTensor, TensorEntry, file_bytes, header, write

ENTRIES = [
    KeyValue("general.architecture", "string", "llama"),
    KeyValue("a.u32", "u32", 7),
    KeyValue("a.float", "f32", 0.5),
    KeyValue("a.bool", "bool", True),
    KeyValue("a.empty", "string", ""),
    KeyValue("a.strings", "string", ["", "é", "▁x"]),
    KeyValue("a.types", "i32", [1, -2, 3]),
    KeyValue("a.scores", "f32", [0.0, -1.5]),
]
TENSORS = [TensorEntry("one", (3, 5), 0, 60), TensorEntry("two", (7,), 1, 14), TensorEntry("three", (2, 32), 2, 36)]
TYPES = {0: (1, 4), 1: (1, 2), 2: (32, 18)}


def data(entry: TensorEntry) -> np.ndarray:
    return np.random.default_rng(len(entry.name)).integers(0, 256, entry.bytes, dtype=np.uint8)


def in_parts(entry: TensorEntry) -> Iterator[PartOfTensor]:
    """Three parts, the first of which takes the longest to make."""
    raw = data(entry)
    yield lambda: (time.sleep(0.02), raw[:5])[1]
    yield lambda: raw[5:6]
    yield lambda: raw[6:]


def written(path: Path) -> Path:
    with open(path, "wb") as stream:
        assert [entry.name for entry in write(stream, ENTRIES, TENSORS, in_parts)] == ["one", "two", "three"]
    return path


def test_both_readers_read_it(tmp_path: Path) -> None:
    from gguf import GGUFReader

    path = written(tmp_path / "x.gguf")
    ours, theirs = GgufFile(path, TYPES), GGUFReader(path)
    assert path.stat().st_size == file_bytes(ENTRIES, TENSORS)
    for entry in ENTRIES:
        assert ours.values[entry.key] == entry.value == theirs.fields[entry.key].contents()
    for entry, tensor in zip(TENSORS, theirs.tensors, strict=True):
        assert ours.tensors[entry.name] == entry
        assert tuple(int(size) for size in tensor.shape[::-1]) == entry.shape
        assert ours.data(entry.name).tobytes() == data(entry).tobytes() == tensor.data.tobytes()


def test_wrong_size_is_caught() -> None:
    with pytest.raises(ValueError, match="one: 3 bytes where 60 were announced"):
        list(write(io.BytesIO(), [], TENSORS, lambda entry: [lambda: np.zeros(3, dtype=np.uint8)]))


@pytest.mark.parametrize("name", ["one", "two", "three"])
def test_a_tensor_without_parts_is_caught(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: no parts"):
        list(write(io.BytesIO(), [], TENSORS, lambda entry: () if entry.name == name else in_parts(entry)))


def test_no_thread_outlives_a_write_that_fails() -> None:
    """Though the error, and with it the frame that was writing, is kept."""

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() > len(header(ENTRIES, TENSORS)):
                raise OSError(errno.ENOSPC, "full")
            return super().write(data)

    before = set(threading.enumerate())
    with pytest.raises(OSError, match="full") as kept:
        for _ in write(Full(), ENTRIES, TENSORS, in_parts):
            pass
    assert kept.value.__traceback__ is not None
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("keep", [0, 3, 20, 100, 300])
def test_cut_files_are_named(keep: int, tmp_path: Path) -> None:
    path = written(tmp_path / "x.gguf")
    raw = path.read_bytes()
    path.write_bytes(raw[:keep] if keep < 300 else raw[:-40])
    with pytest.raises(ValueError, match=r"cut short|start with GGUF"):
        GgufFile(path, TYPES)


@pytest.mark.parametrize("position", [16, 24, 57])
def test_a_damaged_length_does_not_ask_for_memory(position: int, tmp_path: Path) -> None:
    """Byte 16 counts the key-values, 24 is the length of the first key, 57 that of its value."""
    path = written(tmp_path / "x.gguf")
    raw = bytearray(path.read_bytes())
    raw[position : position + 8] = b"\xff" * 7 + b"\x0f"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"cut short|can't decode|unknown type"):
        GgufFile(path, TYPES)
