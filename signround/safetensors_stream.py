"""Safetensors files laid out from shapes and filled one tensor at a time: sizes first, bytes later.

`safetensors.torch.save_file` needs every tensor of a file in memory at once; here only one is. It also (0.8) writes to
a `.tmpXXXXXX` of its own that a kill leaves behind for good, makes the file unreadable for other users (mode 600), and
reports a full disk as no OSError. The layout is the one that the library chooses (larger items first, so that every
tensor is aligned, then by name), hence the bytes are the same as `save_file`'s for the same tensors. Refuses to close
a file in which a tensor was left out.

    | u64 length of header | JSON header, padded with spaces to 8 | tensor | tensor | ...

Source: https://github.com/huggingface/safetensors (format section of the README).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch
from torch import Tensor

# The library's order: larger items first, equal sizes by its own rank of dtypes. Others are never written.
_DTYPES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES)}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor to come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class FileLayout:
    """One file: `header` (length word included) and the byte offset of every tensor."""

    specs: tuple[TensorSpec, ...]
    header: bytes
    offsets: dict[str, int]

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(spec.bytes for spec in self.specs)


def lay_out(specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> FileLayout:
    """Place `specs` in one file. Raises KeyError for a dtype that we never write."""
    ordered = tuple(sorted(specs, key=lambda spec: (_RANK[spec.dtype], spec.name)))
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    begin, begins = 0, {}
    for spec in ordered:
        end = begin + spec.bytes
        entries[spec.name] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
        begins[spec.name] = begin
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return FileLayout(ordered, header, {name: len(header) + offset for name, offset in begins.items()})


def split(modules: Sequence[Sequence[TensorSpec]], max_bytes: int) -> list[list[TensorSpec]]:
    """Distribute whole modules over files of at most `max_bytes` of tensors (one module may be larger), in order."""
    files: list[list[TensorSpec]] = []
    room = 0
    for module in modules:
        size = sum(spec.bytes for spec in module)
        if not files or size > room:
            files.append([])
            room = max_bytes
        files[-1].extend(module)
        room -= size
    return files


class SafetensorsWriter:
    """Fills a laid-out file in any order: `with SafetensorsWriter(path, layout) as file: file.write(name, tensor)`."""

    def __init__(self, path: Path, layout: FileLayout) -> None:
        self._path = path
        self.layout = layout
        self._specs = {spec.name: spec for spec in layout.specs}
        self._left = set(self._specs)
        self._stream: IO[bytes]

    def __enter__(self) -> Self:
        self._stream = open(self._path, "wb")
        try:
            self._stream.write(self.layout.header)
        except OSError:
            self._stream.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if error is None and self._left:
            raise ValueError(f"{self._path.name}: tensors were never written: {sorted(self._left)[:3]}")

    def write(self, name: str, tensor: Tensor) -> None:
        """Put the bytes of `tensor` (CPU) in their place. Raises ValueError when it is not as laid out."""
        spec = self._specs[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name} must be {spec.dtype} {spec.shape}, got {got}")
        self._stream.seek(self.layout.offsets[name])
        self._stream.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._left.remove(name)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write CPU tensors that are in memory as one file; equal tensors give equal bytes, whatever their order."""
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    with SafetensorsWriter(path, lay_out(specs, metadata)) as file:
        for spec in file.layout.specs:
            file.write(spec.name, tensors[spec.name])
