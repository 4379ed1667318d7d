"""Our importance matrix in llama.cpp's own quantiser: same names, same lengths, same weights, so the same blocks."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from exporters.gguf.imatrix import imatrix_of, read_imatrix, write_imatrix
from runtime_tests.gguf_floats import float_plan, write_float_gguf
from signround.checkpoint import SourceCheckpoint
from signround.importance import Importance, InputSquares
from tests import ggml
from tests.small_models import write_small_model

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: xllamacpp has no llama_model_quantize")

Q4_0, FILE_Q4_0 = 2, 2


def quantized_by_llama_cpp(source: Path, target: Path, imatrix: Path | None) -> dict[str, np.ndarray]:
    """Run `llama_model_quantize` as the `llama-quantize` tool does with `--pure --imatrix`: name -> raw blocks."""
    from gguf import GGUFReader

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype, parameters.pure = 1, FILE_Q4_0, True
    entries = read_imatrix(imatrix).entries if imatrix else {}
    held = {name: np.ascontiguousarray(squares.means().numpy()) for name, squares in entries.items()}
    table = (llama_cpp.llama_model_imatrix_data * (len(held) + 1))()
    for row, (name, values) in zip(table, held.items(), strict=False):
        row.name, row.size = name.encode(), values.size
        row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if held:
        parameters.imatrix = table
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)) == 0
    reader = GGUFReader(target)
    assert {int(tensor.tensor_type) for tensor in reader.tensors} == {0, Q4_0}
    return {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def test_llama_cpp_quantises_with_it(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "qwen2", tokenizer="qwen2")  # q and k keep the order of their rows
    plain = write_float_gguf(model, tmp_path / "float.gguf")
    checkpoint = SourceCheckpoint(model)
    matrices = {kept.name: kept.shape[1] for kept in float_plan(checkpoint).kept() if len(kept.shape) > 1}
    generator = torch.Generator().manual_seed(1)
    squares = {
        name: InputSquares(torch.rand(1, columns, generator=generator) ** 4 * 50, torch.tensor([321]))
        for name, columns in matrices.items()
    }
    imatrix = imatrix_of(Importance(squares, "text", 3, 107))
    write_imatrix(tmp_path / "i.gguf", imatrix)
    without = quantized_by_llama_cpp(plain, tmp_path / "without.gguf", None)
    found = quantized_by_llama_cpp(plain, tmp_path / "with.gguf", tmp_path / "i.gguf")
    assert set(imatrix.entries) < set(found)
    for name in matrices:
        stored = next(iter(imatrix_of(Importance({name: squares[name]}, "", 1, 1)).entries))
        wanted = ggml.quantize_chunk("q4_0", checkpoint.read(name).float().numpy(), squares[name].means().numpy()[0])
        assert np.array_equal(found[stored], wanted), name
        assert not np.array_equal(found[stored], without[stored]), name
