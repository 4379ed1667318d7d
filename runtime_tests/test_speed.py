"""Speed in the real runtimes. No figure is judged, only that it is one, and that the steps timed are the right ones."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exporters.gguf.exporter import GgufExporter
from exporters.onnx.exporter import OnnxExporter
from signround.errors import FailedError
from signround.events import silent
from signround.runtimes.llama_cpp_server import ServerRuntime
from signround.runtimes.llama_cpp_windows import WindowRuntime
from signround.runtimes.ort import open_onnxruntime
from signround.runtimes.protocol import Runtime, Speed
from signround.runtimes.speed import any_tokens
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

pytest.importorskip("gguf")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A .gguf file and an ONNX folder of a small model."""
    folder = tmp_path_factory.mktemp("speed")
    model = write_small_model(folder / "model", "qwen3")
    artifact = write_rounded_artifact(model, folder / "artifact", "w4g32")
    GgufExporter().export(artifact, folder / "gguf", silent)
    OnnxExporter().export(artifact, folder / "onnx", silent)
    (gguf,) = (folder / "gguf").glob("*.gguf")
    return gguf, folder / "onnx"


def window_runtime(gguf: Path, _: Path) -> Runtime:
    return WindowRuntime(gguf, 2, True)


def server_runtime(gguf: Path, _: Path) -> Runtime:
    return ServerRuntime(gguf, 2, True)


def onnxruntime_runtime(_: Path, onnx: Path) -> Runtime:
    return open_onnxruntime(onnx)


def genai_runtime(_: Path, onnx: Path) -> Runtime:
    from signround.runtimes.genai import open_genai

    return open_genai(onnx)


@pytest.mark.parametrize(
    ("package", "opened"),
    [
        ("onnxruntime", onnxruntime_runtime),
        ("onnxruntime_genai", genai_runtime),
        ("xllamacpp", server_runtime),
        ("llama_cpp", window_runtime),
    ],
)
def test_every_runtime_is_timed(
    files: tuple[Path, Path], package: str, opened: Callable[[Path, Path], Runtime]
) -> None:
    """Positive and finite, for the usual prompt, one step, and more than the first context of llama.cpp's server."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    runtime = opened(*files)
    try:
        for prompt, new in ((128, 4), (3, 1), (400, 2)):
            found = runtime.speed(prompt, new)
            assert isinstance(found, Speed)
            assert (found.prompt, found.new) == (prompt, new)
            for rate in (found.prefill_tokens_per_second, found.decode_tokens_per_second):
                assert math.isfinite(rate)
                assert 0 < rate < 1e7
        windows = torch.tensor([any_tokens(8, runtime.vocabulary)])
        (logits,) = runtime.logits(windows)  # still usable after it
        assert logits.shape == (1, 8, runtime.vocabulary)
    finally:
        runtime.close()


def test_onnxruntime_steps_over_its_cache_compute_the_window(files: tuple[Path, Path]) -> None:
    """What is timed is decoding with the past of the steps before: its logits are those of one pass."""
    runtime = open_onnxruntime(files[1], accuracy_level=0)
    tokens = any_tokens(12, runtime.vocabulary)
    (whole,) = runtime.logits(torch.tensor([tokens]))
    logits, cache = runtime.step(torch.tensor([tokens[:9]]))
    rows = [logits[0, -1]]
    for token in tokens[9:]:
        logits, cache = runtime.step(torch.tensor([[token]]), cache)
        rows.append(logits[0, -1])
    for row, wanted in zip(rows, whole[0, 8:], strict=True):
        assert torch.allclose(row, wanted, rtol=1e-4, atol=1e-5)
    runtime.close()
    with pytest.raises(FailedError, match="closed"):
        runtime.speed()
