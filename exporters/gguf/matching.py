"""Find for every tensor of a float GGUF file the rows of the checkpoint that it was made of, by comparing values.

A row is known by the hash of its bytes after the cast to the file's dtype, so permuted, fused, split and stacked
matrices are found alike, in one pass over each file with one tensor in memory. Vectors are compared whole, as they are
or with 1 added (Gemma's norms); a bias may follow the rows of its matrix. Columns must be in order: groups along the
inputs would not survive anything else, and transposed or rescaled matrices are therefore not found.
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
    digests = b"".join(hashlib.blake2b(row.data, digest_size=8).digest() for row in raw)
    return np.frombuffer(digests, np.uint64)


@dataclass
class _Index:
    """Rows of one dtype and one length, of several tensors: sorted by hash once, then searched."""

    hashes: dict[int, Hashes] = field(default_factory=dict)
    starting: dict[int, list[int]] = field(default_factory=dict)  # hash of the first row -> tensors
    _sorted: tuple[Hashes, Rows, Rows] | None = None

    def find(self, wanted: Hashes) -> tuple[Rows, Rows, Rows, Rows]:
        """(first, last) into (owner, row) of the rows that have each hash."""
        if self._sorted is None:
            every = np.concatenate(list(self.hashes.values()))
            owner = np.concatenate([np.full(len(part), index) for index, part in self.hashes.items()])
            row = np.concatenate([np.arange(len(part)) for part in self.hashes.values()])
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
        self._place = {name: index for index, name in enumerate(self._names)}
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
            index.hashes[owner] = row_hashes(tensor.to(dtype))
            index.starting.setdefault(int(index.hashes[owner][0]), []).append(owner)

    def match(self, tensors: Sequence[FloatTensor], data: Callable[[str], Tensor]) -> Matching:
        """`data` gives the tensor of the file by name, in its dtype and shape."""
        origins: dict[str, Origin] = {}
        vectors = [tensor for tensor in tensors if len(tensor.shape) == 1]
        hashes = {tensor: row_hashes(data(tensor.name)) for tensor in tensors if len(tensor.shape) > 1}
        # Whole tensors first, so that equal rows elsewhere (of zeros) find theirs untaken; biases after their matrices.
        for search in (self._whole, self._rows):
            for tensor in [tensor for tensor in hashes if tensor.name not in origins]:
                index = self._indexes.get((tensor.dtype, tensor.shape[-1]))
                self._note(origins, tensor, None if index is None else search(tensor.name, hashes[tensor], index))
        for tensor in vectors:
            values = data(tensor.name)
            self._note(origins, tensor, self._vector(tensor.name, values) or self._bias(tensor.name, values, origins))
        strange = tuple(tensor.name for tensor in tensors if tensor.name not in origins)
        missing = [name for name, covered in zip(self._names, self._covered, strict=True) if not covered.all()]
        return Matching(origins, strange, tuple(missing))

    def _note(self, origins: dict[str, Origin], tensor: FloatTensor, found: Origin | None) -> None:
        if found is None:
            return
        origins[tensor.name] = found
        for name, _, rows in parts(found):
            self._covered[self._place[name]][rows] = True

    def _whole(self, name: str, wanted: Hashes, index: _Index) -> Origin | None:
        """A tensor that is one of the checkpoint's as it is."""
        starting = index.starting.get(int(wanted[0]), [])
        same = [owner for owner in starting if np.array_equal(index.hashes[owner], wanted)]
        return self._made([self._likeliest(name, same)], None) if same else None

    def _rows(self, name: str, wanted: Hashes, index: _Index) -> Origin | None:
        first, last, owners, rows = index.find(wanted)
        if not bool((first < last).all()):
            return None
        owner, row = owners[first].copy(), rows[first].copy()
        single = last - first == 1
        common = np.bincount(owner[single], minlength=len(self._names))
        taken = set(zip(owner[single].tolist(), row[single].tolist(), strict=True))
        for at in np.flatnonzero(~single).tolist():  # equal rows: each once, of the tensor that most others come from
            choices = [(int(owners[place]), int(rows[place])) for place in range(first[at], last[at])]
            choice = min(choices, key=lambda one: (one in taken or self._covered[one[0]][one[1]], -common[one[0]], one))
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
        if not self._place.keys() >= set(names):
            return None
        pile = torch.cat([self._read(bias).float() for bias in names])
        moved = pile if matrix.rows is None else pile[torch.from_numpy(matrix.rows)]
        same = torch.equal(moved, values.float())
        return self._made([self._place[bias] for bias in names], matrix.rows) if same else None

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
