"""The GGUF container, version 3: header, key-values, tensor table, aligned data; written and read beside each other.

Layout (ggml/docs/gguf.md; all little endian):

    "GGUF" u32 version=3, u64 tensors, u64 key-values
    key-value:  string key, u32 type, value        string: u64 length, UTF-8 bytes
                array value: u32 element type, u64 length, elements
    tensor:     string name, u32 dimensions, u64 sizes (innermost first), u32 type, u64 offset from the data start
    padding to 32, then each tensor, padded to 32

Sizes come first and bytes later: the table is laid out from shapes, then one tensor at a time is written. Knows no
models, no quantisation types (a type is its id and its byte count), no big-endian files, no other version; a model in
several files is several of these (`splits.py`).
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from signround.parallel import in_order

ALIGNMENT = 32
VERSION = 3
MAGIC = b"GGUF"
SCALARS = {"u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i"),
           "f32": (6, "f"), "bool": (7, "?"), "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d")}  # fmt: skip
STRING, ARRAY = 8, 9
_FORMAT_OF = dict(SCALARS.values())
_KIND_OF = {code: kind for kind, (code, _) in SCALARS.items()} | {STRING: "string", ARRAY: "array"}


@dataclass(frozen=True)
class KeyValue:
    """`kind` is a key of SCALARS or "string"; a list value is an array of that kind. Read only: "array" for arrays of
    arrays."""

    key: str
    kind: str
    value: Any


@dataclass(frozen=True)
class TensorEntry:
    """`shape` outermost first (numpy's order); `type` is ggml's id; `bytes` the unpadded size of the data."""

    name: str
    shape: tuple[int, ...]
    type: int
    bytes: int


PartOfTensor = Callable[[], npt.NDArray[Any]]  # makes it, in any thread
PartsOf = Callable[[TensorEntry], Iterable[PartOfTensor]]


def padded(size: int) -> int:
    return size + -size % ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _values(kind: str, values: Sequence[Any]) -> bytes:
    if kind == "string":
        return b"".join(_string(value) for value in values)
    return struct.pack(f"<{len(values)}{SCALARS[kind][1]}", *values)


def _encoded(entry: KeyValue) -> bytes:
    code = STRING if entry.kind == "string" else SCALARS[entry.kind][0]
    if isinstance(entry.value, list):
        head = struct.pack("<IIQ", ARRAY, code, len(entry.value))
        return _string(entry.key) + head + _values(entry.kind, entry.value)
    return _string(entry.key) + struct.pack("<I", code) + _values(entry.kind, [entry.value])


def header(entries: Sequence[KeyValue], tensors: Sequence[TensorEntry]) -> bytes:
    """Everything before the tensor data, padding included."""
    parts = [_preamble(entries, len(tensors))]
    offset = 0
    for tensor in tensors:
        parts.append(_row(tensor, offset))
        offset += padded(tensor.bytes)
    raw = b"".join(parts)
    return raw + bytes(padded(len(raw)) - len(raw))


def _preamble(entries: Sequence[KeyValue], tensors: int) -> bytes:
    """Everything before the tensor table."""
    counts = struct.pack("<IQQ", VERSION, tensors, len(entries))
    return b"".join([MAGIC, counts, *(_encoded(entry) for entry in entries)])


def _row(tensor: TensorEntry, offset: int) -> bytes:
    """One row of the tensor table."""
    sizes = tensor.shape[::-1]
    return _string(tensor.name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, tensor.type, offset)


def preamble_bytes(entries: Sequence[KeyValue]) -> int:
    """Size of a header without its tensor table and padding."""
    return len(_preamble(entries, 0))


def row_bytes(tensor: TensorEntry) -> int:
    """Size of a tensor's row in the table."""
    return len(_row(tensor, 0))


def file_bytes(entries: Sequence[KeyValue], tensors: Sequence[TensorEntry]) -> int:
    """Size of the file that `write` makes."""
    return len(header(entries, tensors)) + sum(padded(tensor.bytes) for tensor in tensors)


def write(
    stream: IO[bytes],
    entries: Sequence[KeyValue],
    tensors: Sequence[TensorEntry],
    data: PartsOf,
) -> Iterator[TensorEntry]:
    """Write header and tensors; yields each entry after its data. `data` gives the parts of a tensor in their order;
    those to come, of the next tensors too, are made in threads while one is written."""
    stream.write(header(entries, tensors))
    jobs = (partial(_made, tensor, part) for tensor in tensors for part in data(tensor))
    with closing(in_order(jobs)) as parts:
        made = itertools.groupby(parts, key=itemgetter(0))
        for tensor in tensors:
            owner, own = next(made, (None, ()))
            if owner != tensor:
                raise ValueError(f"{tensor.name}: no parts where {tensor.bytes} bytes were announced")
            written = 0
            for _, raw in own:
                stream.write(raw.data)
                written += raw.nbytes
            if written != tensor.bytes:
                raise ValueError(f"{tensor.name}: {written} bytes where {tensor.bytes} were announced")
            stream.write(bytes(padded(tensor.bytes) - tensor.bytes))
            yield tensor


def _made(tensor: TensorEntry, part: PartOfTensor) -> tuple[TensorEntry, npt.NDArray[Any]]:
    return tensor, np.ascontiguousarray(part())


class GgufFile:
    """A GGUF file read lazily: key-values at birth, tensor bytes on demand. Raises ValueError when it is not one.
    `entries` are the key-values with their kinds, `values` the same by key.

    `type_bytes` maps a ggml type id to (elements, bytes) of its block.
    """

    def __init__(self, path: Path, type_bytes: Mapping[int, tuple[int, int]]) -> None:
        self.path = path
        self.entries: list[KeyValue] = []
        self.tensors: dict[str, TensorEntry] = {}
        self._offsets: dict[str, int] = {}
        self._size = path.stat().st_size
        with open(path, "rb") as stream:
            self._stream = stream
            if self._take(4) != MAGIC:
                raise ValueError("it does not start with GGUF")
            version, tensors, entries = self._numbers("IQQ")
            if version != VERSION:
                raise ValueError(f"it is GGUF version {version}, this reads {VERSION}")
            for _ in range(entries):
                self.entries.append(self._entry())
            for _ in range(tensors):
                self._tensor(type_bytes)
            self._start = padded(stream.tell())
        self.values: dict[str, Any] = {entry.key: entry.value for entry in self.entries}
        ends = [self._start + self._offsets[name] + entry.bytes for name, entry in self.tensors.items()]
        needed = max(ends, default=0)
        if self._size < needed:
            raise ValueError(f"it is cut short ({self._size} bytes, its tensors need {needed})")

    def data(self, name: str, part: int = 0, parts: int = 1) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, or those of one of its equal `parts`, read for this call: nothing of the file stays
        mapped."""
        size = self.tensors[name].bytes // parts
        return np.fromfile(self.path, np.uint8, size, offset=self._start + self._offsets[name] + part * size)

    def rows(self, name: str, first: int, last: int) -> npt.NDArray[np.uint8]:
        """uint8 [last - first, bytes a row]: some rows of a matrix or of a stack of them, as `data` reads."""
        entry = self.tensors[name]
        row = entry.bytes // math.prod(entry.shape[:-1])
        start = self._start + self._offsets[name] + first * row
        return np.fromfile(self.path, np.uint8, (last - first) * row, offset=start).reshape(last - first, row)

    def _take(self, count: int) -> bytes:
        raw = self._stream.read(count) if count <= self._size else b""  # a damaged length must not ask for memory
        if len(raw) != count:
            raise ValueError("its header is cut short")
        return raw

    def _numbers(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{layout}", self._take(struct.calcsize(f"<{layout}")))

    def _text(self) -> str:
        return self._take(self._numbers("Q")[0]).decode()

    def _entry(self) -> KeyValue:
        key, code = self._text(), self._numbers("I")[0]
        if code == ARRAY:
            element, values = self._array()
            return KeyValue(key, _KIND_OF[element], values)
        return KeyValue(key, _KIND_OF.get(code, ""), self._value(code))

    def _value(self, code: int) -> Any:
        if code == STRING:
            return self._text()
        if code == ARRAY:
            return self._array()[1]
        return self._numbers(self._format(code))[0]

    def _array(self) -> tuple[int, list[Any]]:
        """Type of the elements, and the elements."""
        element, count = self._numbers("IQ")
        if count > self._size:
            raise ValueError("its header is cut short")
        if element in (STRING, ARRAY):
            return element, [self._value(element) for _ in range(count)]
        return element, list(self._numbers(f"{count}{self._format(element)}"))

    def _format(self, code: int) -> str:
        if code not in _FORMAT_OF:
            raise ValueError(f"it holds a value of unknown type {code}")
        return _FORMAT_OF[code]

    def _tensor(self, type_bytes: Mapping[int, tuple[int, int]]) -> None:
        name = self._text()
        dimensions = self._numbers("I")[0]
        *sizes, kind, offset = self._numbers(f"{dimensions}QIQ")
        if kind not in type_bytes:
            raise ValueError(f"tensor {name} has type {kind}, which this release does not write")
        elements, size = type_bytes[kind]
        self.tensors[name] = TensorEntry(name, tuple(sizes[::-1]), kind, math.prod(sizes) // elements * size)
        self._offsets[name] = offset
