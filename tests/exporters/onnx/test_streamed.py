"""Constants that are written piece by piece: the bytes of the whole, and no more than one piece at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporters.onnx.builder import GraphBuilder
from exporters.onnx.linear import SLICE_WEIGHTS, slices
from exporters.onnx.tensors import to_numpy

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pieces_are_the_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    table = torch.randn(7, 33).to(dtype)
    stored = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16}.get(dtype, ir.DataType.BFLOAT16)
    alive: list[weakref.ref[np.ndarray]] = []
    most: list[int] = []

    def pieces() -> Iterator[np.ndarray]:
        for start in range(0, 7, 3):
            most.append(sum(reference() is not None for reference in alive))
            piece = to_numpy(table[start : start + 3]).copy()
            alive.append(weakref.ref(piece))
            yield piece

    tensor = GraphBuilder().streamed("table", stored, (7, 33), pieces).const_value
    assert tensor is not None
    with open(tmp_path / "file", "wb") as file:
        tensor.tofile(file)
    written = (tmp_path / "file").read_bytes()
    assert most == [0, 1, 1]  # the one before is still the writer's
    assert written == tensor.tobytes() == table.view(torch.uint8).numpy().tobytes()


def test_pieces_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    tensor = GraphBuilder().streamed("table", ir.DataType.FLOAT, (4, 2), lambda: iter([np.zeros((3, 2), np.float32)]))
    assert tensor.const_value is not None
    with open(tmp_path / "file", "wb") as file, pytest.raises(ValueError, match="must have 32 bytes, got 24"):
        tensor.const_value.tofile(file)
    with pytest.raises(ValueError, match=r"must have shape \[4, 2\], got \(3, 2\)"):
        tensor.const_value.numpy()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, SLICE_WEIGHTS), (3, 2 * SLICE_WEIGHTS), (1000, 30001)])
def test_slices_cover_the_rows(rows: int, columns: int) -> None:
    found = list(slices(rows, columns))
    assert [row for part in found for row in part] == list(range(rows))
    assert all(len(part) * columns <= SLICE_WEIGHTS or len(part) == 1 for part in found)
