"""A model in several files in llama.cpp: opened by the first, the same logits, and every command on the parts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from exporters.gguf.exporter import GgufExporter
from runtime_tests.test_gguf import runtime_logits, some_windows
from signround.cli.main import main
from signround.errors import FailedError
from signround.events import silent
from signround.runtimes.llama_cpp import open_llama_cpp
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

if not any(importlib.util.find_spec(module) for module in ("llama_cpp", "xllamacpp")):
    pytest.skip("needs llama-cpp-python or xllamacpp", allow_module_level=True)

LLAMA_4M = Path(__file__).parents[1] / "examples" / "llama-4m"


def test_logits_are_those_of_the_unsplit_file(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama3-rope")
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32")
    whole = GgufExporter().export(artifact, tmp_path / "whole", silent)
    parts = GgufExporter(split_max_size="150K").export(artifact, tmp_path / "parts", silent)
    assert len(parts.files) > 2
    windows = some_windows(count=1)
    assert torch.equal(runtime_logits(parts.target, windows), runtime_logits(whole.target, windows))
    parts.files[-1].unlink()
    with pytest.raises(FailedError, match="could not run the file"):  # so the parts were read, not just the first
        open_llama_cpp(parts.target)


def test_every_command_takes_the_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The main job with a size, which verifies, then evaluate and inspect on the first part and on the folder."""

    def signround(*arguments: object) -> dict[str, object]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments), "--json"])
        assert ended.value.code == 0
        return dict(json.loads(capsys.readouterr().out))

    text = tmp_path / "text.txt"
    text.write_text("The old man sat down by the river and looked at the water for a long time. " * 200)
    job = ["--scheme", "w4g32", "--method", "rtn", "--samples", "2", "--seqlen", "16", "--calibration", text]
    settings = ["--to", "gguf", "--set", "gguf.split_max_size=2300K", "-o", tmp_path / "out"]
    report = signround("quantize", LLAMA_4M, *job, *settings)
    files = sorted((tmp_path / "out" / "gguf").iterdir())
    assert len(files) > 1
    assert max(path.stat().st_size for path in files) <= 2_300_000
    assert files[0].name == f"llama-4M-W4G32-00001-of-{len(files):05d}.gguf"
    export = report["exports"]["gguf"]  # type: ignore[index]
    assert [file["path"] for file in export["files"]] == [f"gguf/{path.name}" for path in files]
    assert export["logits"]["passed"]
    text.write_text(text.read_text()[:200])
    for target in (files[0], files[0].parent):
        assert signround("inspect", target)["bytes"] == sum(path.stat().st_size for path in files)
        assert signround("evaluate", target, "--text", text, "--context", 16)["tokens"]
