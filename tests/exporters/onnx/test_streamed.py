"""Constants that are written piece by piece: the bytes of the whole, and no more than one piece at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporters.onnx import data_files
from exporters.onnx.builder import GraphBuilder
from exporters.onnx.data_files import save_chunks
from exporters.onnx.layouts import GENAI, Places
from exporters.onnx.linear import SLICE_WEIGHTS, slices
from exporters.onnx.packing import pack_bits
from exporters.onnx.reader import constant_array
from exporters.onnx.streamed import raw_bytes
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
        for data in raw_bytes(tensor):
            file.write(data.data)
    written = (tmp_path / "file").read_bytes()
    assert most == [0, 1, 1]  # the one before is still the writer's
    assert written == tensor.tobytes() == table.view(torch.uint8).numpy().tobytes()


def test_pieces_that_do_not_add_up_are_refused() -> None:
    tensor = GraphBuilder().streamed("table", ir.DataType.FLOAT, (4, 2), lambda: iter([np.zeros((3, 2), np.float32)]))
    assert tensor.const_value is not None
    with pytest.raises(ValueError, match="table must have 32 bytes, got 24"):
        list(raw_bytes(tensor.const_value))
    with pytest.raises(ValueError, match=r"must have shape \[4, 2\], got \(3, 2\)"):
        tensor.const_value.numpy()


@pytest.mark.parametrize("inline_bytes", [0, 1024])
@pytest.mark.parametrize("kind", ["INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8"])
def test_integers_come_back_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, inline_bytes: int
) -> None:
    """In the graph or at the end of the data file, with a ragged last byte; onnx_ir 0.1 unpacks neither right."""
    monkeypatch.setattr(data_files, "INLINE_BYTES", inline_bytes)
    dtype = ir.DataType[kind]
    half = 0 if kind.startswith("U") else 2 ** (dtype.bitwidth - 1)
    integers = (np.arange(21).reshape(3, 7) * 5 % 2**dtype.bitwidth - half).astype("u1" if half == 0 else "i1")
    fields = integers.view(np.uint8).reshape(1, -1) & np.uint8(2**dtype.bitwidth - 1)
    stored = integers if dtype.bitwidth == 8 else pack_bits(fields, dtype.bitwidth)[0]
    builder = GraphBuilder()
    table = builder.streamed("table", dtype, (3, 7), lambda: iter([stored]))
    builder.output(builder.op("Identity", "same", [table])[0], "output", dtype, [3, 7])
    model = builder.model("integers", 25, 13, "test", "0")
    places = Places(GENAI, "model.onnx", "model.onnx.data", None)
    save_chunks(model, [], tmp_path, places, lambda *_: None)
    assert (tmp_path / "model.onnx.data").exists() == (inline_bytes == 0)
    read = onnx.numpy_helper.to_array(onnx.load(tmp_path / "model.onnx").graph.initializer[0])
    assert np.array_equal(read.astype(np.int16), integers.astype(np.int16))
    assert np.array_equal(constant_array(ir.load(tmp_path / "model.onnx").graph.initializers["table"]), integers)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, SLICE_WEIGHTS), (3, 2 * SLICE_WEIGHTS), (1000, 30001)])
def test_slices_cover_the_rows(rows: int, columns: int) -> None:
    found = list(slices(rows, columns))
    assert [row for part in found for row in part] == list(range(rows))
    assert all(len(part) * columns <= SLICE_WEIGHTS or len(part) == 1 for part in found)
