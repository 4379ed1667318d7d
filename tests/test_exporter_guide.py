"""The exporter in docs/writing_an_exporter.md, taken from the text and held to the laws that the text names."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from signround import exporting
from signround.errors import RefusedError
from signround.exporting import Exporter, make_exporters
from signround.parity import compare_weights
from signround.pipeline import export
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

GUIDE = Path(__file__).parents[1] / "docs" / "writing_an_exporter.md"
MODULE = "npz_exporter_of_the_guide"


class EntryPoint:
    """As much of an entry point as `make_exporters` needs."""

    def __init__(self, kind: type[Any]) -> None:
        self.kind = kind

    def load(self) -> type[Any]:
        return self.kind


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's Python block as a module, and its class behind `--to npz`."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    path = tmp_path / f"{MODULE}.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, MODULE, module)  # dataclasses looks its annotations up there
    spec.loader.exec_module(module)
    monkeypatch.setattr(exporting, "available_exporters", lambda: {"npz": EntryPoint(module.NpzExporter)})


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("family", "scheme"), [("llama", "w3g64"), ("qwen2", "w4g32-asym"), ("mistral", "q4_1"), ("smollm2-like", "w2gc")]
)
def test_the_laws(family: str, scheme: str, tmp_path: Path) -> None:
    artifact = write_rounded_artifact(write_small_model(tmp_path / "model", family), tmp_path / "artifact", scheme)
    (exporter,) = make_exporters(["npz"])
    assert isinstance(exporter, Exporter)
    exported = export(artifact, "npz", tmp_path / "npz")
    found = dict(exporter.read_back(exported))
    assert set(found) == set(artifact.layers)
    for name, tensor in found.items():
        wanted = artifact.quantized(name)
        assert tensor.grid == wanted.grid
        assert torch.equal(tensor.codes, wanted.codes)
        assert all(torch.equal(tensor.fields[field], value) for field, value in wanted.fields.items())
    weights = compare_weights(artifact, exporter, exported)
    assert (weights.passed, weights.reader) == (True, "independent")
    assert weights.tensors == len(artifact.layers) + len(artifact.kept)
    assert exporter.opened(exported.target) == exported
    again = export(artifact, "npz", tmp_path / "again")
    assert [path.read_bytes() for path in again.files] == [path.read_bytes() for path in exported.files]
    size = sum(path.stat().st_size for path in exported.files)
    assert exporter.estimated_bytes(artifact.plan) == pytest.approx(size, rel=0.05)


@pytest.mark.usefixtures("registered")
def test_options_and_refusals(tmp_path: Path) -> None:
    artifact = write_rounded_artifact(write_small_model(tmp_path / "model", "llama"), tmp_path / "artifact", "w2g64")
    plain = export(artifact, "npz", tmp_path / "plain")
    small = export(artifact, "npz", tmp_path / "small", options={"compressed": "true"})
    assert sum(path.stat().st_size for path in small.files) < sum(path.stat().st_size for path in plain.files)
    (exporter,) = make_exporters(["npz"])
    with pytest.raises(RefusedError, match=r"no \.npz file"):
        exporter.opened(tmp_path / "model")
