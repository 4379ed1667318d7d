"""Large matrices in slices of whole rows: what is in memory at a time, a few slices (`signround/parallel.py`), has a
bound whatever the size of a tensor. (The rows of a template that are in another order are put in order whole.)

An embedding of 128256 x 4096 is half a gigabyte of codes, or one of bfloat16; read, checked and packed as a whole it
would be there several times over. Packing knows only single rows, so the file's bytes are the same however it is cut.
"""

from __future__ import annotations

from collections.abc import Iterator

SLICE = 1 << 22  # weights read at a time: large beside the cost of opening a file, small beside a process


def row_slices(rows: int, columns: int, together: int = 1) -> Iterator[range]:
    """The rows of a matrix in order, in slices of at most SLICE weights; `together` neighbouring rows (those of a head)
    never part, and are the least that a slice holds. `together` divides `rows`."""
    step = max(SLICE // (columns * together), 1) * together
    for start in range(0, rows, step):
        yield range(start, min(start + step, rows))
