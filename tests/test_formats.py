"""The scheme table."""

from __future__ import annotations

import pytest

from signround.errors import RefusedError
from signround.formats import BITS, GROUPS, grid_for, scheme_names
from signround.grid import Grid


def test_every_name_has_a_grid_and_names_are_unique() -> None:
    names = scheme_names()
    assert len(names) == len(set(names)) == len(BITS) * (len(GROUPS) + 1) * 2 + 14
    assert len({grid_for(name) for name in names}) == len(names) - 2  # w4g32 is q4_0, w2g64 is q2_0


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("w4g32", Grid(bits=4, group=32)),
        ("w2g64-asym", Grid(bits=2, group=64, zero="point")),
        ("w3gc", Grid(bits=3, group=None)),
        ("w8gc-asym", Grid(bits=8, group=None, zero="point")),
        ("q4_0", Grid(bits=4, group=32)),
        ("q4_1", Grid(bits=4, group=32, zero="minimum")),
        ("q8_0", Grid(bits=8, group=32, code_min=1)),
    ],
)
def test_names_mean_what_they_say(name: str, grid: Grid) -> None:
    assert grid_for(name) == grid


def test_the_zero_floor_touches_asymmetric_grids_only() -> None:
    for name in scheme_names():
        assert grid_for(name, zero_floor=1).zero_floor == (1 if name.endswith("-asym") else 0)


@pytest.mark.parametrize(
    "name", ["", "w4", "w5g32", "w4g48", "w4g32-sym", "W4G32", "w4g32 ", "q4_2", "w44g32", "w4g032"]
)
def test_unknown_names_are_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(RefusedError) as caught:
        grid_for(name)
    sentence = str(caught.value)
    assert repr(name) in sentence
    assert "did you mean" in sentence
    assert "signround schemes" in sentence


def test_a_typing_slip_finds_its_neighbour() -> None:
    with pytest.raises(RefusedError, match="w4g128-asym"):
        grid_for("w4g128asym")
