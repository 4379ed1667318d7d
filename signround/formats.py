"""Scheme names: the table from what a user types to the grid that is tuned.

    w4g32        4 bits, groups of 32, full-range symmetric, signed fp16 scales
    w4g128-asym  the same with an integer zero point a group
    w4gc         one group a row ("per channel")
    q4_0 ...     llama.cpp's types under their own names: legacy, K-quants (two-level scales), codebooks

What a *file format* can hold is the exporter's business (`Exporter.refusals`); this table only names grids.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace

from signround.errors import refuse
from signround.grid import Grid, SuperBlock

BITS = (2, 3, 4, 8)
GROUPS = (16, 32, 64, 128, 256)
_NAME = re.compile(r"w(\d+)g(\d+|c)(-asym)?")

_GGML = {
    "q4_0": Grid(bits=4, group=32),
    "q4_1": Grid(bits=4, group=32, zero="minimum"),
    "q5_0": Grid(bits=5, group=32),
    "q5_1": Grid(bits=5, group=32, zero="minimum"),
    "q8_0": Grid(bits=8, group=32, code_min=1),
    "q2_0": Grid(bits=2, group=64),
    "q2_k": Grid(bits=2, group=16, zero="minimum", super_block=SuperBlock(4, 16, signed=False)),
    "q3_k": Grid(bits=3, group=16, super_block=SuperBlock(6, 16, signed=True)),
    "q4_k": Grid(bits=4, group=32, zero="minimum", super_block=SuperBlock(6, 8, signed=False)),
    "q5_k": Grid(bits=5, group=32, zero="minimum", super_block=SuperBlock(6, 8, signed=False)),
    "q6_k": Grid(bits=6, group=16, super_block=SuperBlock(8, 16, signed=True)),
    "iq4_nl": Grid(bits=4, group=32, codebook="iq4"),
    "iq4_xs": Grid(bits=4, group=32, super_block=SuperBlock(6, 8, signed=True), codebook="iq4"),
    "mxfp4": Grid(bits=4, group=32, codebook="e2m1", power_of_two=True),
}


GRID_NAMES = "w{2,3,4,8}g{16,32,64,128,256,c}[-asym] and " + ", ".join(_GGML)
"""All of them, in a phrase for refusals."""


def scheme_names() -> list[str]:
    """Every scheme that `grid_for` accepts, in the order of the table."""
    groups = [*map(str, GROUPS), "c"]
    uniform = [f"w{bits}g{group}{asym}" for bits in BITS for group in groups for asym in ("", "-asym")]
    return uniform + list(_GGML)


def grid_for(scheme: str, zero_floor: int = 0) -> Grid:
    """The grid of a scheme. `zero_floor` is the lowest zero point a target can hold; it only touches `-asym`.

    Raises RefusedError for an unknown name, with the nearest known ones.
    """
    if scheme not in scheme_names():
        near = difflib.get_close_matches(scheme, scheme_names(), n=3) or ["w4g32", "w4g128-asym", "q4_0"]
        raise refuse(
            f"scheme {scheme!r} is not known; allowed are {GRID_NAMES}",
            f"did you mean {' or '.join(near)}? `signround schemes` lists them all",
        )
    if scheme in _GGML:
        return _GGML[scheme]
    match = _NAME.fullmatch(scheme)
    assert match is not None
    group = None if match[2] == "c" else int(match[2])
    grid = Grid(bits=int(match[1]), group=group, zero="point" if match[3] else "centre")
    return replace(grid, zero_floor=zero_floor) if grid.zero == "point" else grid
