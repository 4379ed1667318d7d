"""What `inspect` and `schemes` tell, against what is known of the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from signround.artifact import QuantizedCheckpoint
from signround.assignment import is_file_type
from signround.errors import RefusedError, SignroundError
from signround.exporting import available_exporters
from signround.formats import scheme_names
from signround.inspection import inspect_target, inspection_lines, scheme_table
from signround.mixes import FILE_TYPES, PRESETS
from signround.pipeline import export
from signround.runtimes.targets import kind_of
from tests.small_artifacts import write_rounded_artifact


def histogram_of(artifact: QuantizedCheckpoint) -> list[int]:
    codes = torch.cat([artifact.quantized(name).codes.flatten() for name in artifact.layers])
    return [int((codes == code).sum()) for code in range(16)]


def test_an_artifact(rounded_artifact: QuantizedCheckpoint) -> None:
    found = inspect_target(rounded_artifact.folder)
    assert found["kind"] == "artifact"
    assert found["scheme"] == "w4g32"
    assert found["complete"] is True
    assert found["blocks"] == {"finished": 2, "planned": 2}
    (grid,) = found["grids"]
    assert grid["linears"] == 14
    assert grid["histogram"] == histogram_of(rounded_artifact)
    assert grid["weights"] == sum(grid["histogram"])
    assert found["bytes"] == sum(p.stat().st_size for p in rounded_artifact.folder.rglob("*") if p.is_file())
    json.dumps(found)
    text = "\n".join(inspection_lines(found))
    assert "14 matrices" in text
    assert text.count("#") > 16  # bars


@pytest.mark.parametrize("format", sorted(available_exporters()))
def test_an_exported_model_holds_the_same_codes(
    rounded_artifact: QuantizedCheckpoint, tmp_path: Path, format: str
) -> None:
    target = export(rounded_artifact, format, tmp_path / format).target
    found = inspect_target(target)
    assert found["kind"] == format
    assert sum(grid["linears"] for grid in found["grids"]) == 14
    (grid,) = found["grids"]
    assert grid["histogram"] == histogram_of(rounded_artifact)
    assert inspection_lines(found)


def test_a_checkpoint(llama_folder: Path) -> None:
    found = inspect_target(llama_folder)
    assert found["kind"] == "checkpoint"
    assert found["parameters"] > 100_000
    assert inspection_lines(found)


def test_an_unfinished_artifact_says_so(llama_folder: Path, tmp_path: Path) -> None:
    artifact = write_rounded_artifact(llama_folder, tmp_path / "artifact", "w8g32")
    manifest = json.loads((artifact.folder / "manifest.json").read_text())
    (artifact.folder / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    found = inspect_target(artifact.folder)
    assert found["complete"] is False
    assert found["grids"] == []
    assert inspection_lines(found)


@pytest.mark.parametrize("name", ["broken.gguf", "broken-onnx", "broken-gptq"])
def test_damaged_files_are_one_sentence(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    if name.endswith("gguf"):
        target.write_bytes(b"GGUF" + bytes(50))
    else:
        target.mkdir()
        (target / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
        (target / ("model.onnx" if "onnx" in name else "model.safetensors")).write_bytes(b"\x08\x07not a model")
    with pytest.raises(SignroundError) as caught:
        inspect_target(target)
    assert "\n" not in str(caught.value)


def test_the_folder_of_a_job_points_to_its_artifact(rounded_artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "artifact").symlink_to(rounded_artifact.folder)
    with pytest.raises(RefusedError, match=r"output folder of a job.*give .*artifact"):
        inspect_target(tmp_path)


def test_a_job_with_an_onnx_folder_is_no_browser_model(rounded_artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    """Its onnx/model.onnx lies where transformers.js looks for a float model."""
    shutil.copytree(rounded_artifact.folder, tmp_path / "artifact")
    (tmp_path / "onnx").mkdir()
    graph = tmp_path / "onnx" / "model.onnx"
    graph.write_bytes(b"")
    with pytest.raises(RefusedError, match=r"output folder of a job.*or the folder of a format"):
        kind_of(tmp_path)
    with pytest.raises(RefusedError, match=r"one file of an ONNX folder; give the folder, .*onnx"):
        kind_of(graph)


def test_the_table_of_schemes() -> None:
    rows = {row["scheme"]: row for row in scheme_table() if row["kind"] == "grid"}
    assert [*rows] == scheme_names()
    assert rows["w4g32"]["formats"] == ["gguf", "gptq", "onnx"]
    assert rows["w4g32"]["bits_per_weight"] == 4.5
    assert rows["w2g64"]["bits_per_weight"] == 2.25
    assert rows["q4_1"]["formats"] == ["gguf"]
    assert "gguf" not in rows["w3g128"]["formats"]


def test_the_table_of_file_types_and_presets() -> None:
    table = scheme_table()
    assert [row["kind"] for row in table] == sorted(
        (row["kind"] for row in table), key=["grid", "file type", "preset"].index
    )
    rows = {row["scheme"]: row for row in table if row["kind"] != "grid"}
    assert [*rows] == [*FILE_TYPES, *PRESETS]
    assert all(row["formats"] == ["gguf"] for row in rows.values())
    assert {
        name: rows[name]["bits_per_weight"] for name in ("q4_k_m", "q2_k", "iq4_xs", "q8_0", "mobile", "small")
    } == {
        "q4_k_m": 4.5,
        "q2_k": 2.625,
        "iq4_xs": 4.25,
        "q8_0": 8.5,
        "mobile": 4.5,
        "small": 2.625,
    }
    assert rows["laptop"]["description"].startswith("processors of laptops")
    for name, row in rows.items():  # all that the table offers is taken
        assert is_file_type(name, mixes=True)
        assert row["description"]
