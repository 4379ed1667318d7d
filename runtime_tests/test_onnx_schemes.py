"""Every scheme that ONNX holds, in linears of every form, against transformers on the decoded weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exporters.onnx.exporter import OnnxExporter
from runtime_tests.test_onnx import all_logits, reference_model, relative_error, windows
from signround.artifact import QuantizedCheckpoint
from signround.events import silent
from signround.formats import grid_for, scheme_names
from signround.parity import compare_weights
from signround.runtimes.ort import open_onnxruntime
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

pytest.importorskip("onnxruntime")

TYPICAL_COLUMNS = 4096
SCHEMES = [name for name in scheme_names() if OnnxExporter().holds(grid_for(name), TYPICAL_COLUMNS)]
STD = {"flavour": "std"}
FORMS = [
    pytest.param({}, 1e-5, id="contrib"),
    pytest.param(STD, 1e-5, id="std", marks=pytest.mark.slow),  # the same nodes as in contrib
    pytest.param({**STD, "weights": "dequantize"}, 1e-5, id="dequantize"),
    pytest.param({"dtype": "fp16"}, 3e-3, id="contrib-fp16", marks=pytest.mark.slow),
    pytest.param({**STD, "weights": "dequantize", "dtype": "fp16"}, 3e-3, id="dequantize-fp16", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def artifact_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], QuantizedCheckpoint]:
    """Rows of 192, 256 and 480: with whole and cut groups, and more than one even of 256."""
    folder = tmp_path_factory.mktemp("schemes")
    write_small_model(folder / "model", "smollm2-like", layers=1, num_attention_heads=4, head_dim=64)
    made: dict[str, QuantizedCheckpoint] = {}

    def make(scheme: str) -> QuantizedCheckpoint:
        if scheme not in made:
            made[scheme] = write_rounded_artifact(folder / "model", folder / scheme, scheme)
        return made[scheme]

    return make


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("options", "gate"), FORMS)
@torch.no_grad()
def test_linears_are_the_decoded_weights(
    artifact_of: Callable[[str], QuantizedCheckpoint],
    tmp_path: Path,
    scheme: str,
    options: dict[str, str],
    gate: float,
) -> None:
    artifact, exporter, tokens = artifact_of(scheme), OnnxExporter(0, **options), windows(512)
    assert exporter.refusals(artifact.plan) == []
    exported = exporter.export(artifact, tmp_path / "onnx", silent)
    parity = compare_weights(artifact, exporter, exported)
    assert parity.exact == parity.tensors > 0
    found = all_logits(open_onnxruntime(exported.target, threads=1).logits(tokens))
    assert relative_error(found, reference_model(artifact)(tokens).logits) <= gate


def test_all_that_are_published_are_here() -> None:
    assert len(SCHEMES) == 4 * 6 * 2 + 3
