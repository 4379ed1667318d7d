"""The peer of our benchmark: llama.cpp's own quantiser, called as the benchmark calls it. Needs llama-cpp-python."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gguf_vs_llama_quantize import tensor_types
from benchmarks.llama_quantize import collect_importance, quantize
from exporters.gguf.container import GgufFile
from exporters.gguf.imatrix import Imatrix
from exporters.gguf.layout import TYPE_BYTES
from runtime_tests.gguf_floats import write_float_gguf
from tests import ggml
from tests.small_models import write_small_model

if importlib.util.find_spec("llama_cpp") is None:
    pytest.skip("needs llama-cpp-python", allow_module_level=True)

Made = tuple[Path, Imatrix]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 320}
    model = write_small_model(folder / "model", "llama", layers=1, **sizes)
    windows = torch.randint(3, 320, (4, 32), generator=torch.Generator().manual_seed(3))
    return write_float_gguf(model, folder / "float.gguf"), collect_importance(model, windows, "random tokens")


@pytest.mark.skipif(not ggml.available(), reason="needs xllamacpp, which carries ggml's C code")
@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "q2_k", "iq4_xs"])
def test_it_is_ggml_with_our_importance(kind: str, made: Made, tmp_path: Path) -> None:
    """The file's blocks are those of `ggml_quantize_chunk` with the same importance: each name reached its tensor."""
    source, imatrix = made
    target = tmp_path / "quantised.gguf"
    name = "blk.0.ffn_down.weight"
    quantize(source, target, "q4_0", imatrix, {name: ggml.IDS[kind]})
    weight = GgufFile(source, TYPE_BYTES).data(name).view(np.float32).reshape(256, 512)
    importance = imatrix.entries[name].means()[0].numpy()
    wanted = ggml.quantize_chunk(kind, weight, importance)
    found = GgufFile(target, TYPE_BYTES).data(name)
    assert found.tobytes() == wanted.tobytes()
    assert wanted.tobytes() != ggml.quantize_chunk(kind, weight).tobytes()


def test_types_can_be_given_for_every_tensor(made: Made, tmp_path: Path) -> None:
    source, imatrix = made
    types = dict.fromkeys(tensor_types(source), ggml.IDS["q5_0"]) | {"token_embd.weight": 1}
    quantize(source, tmp_path / "one.gguf", "q4_k_m", imatrix, types)
    assert tensor_types(tmp_path / "one.gguf") == types


def test_a_refusal_is_llama_cpps_last_word(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"failed to open|No such file|failed to load"):
        quantize(tmp_path / "missing.gguf", tmp_path / "out.gguf", "q4_0", None)
