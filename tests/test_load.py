"""`signround.load`: the tuned model for everybody who uses transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import signround
from signround.artifact import QuantizedCheckpoint
from signround.errors import RefusedError
from signround.runtimes.torch_blocks import tuned_model
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

WINDOWS = torch.randint(3, 512, (2, 48), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("family", "scheme"),
    [("llama", "w4g32"), ("llama-untied", "w2g64-asym"), ("llama-biased", "q4_1"), ("llama3-rope", "w3g128"),
     ("mistral", "w8gc"), ("qwen2", "q5_1"), ("qwen3", "w4g128-asym"),
     ("gemma2", "w4g32"), ("gemma3", "q4_1"), ("phi3", "w4g64"), ("phi4-mini-like", "w4g32"), ("smollm3", "w4g32"),
     ("granite", "w4g32"), ("olmo2", "w4g32")],
)  # fmt: skip
def test_the_loaded_model_is_the_tuned_one(family: str, scheme: str, tmp_path: Path) -> None:
    artifact = write_rounded_artifact(write_small_model(tmp_path / "model", family), tmp_path / "artifact", scheme)
    model = signround.load(artifact.folder)
    assert not model.training
    parameters = dict(model.named_parameters())
    for name in artifact.layers:
        assert torch.equal(parameters[name], artifact.quantized(name).decode()), name
    for name in artifact.kept:
        assert torch.equal(parameters[name], artifact.tensor(name).float()), name
    assert parameters.keys() == {*artifact.layers, *artifact.kept}  # nothing stayed at its random start
    with torch.no_grad():
        logits = model(WINDOWS).logits
    expected = torch.cat(list(tuned_model(artifact).logits(WINDOWS)))
    assert (logits - expected).norm() / expected.norm() <= 1e-5


def test_it_generates(rounded_artifact: QuantizedCheckpoint) -> None:
    """Buffers such as the rotary table are there too, and a tied head follows the embedding."""
    model = signround.load(rounded_artifact.folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    written = model.generate(WINDOWS[:1, :4], max_new_tokens=4, do_sample=False)
    assert written.shape[1] > 4


def test_another_dtype_is_rounded_once(rounded_artifact: QuantizedCheckpoint) -> None:
    model = signround.load(rounded_artifact.folder, dtype=torch.bfloat16)
    name = next(iter(rounded_artifact.layers))
    assert torch.equal(model.get_parameter(name), rounded_artifact.weight(name).bfloat16())


def test_what_is_no_artifact_is_refused(llama_folder: Path) -> None:
    with pytest.raises(RefusedError, match="holds no signround artifact"):
        signround.load(llama_folder)
