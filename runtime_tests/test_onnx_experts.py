"""Mixtures of experts as ONNX decoders, against transformers on the decoded weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from exporters.onnx.exporter import OnnxExporter
from runtime_tests.onnx_steps import stepper, tokens_of
from runtime_tests.test_onnx import all_logits, relative_error
from runtime_tests.test_onnx_schemes import SCHEMES
from signround import quantize
from signround.artifact import QuantizedCheckpoint
from signround.events import silent
from signround.formats import grid_for
from signround.loading import load
from signround.parity import ROUTED, ROUTED_EXACT, compare_weights, verify
from signround.runtimes.genai import open_genai
from signround.runtimes.ort import open_onnxruntime
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import MIXTURES, write_small_model

pytest.importorskip("onnxruntime")

Exported = Callable[[str, str], tuple[QuantizedCheckpoint, Path]]
COVERING = [
    ("qwen3-moe", "w4g32"), ("qwen3-moe", "w8g64-asym"), ("qwen2-moe", "w3g128-asym"), ("qwen2-moe", "w4g16-asym"),
    ("mixtral", "w4gc"), ("mixtral", "q8_0"), ("qwen3-moe", "w3g32"), ("qwen2-moe", "w8g16"), ("mixtral", "w4g256"),
]  # fmt: skip
_REST = [scheme for scheme in SCHEMES if grid_for(scheme).bits > 2 and scheme not in {name for _, name in COVERING}]
COVERING += [(MIXTURES[index % len(MIXTURES)], scheme) for index, scheme in enumerate(_REST)]  # QMoE has no 2 bits


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """(artifact, ONNX folder at level 0) of a small mixture."""
    made: dict[tuple[str, str], tuple[QuantizedCheckpoint, Path]] = {}

    def make(family: str, scheme: str) -> tuple[QuantizedCheckpoint, Path]:
        if (family, scheme) not in made:
            folder = tmp_path_factory.mktemp("onnx")
            write_small_model(folder / "model", family, **({"sliding_window": 16} if family == "mixtral" else {}))
            artifact = write_rounded_artifact(folder / "model", folder / "artifact", scheme)
            OnnxExporter(0).export(artifact, folder / "onnx", silent)
            made[family, scheme] = artifact, folder / "onnx"
        return made[family, scheme]

    return make


@pytest.mark.parametrize(("family", "scheme"), COVERING)
@torch.no_grad()
def test_exact_mode_is_transformers(exported: Exported, family: str, scheme: str) -> None:
    artifact, folder = exported(family, scheme)
    windows = tokens_of(2, 40)
    wanted = load(artifact.folder)(windows).logits
    assert relative_error(all_logits(open_onnxruntime(folder, 0, threads=1).logits(windows)), wanted) <= 1e-5
    as_written = relative_error(all_logits(open_onnxruntime(folder, threads=1).logits(windows)), wanted)
    # 8-bit experts compute with int8 activations whatever the file says.
    assert (1e-3 < as_written < 0.2) if "8" in scheme.partition("g")[0] else as_written <= 1e-5


@pytest.mark.parametrize("family", MIXTURES)
@torch.no_grad()
def test_chunks_steps_and_padded_batches(exported: Exported, family: str) -> None:
    artifact, folder = exported(*next(pair for pair in COVERING if pair[0] == family))
    model, windows = load(artifact.folder), tokens_of(2, 30)
    wanted = model(windows).logits
    conversation = stepper(folder)
    cuts = [0, 17, 25, 26, 27, 30]
    pieces = [conversation.feed(windows[:1, start:end]) for start, end in pairwise(cuts)]
    assert relative_error(torch.cat(pieces, 1), wanted[:1]) <= 1e-5
    batch, lengths = stepper(folder), (24, 11)
    prompt = batch.feed(windows[:, :24], lengths)
    step = batch.feed(torch.stack([row[length : length + 1] for row, length in zip(windows, lengths, strict=True)]))
    for row, length in enumerate(lengths):
        found = torch.cat([prompt[row, :length], step[row]])
        assert relative_error(found, wanted[row, : length + 1]) <= 1e-5


@pytest.mark.parametrize("family", MIXTURES)
@torch.no_grad()
def test_genai_generates_what_transformers_does(exported: Exported, family: str) -> None:
    pytest.importorskip("onnxruntime_genai")
    artifact, folder = exported(*next(pair for pair in COVERING if pair[0] == family))
    prompt = tokens_of(1, 20)
    wanted = load(artifact.folder).generate(
        prompt, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(prompt)
    )
    assert torch.equal(open_genai(folder).greedy(prompt[0], 24), wanted[0, 20:])


@pytest.mark.parametrize(("family", "scheme"), [("mixtral", "q8_0"), ("qwen3-moe", "w4g32")])
def test_verify_knows_mixtures(exported: Exported, family: str, scheme: str, tmp_path: Path) -> None:
    artifact, _ = exported(family, scheme)
    exporter = OnnxExporter()
    parity = verify(artifact, exporter, exporter.export(artifact, tmp_path / "onnx", silent), tokens_of(8, 64))
    assert parity.passed
    assert parity.logits is not None
    assert parity.exact_logits is not None
    assert (parity.logits.gate, parity.exact_logits.gate) == (ROUTED, ROUTED_EXACT)
    error = parity.exact_logits.score.relative_error
    assert error is not None
    assert error <= 1e-5


def test_the_main_job(tmp_path: Path) -> None:
    """Experts tuned in a few steps on their own tokens, exported, verified."""
    model = write_small_model(tmp_path / "model", "qwen2-moe")
    report = quantize(model, "w4g32", tmp_path / "out", ["onnx"], samples=8, seqlen=32, iters=10, batch_size=4)
    onnx = report["exports"]["onnx"]
    assert onnx["weights"]["exact"] == onnx["weights"]["tensors"]
    assert onnx["logits"]["passed"]
    assert all(block["expert_tokens"] for block in report["tuning"]["blocks"])


@torch.no_grad()
def test_down_projections_on_a_grid_of_their_own(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "qwen3-moe")
    override = (("experts.*down_proj", "w3g32"),)
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g64-asym", overrides=override)
    exporter = OnnxExporter(0)
    exported = exporter.export(artifact, tmp_path / "onnx", silent)
    parity = compare_weights(artifact, exporter, exported)
    assert parity.exact == parity.tensors
    windows = tokens_of(2, 40)
    found = all_logits(open_onnxruntime(exported.target, 0, threads=1).logits(windows))
    assert relative_error(found, load(artifact.folder)(windows).logits) <= 1e-5
