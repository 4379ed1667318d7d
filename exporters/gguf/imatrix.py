"""Importance matrix files of llama.cpp: written in its GGUF form, read in that form and in the older `.dat` form.

GGUF form (`tools/imatrix/imatrix.cpp`, `common/imatrix-loader.cpp`), byte for byte what `llama-imatrix` writes:

    general.type = "imatrix", imatrix.datasets [strings], imatrix.chunk_count u32, imatrix.chunk_size u32
    for each weight, names sorted: <gguf name>.in_sum2 F32 [experts, columns], <gguf name>.counts F32 [experts, 1]
    (one dimension each when there is one expert)

`.dat` form, int32 little endian: entries; each: name length, name, n, values, float32 values (mean square times n);
then optionally the number of chunks, and the length and name of the data set.

Stacked experts are one GGUF tensor, whatever the checkpoint calls its parts. Rows of q and k that llama.cpp reorders
have the same inputs, so nothing is reordered here. Never invents a number: what is missing or of another length is
refused by name.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from exporters.gguf.container import MAGIC, GgufFile, KeyValue, TensorEntry, write
from signround.errors import Refusal, RefusedError, refuse
from signround.files import written_whole
from signround.gguf_names import gguf_name
from signround.importance import Importance, InputSquares

F32 = 0
SUMS, COUNTS, PLAIN_SUMS = ".in_sum2", ".counts", ".in_sum"  # the last: sums of the inputs themselves, not used
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
STACKED = "_exps."  # in the name of every tensor that is a stack of experts
LONGEST_NAME = 256  # ggml's names have 64 bytes at most
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Imatrix:
    """What a file holds: GGUF tensor name -> squares, and where they come from. `chunk_size` is 0 for `.dat` files,
    which do not know it; their squares are one row even when the tensor is a stack of experts."""

    entries: Mapping[str, InputSquares]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write the GGUF form, whole or absent. Raises FailedError when the disk is full."""
    metadata = [
        KeyValue("general.type", "string", "imatrix"),
        KeyValue(DATASETS, "string", list(imatrix.datasets)),
        KeyValue(CHUNK_COUNT, "u32", imatrix.chunk_count),
        KeyValue(CHUNK_SIZE, "u32", imatrix.chunk_size),
    ]
    table, arrays = [], {}
    for name in sorted(imatrix.entries, key=str.encode):
        squares = imatrix.entries[name]
        experts, columns = squares.sums.shape
        one = experts == 1
        table.append(TensorEntry(name + SUMS, (columns,) if one else (experts, columns), F32, experts * columns * 4))
        table.append(TensorEntry(name + COUNTS, (1,) if one else (experts, 1), F32, experts * 4))
        arrays[name + SUMS] = squares.sums.numpy().astype("<f4")
        arrays[name + COUNTS] = squares.counts.numpy().astype("<f4")
    with written_whole(path) as temporary, open(temporary, "wb") as stream:
        for _ in write(stream, metadata, table, lambda entry: [partial(arrays.__getitem__, entry.name)]):
            pass


def read_imatrix(path: Path) -> Imatrix:
    """Read either form. Raises RefusedError when there is no such file, it is none, or a statistic is impossible."""
    if not path.is_file():
        raise refuse("no such importance matrix", "check the path", str(path))
    try:
        with open(path, "rb") as stream:
            is_gguf = stream.read(len(MAGIC)) == MAGIC
        return _read_gguf(path) if is_gguf else _read_dat(path.read_bytes())
    except (OSError, ValueError) as error:
        raise refuse(
            f"not a usable importance matrix ({error})",
            "give the .gguf or .dat file that llama-imatrix or signround wrote",
            str(path),
        ) from error


def imatrix_of(importance: Importance, experts: int = 1) -> Imatrix:
    """Checkpoint names to GGUF names; the `experts` of a model, which have names of their own, become one stack.

    An expert that nothing was measured for has zeros, as in `llama-imatrix`. Raises KeyError for a name that GGUF has
    no place for.
    """
    stacks: dict[str, dict[int, InputSquares]] = {}
    for name, squares in importance.squares.items():
        stacks.setdefault(gguf_name(name), {})[_expert(name) or 0] = squares
    entries = {}
    for name, stack in stacks.items():
        columns = next(iter(stack.values())).sums.shape[1]
        nothing = (torch.zeros(1, columns), torch.zeros(1, dtype=torch.int64))
        count = max(experts, max(stack) + 1) if STACKED in name else 1
        parts = [(stack[index].sums, stack[index].counts) if index in stack else nothing for index in range(count)]
        entries[name] = InputSquares(torch.cat([sums for sums, _ in parts]), torch.cat([counts for _, counts in parts]))
    return Imatrix(entries, (importance.dataset,), importance.chunks, importance.chunk_size)


def importance_of(imatrix: Imatrix, columns: Mapping[str, int], subject: str) -> Importance:
    """GGUF names to checkpoint names, for the weights in `columns` (name -> number of inputs).

    Weights outside the blocks (embedding, head) may be absent: `llama-imatrix` leaves them out by default. Raises
    RefusedError, `subject` being the file, when others are missing or lengths differ: the file is of another model.
    """
    squares, missing, misfits = {}, [], []
    for name, count in columns.items():
        stored = gguf_name(name)
        if stored not in imatrix.entries:
            if stored.startswith("blk."):
                missing.append(stored)
            continue
        found = _shaped(imatrix.entries[stored], count, _expert(name), stacked=STACKED in stored)
        if found is None:
            length = imatrix.entries[stored].sums.shape[1]
            misfits.append(f"{stored} has {length} values, the model needs {count}")
        else:
            squares[name] = found
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(columns)} weights are missing ({', '.join(_few(missing))})")
    if misfits:
        problems.append(f"it is of another model: {'; '.join(_few(misfits))}")
    if problems:
        next_step = "give the importance matrix of this model, or leave it out to have it measured"
        raise RefusedError([Refusal(problem, next_step, subject) for problem in problems])
    return Importance(squares, ", ".join(imatrix.datasets), imatrix.chunk_count, imatrix.chunk_size)


def _few(items: list[str]) -> list[str]:
    return items if len(items) <= 3 else [*items[:3], "..."]


def _expert(name: str) -> int | None:
    """The number of the expert that a checkpoint weight belongs to; None for a weight that is no single expert."""
    match = _EXPERT.search(name)
    return None if match is None else int(match[1])


def _shaped(squares: InputSquares, columns: int, expert: int | None, *, stacked: bool) -> InputSquares | None:
    """As [experts, columns], or the one row of `expert`; None when the length does not fit.

    A stack that was written as one row (`.dat`) has one count for all its experts.
    """
    rows, length = squares.sums.shape
    if rows > 1 and not stacked:
        return None
    if length != columns:
        if not stacked or rows > 1 or length % columns:
            return None
        stack = length // columns
        squares = InputSquares(squares.sums.reshape(stack, columns), squares.counts.repeat(stack))
    if expert is None:
        return squares
    if expert >= len(squares.sums):
        return None
    if int(squares.counts[expert]) == 0:  # an expert alone needs a count: the ones that `means` would give
        return InputSquares(torch.ones(1, columns), torch.ones(1, dtype=torch.int64))
    return InputSquares(squares.sums[expert : expert + 1], squares.counts[expert : expert + 1])


def _squares(name: str, sums: npt.NDArray[Any], counts: npt.NDArray[Any]) -> InputSquares:
    """Checked at birth; the error names the tensor."""
    if not (np.isfinite(counts).all() and len(counts) and len(sums) % len(counts) == 0):
        raise ValueError(f"{name}: {len(sums)} sums do not go with counts {counts[:3].tolist()}")
    if not (counts > 0).any():
        raise ValueError(f"{name}: no token reached the weight (all counts are zero or negative)")
    whole = torch.from_numpy((counts + 0.5).astype(np.int64))  # counts are whole numbers in float32
    try:
        return InputSquares(torch.from_numpy(sums.astype(np.float32)).reshape(len(counts), -1), whole)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _read_gguf(path: Path) -> Imatrix:
    file = GgufFile(path, {F32: (1, 4)})
    kind = file.values.get("general.type")
    if kind != "imatrix":
        raise ValueError(f"its general.type is {kind!r}, not 'imatrix'")
    for key in (DATASETS, CHUNK_COUNT, CHUNK_SIZE):
        if key not in file.values:
            raise ValueError(f"{key} is missing")
    if not file.tensors:
        raise ValueError("it holds no tensors")
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    expected = {name + suffix for name in names for suffix in (SUMS, COUNTS)}
    odd = expected ^ {name for name in file.tensors if not name.endswith(PLAIN_SUMS)}
    if odd:
        raise ValueError(f"sums and counts do not go together ({sorted(odd)[0]})")
    entries = {}
    for name in names:
        sums, counts = (file.data(name + suffix).view("<f4") for suffix in (SUMS, COUNTS))
        entries[name] = _squares(name, sums, counts)
    values = file.values
    return Imatrix(entries, tuple(values[DATASETS]), values[CHUNK_COUNT], values[CHUNK_SIZE])


class _Dat:
    """The bytes of a `.dat` file and a place in them. Raises ValueError past the end."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.raw):
            raise ValueError("it does not start with GGUF, and as a .dat file it is cut short or damaged")
        self.at += count
        return self.raw[self.at - count : self.at]

    def number(self) -> int:
        value: int = struct.unpack("<i", self.take(4))[0]
        return value

    def name(self) -> str:
        length = self.number()
        if not 0 <= length <= LONGEST_NAME:
            raise ValueError(f"it does not start with GGUF, and as a .dat file it has a name of {length} bytes")
        return self.take(length).decode()


def _read_dat(raw: bytes) -> Imatrix:
    data = _Dat(raw)
    count = data.number()
    if count < 1:
        raise ValueError("it does not start with GGUF, and as a .dat file it has no entries")
    entries = {}
    for _ in range(count):
        name = data.name()
        calls, length = data.number(), data.number()
        values = np.frombuffer(data.take(4 * length), "<f4")
        if not length:
            raise ValueError(f"{name}: it has no values")
        entries[name] = _squares(name, values, np.array([calls]))
    chunks = data.number() if data.at < len(raw) else 0
    dataset = data.take(data.number()).decode() if data.at < len(raw) else ""
    return Imatrix(entries, (dataset,) if dataset else (), chunks, 0)
