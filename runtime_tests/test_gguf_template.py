"""Files made by a template in llama.cpp itself: the tuned model's logits, the template's tokens, and the main job."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from exporters.gguf.exporter import GgufExporter
from runtime_tests.test_gguf import mean_kl, runtime_logits, some_windows, transformers_logits
from signround import pipeline
from signround.events import silent
from signround.parity import compare_weights
from signround.runtimes.llama_cpp import open_llama_cpp
from tests.exporters.gguf.test_template import converted
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

if not any(importlib.util.find_spec(module) for module in ("llama_cpp", "xllamacpp")):
    pytest.skip("needs llama-cpp-python or xllamacpp", allow_module_level=True)


@pytest.mark.parametrize(("family", "scheme"), [("llama", "w4g32"), ("gemma3", "q4_1")])
def test_the_file_is_the_tuned_model(family: str, scheme: str, tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", family)
    artifact = write_rounded_artifact(model, tmp_path / "artifact", scheme)
    template = converted(model, tmp_path / "template.gguf", "bf16")
    exporter = GgufExporter(template=str(template), source=str(model))
    target = exporter.export(artifact, tmp_path / "out", silent).target
    windows = some_windows(count=1)
    reference = transformers_logits(model, windows, artifact)
    assert mean_kl(reference, runtime_logits(target, windows)) <= 1e-3
    usual = GgufExporter().export(artifact, tmp_path / "usual", silent).target
    ours, theirs = (open_llama_cpp(path, threads=1) for path in (target, usual))
    try:
        for text in ("def f(x):\n    return 12345", "日本語 🚀 <|begin|>café"):
            assert ours.tokenize(text, add_special=True) == theirs.tokenize(text, add_special=True)
    finally:
        ours.close()
        theirs.close()


def test_the_main_job_by_template(tmp_path: Path) -> None:
    """Plan, tune, export; then weights from the file and the artifact alone, and llama.cpp on a few tokens."""
    model = write_small_model(tmp_path / "model", "llama", layers=1)
    template = converted(model, tmp_path / "template.gguf")
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x ** 2  # squares, 12345 words\n" * 400)
    options = {"gguf": {"template": str(template)}}
    settings = {"method": "rtn", "samples": 4, "seqlen": 64}
    job = pipeline.prepare(
        model, "w4g32", tmp_path / "out", ["gguf"], calibration=str(text), options=options, **settings
    )
    artifact = pipeline.tune(job)
    (exporter,) = job.exporters
    exported = exporter.export(artifact, tmp_path / "gguf", silent)
    assert compare_weights(artifact, GgufExporter(), GgufExporter().opened(exported.target)).passed
    windows = some_windows(tokens=8, count=1)
    assert mean_kl(transformers_logits(model, windows, artifact), runtime_logits(exported.target, windows)) <= 1e-3
