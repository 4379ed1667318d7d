"""`--imatrix`: a llama.cpp importance matrix in place of the measured one; and the one that a job writes itself."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import signround
from exporters.gguf.exporter import GgufExporter
from exporters.gguf.imatrix import read_imatrix
from signround.architecture import EMBEDDING, HEAD
from signround.artifact import QuantizedCheckpoint
from signround.errors import RefusedError
from signround.files import sha256_of
from signround.gguf_names import gguf_name
from signround.importance import Importance, InputSquares
from signround.pipeline import IMATRIX, prepare
from signround.plan import ModelPlan
from tests.small_models import write_small_model

FAST: dict[str, Any] = {"samples": 12, "seqlen": 16, "iters": 2, "batch_size": 4}


@pytest.fixture(scope="module", params=["llama", "llama-untied"])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the folder of a q4_k_m job that measured importances itself; its matrix lies in `gguf`."""
    folder = tmp_path_factory.mktemp(request.param)
    model = write_small_model(folder / "model", request.param)
    signround.quantize(model, "q4_k_m", folder / "out", **FAST)
    signround.export(folder / "out" / "artifact", "gguf", folder / "out" / "gguf")
    return model, folder / "out"


def tuned(model: Path, out: Path, imatrix: Path | None, **changes: Any) -> QuantizedCheckpoint:
    """A job with the matrix, without a file: that would start a runtime."""
    job = prepare(model, "q4_k_m", out, ["gguf"], imatrix=imatrix, **(FAST | changes))
    return signround.pipeline.tune(job)


def importance_of(folder: Path) -> Importance:
    found = QuantizedCheckpoint(folder / "artifact").importance()
    assert found is not None
    return found


def random_squares(plan: ModelPlan, seed: int = 1) -> dict[str, InputSquares]:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer.name: InputSquares(torch.rand(1, layer.columns, generator=generator) ** 6 * 90, torch.tensor([30]))
        for layer in plan.layers()
        if layer.name != EMBEDDING or plan.architecture.tied
    }


def write_dat(path: Path, squares: Mapping[str, InputSquares]) -> None:
    """The older form, as `llama-imatrix` wrote it: mean square times the number of calls."""
    with open(path, "wb") as stream:
        stream.write(struct.pack("<i", len(squares)))
        for name, found in squares.items():
            key = gguf_name(name).encode()
            values = np.ascontiguousarray(found.sums[0].numpy(), "<f4")
            stream.write(struct.pack("<i", len(key)) + key)
            stream.write(struct.pack("<ii", int(found.counts[0]), len(values)) + values.tobytes())
        stream.write(struct.pack("<ii", 3, 4) + b"text")


def moved(before: QuantizedCheckpoint, after: QuantizedCheckpoint, name: str) -> bool:
    return bool((before.quantized(name).codes != after.quantized(name).codes).float().mean() > 0.01)


def files_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in (out / "artifact").rglob("*.safetensors")}


def test_the_matrix_beside_the_model_is_the_measured_one(measured: tuple[Path, Path]) -> None:
    _, out = measured
    artifact, importance = QuantizedCheckpoint(out / "artifact"), importance_of(out)
    path = out / "gguf" / IMATRIX
    again = GgufExporter().read_importance(path, artifact.plan)
    assert again.squares.keys() == importance.squares.keys()
    assert (HEAD in again.squares) != artifact.plan.architecture.tied
    for name, squares in importance.squares.items():
        assert torch.equal(again.squares[name].sums, squares.sums), name
        assert torch.equal(again.squares[name].counts, squares.counts), name
    file = read_imatrix(path)
    assert (file.chunk_count, file.chunk_size) == (12, 16)
    assert file.datasets == ("self",)


def test_our_own_matrix_gives_the_integers_of_measuring_anew(measured: tuple[Path, Path], tmp_path: Path) -> None:
    """The same tokens, the same means in float32: every file of the artifact has the same bytes, blocks, head and
    embedding (a tied one has its few windows in the matrix)."""
    model, out = measured
    tuned(model, tmp_path / "again", out / "gguf" / IMATRIX)
    assert files_of(tmp_path / "again") == files_of(out)


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_a_given_matrix_decides_where_tuning_starts(measured: tuple[Path, Path], tmp_path: Path, form: str) -> None:
    model, out = measured
    before = QuantizedCheckpoint(out / "artifact")
    squares, path = random_squares(before.plan), tmp_path / f"given.{form}"
    if form == "dat":
        write_dat(path, squares)
    else:
        GgufExporter().write_importance(Importance(squares, "text", 3, 10), path, before.plan)
    artifact = tuned(model, tmp_path / "out", path)
    assert artifact.plan.imatrix_sha256 == sha256_of(path)
    assert artifact.plan.fingerprint != before.plan.fingerprint
    stored = artifact.importance()
    assert stored is not None
    assert stored.dataset == f"self, importance matrix {sha256_of(path)[:12]}"
    assert stored.squares.keys() == squares.keys()
    for name, found in squares.items():
        assert torch.equal(stored.squares[name].means(), found.means()), name
    changed = [name for name in squares if moved(before, artifact, name)]
    assert len(changed) > len(squares) // 2  # the others are rounded to nearest in both
    assert (HEAD if HEAD in squares else EMBEDDING) in changed
    resumed = tuned(model, tmp_path / "out", path)
    assert resumed.fingerprint == artifact.fingerprint


def test_both_forms_are_one_matrix(measured: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = measured
    plan = QuantizedCheckpoint(out / "artifact").plan
    squares = random_squares(plan)
    GgufExporter().write_importance(Importance(squares, "text", 3, 10), tmp_path / "i.gguf", plan)
    write_dat(tmp_path / "i.dat", squares)
    first, second = (tuned(model, tmp_path / form, tmp_path / f"i.{form}") for form in ("gguf", "dat"))
    for name in first.layers:
        assert torch.equal(first.quantized(name).codes, second.quantized(name).codes), name


def test_a_matrix_without_the_head_is_completed(measured: tuple[Path, Path], tmp_path: Path) -> None:
    """`llama-imatrix` leaves out what lies outside the blocks: that is measured."""
    model, out = measured
    plan, importance = QuantizedCheckpoint(out / "artifact").plan, importance_of(out)
    blocks = {name: squares for name, squares in importance.squares.items() if name not in (EMBEDDING, HEAD)}
    GgufExporter().write_importance(Importance(blocks, "text", 3, 10), tmp_path / "i.gguf", plan)
    tuned(model, tmp_path / "out", tmp_path / "i.gguf")
    assert files_of(tmp_path / "out") == files_of(out)


def test_another_matrix_is_another_job(measured: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = measured
    copy = Path(shutil.copytree(out, tmp_path / "out"))
    with pytest.raises(RefusedError, match=r"another job .*they differ in imatrix_sha256"):
        tuned(model, copy, out / "gguf" / IMATRIX)


def test_experts_take_their_rows_of_the_stack(tmp_path: Path) -> None:
    """Tokens enough for every expert; our own matrix gives the same integers here too."""
    model = write_small_model(tmp_path / "model", "qwen2-moe", layers=1)
    effort = {"samples": 40, "seqlen": 32}
    signround.quantize(model, "q4_k_m", tmp_path / "out", **(FAST | effort))
    signround.export(tmp_path / "out" / "artifact", "gguf", tmp_path / "gguf")
    again = tuned(model, tmp_path / "again", tmp_path / "gguf" / IMATRIX, **effort)
    before = QuantizedCheckpoint(tmp_path / "out" / "artifact")
    kept = before.records()[0].kept
    assert sum(choice == "tuned" for choice in kept.values()) > 7
    for name in before.layers:
        assert torch.equal(again.quantized(name).codes, before.quantized(name).codes), name
    squares = random_squares(before.plan)
    GgufExporter().write_importance(Importance(squares, "text", 3, 10), tmp_path / "i.gguf", before.plan)
    other = tuned(model, tmp_path / "other", tmp_path / "i.gguf", **effort)
    expert = "model.layers.0.mlp.experts.3.up_proj.weight"
    stored = other.importance()
    assert stored is not None
    assert torch.equal(stored.squares[expert].means(), squares[expert].means())
    assert not torch.equal(other.quantized(expert).codes, before.quantized(expert).codes)


def test_methods_that_search_nothing_write_none(llama_folder: Path, tmp_path: Path) -> None:
    for method, effort in (("rtn", {"samples": 2, "seqlen": 16}), ("signround-400", FAST)):
        out = tmp_path / method
        signround.quantize(llama_folder, "q4_k_m", out, **({"method": method} | effort))
        signround.export(out / "artifact", "gguf", out / "gguf")
        assert [path.suffix for path in (out / "gguf").iterdir()] == [".gguf"]
        assert not (out / "gguf" / IMATRIX).exists()


def test_one_grid_takes_a_matrix_too(measured: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = measured
    plan = prepare(model, "w4g32", None, ["gguf", "onnx"], imatrix=out / "gguf" / IMATRIX, **FAST).plan
    assert plan.imatrix_sha256 == sha256_of(out / "gguf" / IMATRIX)
