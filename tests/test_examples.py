"""The scripts in examples/ run as their docstrings say, on a small random model and with small settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_models import write_small_model

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx_ir")
    return tmp_path_factory.mktemp("examples") / "out"


@pytest.fixture(scope="module")
def printed(out: Path) -> str:
    model = write_small_model(out.parent / "model", "llama")
    small = ("--iters", 1, "--samples", 4, "--seqlen", 16)
    return run("quantize.py", out, "--model", model, "--to", "onnx", *small)


def test_quantize(out: Path, printed: str) -> None:
    assert "BlockTuned(index=1, total=2" in printed
    assert printed.endswith("onnx: onnx, passed\n")
    assert (out / "report.json").is_file()


@pytest.mark.usefixtures("printed")
def test_another_format(out: Path, tmp_path: Path) -> None:
    printed = run(
        "another_format.py", out / "artifact", tmp_path / "second", "--to", "onnx", "--set", "accuracy_level=0"
    )
    assert "20 of 20 tensors exact" in printed
    assert (tmp_path / "second" / "model.onnx.data").read_bytes() == (out / "onnx" / "model.onnx.data").read_bytes()
