"""A model in several files, as llama.cpp's `gguf-split` lays them out: which tensors go where, known from sizes alone.

Every part is a GGUF file of its own with `split.no` u16 (from 0), `split.count` u16 and `split.tensors.count` i32 (of
all parts); the first also holds all metadata, before those three. Tensors keep their order and are never cut. No file
is larger than the limit, header included (`gguf-split` counts tensors only, so its files can be a little larger).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from exporters.gguf.container import GgufFile, KeyValue, TensorEntry, file_bytes, padded, preamble_bytes, row_bytes
from signround.runtimes.gguf_files import MOST_PARTS

UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}  # decimal, as gguf-split and gguf-py count
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True)
class Part:
    """One file: its key-values and tensors."""

    entries: Sequence[KeyValue]
    tensors: Sequence[TensorEntry]

    @property
    def bytes(self) -> int:
        return file_bytes(self.entries, self.tensors)


def size_in_bytes(text: str) -> int:
    """`2G`, `500M`, `64K` -> bytes. Raises ValueError for anything else: a bare number could mean any unit."""
    match = re.fullmatch(r"([0-9]+)([KMG])", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise ValueError(f"{text!r} is not a size")
    return int(match[1]) * UNITS[match[2]]


def size_text(size: int) -> str:
    """The smallest size in whole units that is not below `size` bytes: what `size_in_bytes` reads, 2227K or 31M."""
    unit = "K" if size < 10 * UNITS["M"] else "M"
    return f"{-(-size // UNITS[unit])}{unit}"


def smallest_limit(entries: Sequence[KeyValue], tensors: Sequence[TensorEntry]) -> tuple[int, str]:
    """The smallest limit that these tensors can be split to, in bytes, and the tensor that sets it.

    A part holds at least one tensor, and the first all metadata.
    """
    needs = [
        (_Room(entries if index == 0 else []).with_one(tensor), tensor.name) for index, tensor in enumerate(tensors)
    ]
    return max(needs)


def split(entries: Sequence[KeyValue], tensors: Sequence[TensorEntry], limit: int | None) -> list[Part]:
    """Cut the table of contents into parts of at most `limit` bytes; one plain file when it fits or there is no limit.

    Raises ValueError when a tensor does not fit, or there would be more parts than the format can count.
    """
    whole = Part(entries, tensors)
    if limit is None or whole.bytes <= limit:
        return [whole]
    least, name = smallest_limit(entries, tensors)
    if least > limit:
        raise ValueError(f"{name} needs a file of {size_text(least)}, the limit is {size_text(limit)}")
    groups: list[list[TensorEntry]] = [[]]
    room = _Room(entries)
    for tensor in tensors:
        if room.with_one(tensor) > limit:
            groups.append([])
            room = _Room([])
        groups[-1].append(tensor)
        room.add(tensor)
    if len(groups) > MOST_PARTS:
        raise ValueError(f"{len(groups)} parts are more than the {MOST_PARTS} that the format can count")
    return [
        Part([*(entries if index == 0 else []), *_marks(index, len(groups), len(tensors))], group)
        for index, group in enumerate(groups)
    ]


def split_problem(files: Sequence[GgufFile]) -> str | None:
    """Why these files, in order, are not the parts of one model; None when they are (a single plain file is)."""
    count = len(files)
    for index, file in enumerate(files):
        found = (file.values.get(SPLIT_NO, 0), file.values.get(SPLIT_COUNT, 1))
        if found != (index, count):
            told = f"part {found[0] + 1} of {found[1]}"
            return f"{file.path.name} says that it is {told}, its name says {index + 1} of {count}"
    tensors = sum(len(file.tensors) for file in files)
    wanted = files[0].values.get(SPLIT_TENSORS, tensors)
    return None if tensors == wanted else f"the parts hold {tensors} tensors, the first says {wanted}"


def _marks(index: int, count: int, tensors: int) -> list[KeyValue]:
    return [
        KeyValue(SPLIT_NO, "u16", index),
        KeyValue(SPLIT_COUNT, "u16", count),
        KeyValue(SPLIT_TENSORS, "i32", tensors),
    ]


class _Room:
    """How large a part is, tensor by tensor, without encoding its header again."""

    def __init__(self, entries: Sequence[KeyValue]) -> None:
        self._header = preamble_bytes([*entries, *_marks(0, 0, 0)])
        self._data = 0

    def with_one(self, tensor: TensorEntry) -> int:
        """Bytes of the file if `tensor` were added."""
        return padded(self._header + row_bytes(tensor)) + self._data + padded(tensor.bytes)

    def add(self, tensor: TensorEntry) -> None:
        self._header += row_bytes(tensor)
        self._data += padded(tensor.bytes)
