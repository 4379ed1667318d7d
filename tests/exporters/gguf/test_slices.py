"""Large matrices go through in slices of rows: the same bytes, and never more than a slice in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exporters.gguf import slices
from exporters.gguf.exporter import GgufExporter
from exporters.gguf.slices import row_slices
from signround.artifact import QuantizedCheckpoint
from signround.events import silent
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model


@pytest.mark.parametrize(
    ("rows", "columns", "together"), [(7, 10, 1), (1, 1000, 1), (24, 5, 6), (24, 50, 12), (0, 3, 1)]
)
def test_slices_follow_each_other(rows: int, columns: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE", 64)
    found = list(row_slices(rows, columns, together))
    assert [row for part in found for row in part] == list(range(rows))
    assert all(part.start % together == 0 and len(part) % together == 0 for part in found)
    assert all(len(part) * columns <= 64 or len(part) == together for part in found)


@pytest.mark.parametrize(
    ("family", "scheme", "mixes"),
    [
        ("llama-biased", "w4g64", False),
        ("llama-untied", "q4_k_m", True),
        ("mixtral", "q8_0", False),
        ("gemma2", "w8g32", False),
    ],
)
def test_sliced_files_are_the_same_bytes(
    family: str, scheme: str, mixes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512} if mixes else {}
    model = write_small_model(tmp_path / "model", family, **sizes)
    artifact = write_rounded_artifact(model, tmp_path / "artifact", scheme, mixes=mixes)
    whole = GgufExporter().export(artifact, tmp_path / "whole", silent).target.read_bytes()
    most, shortened = largest_read(artifact, monkeypatch)
    monkeypatch.setattr(slices, "SLICE", 1500)
    sliced = GgufExporter().export(artifact, tmp_path / "sliced", silent).target.read_bytes()
    assert sliced == whole
    head = artifact.plan.architecture.head_dim * artifact.plan.architecture.hidden  # rows that move within it
    assert max(most) <= max(1500, head)
    assert len(shortened) > len(artifact.layers)


def largest_read(artifact: QuantizedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[str]]:
    """Numbers that each coming read of codes or kept tensors gives, and the names of those that were parts."""
    read = QuantizedCheckpoint._read
    sizes: list[int] = []
    parts_of: list[str] = []

    def watched(
        self: QuantizedCheckpoint, name: str, parts: list[str], rows: range | None = None, *, optional: bool = False
    ) -> dict[str, torch.Tensor]:
        found = read(self, name, parts, rows, optional=optional)
        sizes.extend(tensor.numel() for tensor in found.values())
        if rows is not None and len(rows) < shapes[name][0]:
            parts_of.append(name)
        return found

    shapes = {name: (layer.rows, layer.columns) for name, layer in artifact.layers.items()}
    shapes |= {name: kept.shape for name, kept in artifact.kept.items()}
    monkeypatch.setattr(QuantizedCheckpoint, "_read", watched)
    return sizes, parts_of


def test_rows_of_an_artifact(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama-biased")
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32-asym")
    name = next(iter(artifact.layers))
    whole, part = artifact.quantized(name), artifact.quantized(name, range(3, 17))
    assert torch.equal(part.codes, whole.codes[3:17])
    assert all(torch.equal(field, whole.fields[key][3:17]) for key, field in part.fields.items())
    for kept in artifact.kept:
        assert torch.equal(artifact.tensor(kept, range(3, 17)), artifact.tensor(kept)[3:17])
