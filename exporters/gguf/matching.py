"""Find for every tensor of a float GGUF file the rows of the checkpoint that it was made of, by comparing values.

A row is known by the hash of its bytes after the cast to the file's dtype, so permuted, fused, split and stacked matrices
are found alike, in one pass over each file with one tensor in memory. Vectors are compared whole, as they are or with 1
added (Gemma's norms); a bias may follow the rows of its matrix. Columns must be in order: groups along the inputs would
not survive anything else, and transposed or rescaled matrices are therefore not found.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Origin:
    """The checkpoint's tensors that a GGUF tensor holds, laid one after the other, with their shapes; `rows[i]` is the
    row of that pile which became row i (None: all, in order; an element is a row of a vector). `added` was added."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    rows: Rows | None = None
    added: float = 0.0


@dataclass(frozen=True)
class FloatTensor:
    """A tensor of the file: its shape (outermost first) and its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Matching:
    """`origins` by GGUF name; `strange`: tensors of the file without an origin; `missing`: tensors of the checkpoint
    that the file does not hold, or not wholly."""

    origins: Mapping[str, Origin]
    strange: tuple[str, ...]
    missing: tuple[str, ...]


def row_count(shape: Sequence[int]) -> int:
    """Rows as `Origin` counts them: of a matrix or a stack of matrices, or the elements of a vector."""
    return math.prod(shape[:-1]) if len(shape) > 1 else shape[0]


def row_hashes(tensor: Tensor) -> Hashes:
    """uint64 [rows]: the hash of each row's bytes; a vector is one row."""
    raw = tensor.contiguous().view(torch.uint8).numpy().reshape(math.prod(tensor.shape[:-1]), -1)
    digests = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in raw)
    return np.frombuffer(digests, np.uint64)


@dataclass
class _Index:
    """Rows of one dtype and one length, of several tensors: sorted by hash once, then searched."""

    owners: list[int] = field(default_factory=list)
    hashes: list[Hashes] = field(default_factory=list)
    _sorted: tuple[Hashes, Rows, Rows] | None = None

    def add(self, owner: int, hashes: Hashes) -> None:
        self.owners.append(owner)
        self.hashes.append(hashes)

    def of(self, owner: int) -> Hashes:
        return self.hashes[self.owners.index(owner)]

    def find(self, wanted: Hashes) -> tuple[Rows, Rows, Rows, Rows]:
        """(first, last) into (owner, row) of the rows that have each hash."""
        if self._sorted is None:
            every = np.concatenate(self.hashes)
            owner = np.concatenate([np.full(len(part), index) for index, part in zip(self.owners, self.hashes)])  # noqa: B905  # same length
            row = np.concatenate([np.arange(len(part)) for part in self.hashes])
            order = np.argsort(every, kind="stable")
            self._sorted = every[order], owner[order], row[order]
        every, owner, row = self._sorted
        return np.searchsorted(every, wanted, "left"), np.searchsorted(every, wanted, "right"), owner, row


class RowMatcher:
    """Matches the tensors of one file. `names` with their shapes are the checkpoint's, `read` gives one of them."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], dtypes: Iterable[torch.dtype]
    ) -> None:
        self._names = list(shapes)
        self._shapes = [shapes[name] for name in self._names]
        self._read = read
        self._indexes: dict[tuple[torch.dtype, int], _Index] = {}
        self._vectors: dict[tuple[int, int], list[tuple[int, float]]] = {}
        self._covered = [np.zeros(row_count(shape), bool) for shape in self._shapes]
        matrix_dtypes = list(dict.fromkeys(dtypes))
        for owner, name in enumerate(self._names):
            self._add(owner, read(name), matrix_dtypes)

    def _add(self, owner: int, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
        if tensor.ndim == 1:
            for more in (0.0, 1.0):
                key = tensor.numel(), int(row_hashes(tensor.float() + more)[0])
                self._vectors.setdefault(key, []).append((owner, more))
            return
        for dtype in dtypes:
            index = self._indexes.setdefault((dtype, tensor.shape[-1]), _Index())
            index.add(owner, row_hashes(tensor.to(dtype)))

    def match(self, tensors: Sequence[FloatTensor], data: Callable[[str], Tensor]) -> Matching:
        """`data` gives the tensor of the file by name, in its dtype and shape."""
        origins: dict[str, Origin] = {}
        strange = []
        for tensor in sorted(tensors, key=lambda tensor: len(tensor.shape) == 1):  # biases after their matrices
            found = self._origin(tensor, data(tensor.name), origins)
            if found is None:
                strange.append(tensor.name)
            else:
                origins[tensor.name] = found
                self._cover(found)
        missing = [name for name, covered in zip(self._names, self._covered, strict=True) if not covered.all()]
        return Matching(origins, tuple(strange), tuple(missing))

    def _origin(self, tensor: FloatTensor, values: Tensor, known: Mapping[str, Origin]) -> Origin | None:
        if len(tensor.shape) == 1:
            return self._vector(tensor.name, values) or self._bias(tensor.name, values, known)
        index = self._indexes.get((tensor.dtype, tensor.shape[-1]))
        return None if index is None else self._matrix(tensor.name, row_hashes(values), index)

    def _matrix(self, name: str, wanted: Hashes, index: _Index) -> Origin | None:
        first, last, owners, rows = index.find(wanted)
        if not bool((first < last).all()):
            return None
        whole = [
            int(owner)
            for owner in dict.fromkeys(owners[first[0] : last[0]].tolist())
            if np.array_equal(index.of(int(owner)), wanted)
        ]
        if whole:
            return self._made([self._likeliest(name, whole)], None)
        owner, row = owners[first].copy(), rows[first].copy()
        repeated = np.flatnonzero(last - first > 1)
        common = np.bincount(owner[last - first == 1], minlength=len(self._names))
        taken = set(zip(owner.tolist(), row.tolist(), strict=True)) if not len(repeated) else set()
        for at in repeated.tolist():
            choices = [(int(owners[place]), int(rows[place])) for place in range(first[at], last[at])]
            choice = min(choices, key=lambda one: (one in taken, -common[one[0]], one))
            taken.add(choice)
            owner[at], row[at] = choice
        order = list(dict.fromkeys(owner.tolist()))
        starts = dict(zip(order, np.cumsum([0, *(row_count(self._shapes[one]) for one in order[:-1])]), strict=True))
        return self._made(order, row + np.array([starts[one] for one in owner.tolist()]))

    def _vector(self, name: str, values: Tensor) -> Origin | None:
        found = self._vectors.get((values.numel(), int(row_hashes(values.float())[0])), [])
        if not found:
            return None
        more = min(more for _, more in found)
        owner = self._likeliest(name, [owner for owner, added in found if added == more])
        origin = self._made([owner], None)
        return Origin(origin.names, origin.shapes, None, more)

    def _bias(self, name: str, values: Tensor, known: Mapping[str, Origin]) -> Origin | None:
        matrix = known.get(name.removesuffix(".bias") + ".weight")
        if matrix is None or not name.endswith(".bias"):
            return None
        names = [weight.removesuffix(".weight") + ".bias" for weight in matrix.names]
        if not set(names) <= set(self._names):
            return None
        pile = torch.cat([self._read(bias).float() for bias in names])
        moved = pile if matrix.rows is None else pile[torch.from_numpy(matrix.rows)]
        same = torch.equal(moved, values.float())
        return self._made([self._names.index(bias) for bias in names], matrix.rows) if same else None

    def _likeliest(self, name: str, owners: Sequence[int]) -> int:
        """Among tensors of equal values: one that is not placed yet, of the same block."""
        block = _BLOCK.search(name)

        def unlikeliness(owner: int) -> tuple[bool, bool, int]:
            other = _BLOCK.search(self._names[owner])
            same = (block and block[1]) == (other and other[1])
            return bool(self._covered[owner].all()), not same, owner

        return min(owners, key=unlikeliness)

    def _made(self, owners: Sequence[int], rows: Rows | None) -> Origin:
        shapes = tuple(self._shapes[owner] for owner in owners)
        everything = sum(map(row_count, shapes))
        if rows is not None and np.array_equal(rows, np.arange(everything)):
            rows = None
        return Origin(tuple(self._names[owner] for owner in owners), shapes, rows)

    def _cover(self, origin: Origin) -> None:
        start = 0
        for name, shape in zip(origin.names, origin.shapes, strict=True):
            covered = self._covered[self._names.index(name)]
            rows = np.arange(len(covered)) if origin.rows is None else origin.rows - start
            covered[rows[(rows >= 0) & (rows < len(covered))]] = True
            start += row_count(shape)


def parts(origin: Origin) -> list[tuple[str, Rows, Rows]]:
    """(checkpoint name, rows of the GGUF tensor, rows of the checkpoint's tensor), the inverse reading of an origin."""
    found = []
    start = 0
    total = sum(map(row_count, origin.shapes))
    rows: Any = np.arange(total) if origin.rows is None else origin.rows
    for name, shape in zip(origin.names, origin.shapes, strict=True):
        here = np.flatnonzero((rows >= start) & (rows < start + row_count(shape)))
        found.append((name, here, rows[here] - start))
        start += row_count(shape)
    return found
