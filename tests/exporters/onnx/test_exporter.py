"""The ONNX exporter's laws: everything comes back, equal bytes, nothing half-written, and what it says beforehand."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from exporters.onnx.exporter import OnnxExporter
from exporters.onnx.reader import load_graph
from signround.artifact import QuantizedCheckpoint
from signround.checkpoint import SourceCheckpoint
from signround.errors import FailedError, RefusedError
from signround.events import Event, StageAdvanced, silent
from signround.exporting import Exporter
from signround.plan import CalibrationSpec, make_plan
from signround.qtensor import QuantizedTensor
from signround.recipes import settings_for
from tests.small_models import FAMILIES, write_small_model

pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

Maker = Callable[..., QuantizedCheckpoint]
COVERING = [
    ("llama", "w4g32", {}),
    ("llama", "w2g16-asym", {"dtype": torch.float16}),
    ("llama-untied", "w3g128-asym", {"dtype": torch.float32}),
    ("llama-biased", "w2g64-asym", {}),
    ("llama3-rope", "w8g16-asym", {}),
    ("smollm2-like", "w4gc-asym", {}),
    ("smollm2-like", "w2g256-asym", {}),
    ("mistral", "q8_0", {"shard_bytes": 100_000}),
    ("qwen2", "w3g32", {}),
    ("qwen2", "q4_0", {"tie_word_embeddings": False}),
    ("qwen3", "w4g128-asym", {}),
    ("qwen3", "w2gc", {}),
]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("family", "scheme", "overrides"), COVERING)
def test_every_tensor_comes_back(
    artifact_of: Maker, tmp_path: Path, family: str, scheme: str, overrides: dict[str, Any]
) -> None:
    artifact = artifact_of(family, scheme, **overrides)
    exporter = OnnxExporter()
    exported = exporter.export(artifact, tmp_path / "onnx", silent)
    read = dict(exporter.read_back(exporter.opened(tmp_path / "onnx")))
    assert read.keys() == artifact.layers.keys()
    for name, tensor in read.items():
        stored = artifact.quantized(name)
        assert tensor.grid == stored.grid, name
        assert torch.equal(tensor.codes, stored.codes), name
        assert all(torch.equal(tensor.fields[field], stored.fields[field]) for field in stored.fields), name
    decoded = list(exporter.decode_independently(exported))
    assert sorted(name for name, _ in decoded) == sorted([*artifact.layers, *artifact.kept])
    for name, weight in decoded:
        assert weight.dtype == torch.float32
        assert torch.equal(weight, artifact.weight(name)), name


@pytest.mark.parametrize(("family", "scheme", "overrides"), COVERING)
def test_size_is_known_beforehand(
    artifact_of: Maker, tmp_path: Path, family: str, scheme: str, overrides: dict[str, Any]
) -> None:
    artifact = artifact_of(family, scheme, **overrides)
    exported = OnnxExporter().export(artifact, tmp_path / "onnx", silent)
    written = sum(path.stat().st_size for path in exported.files)
    assert OnnxExporter().estimated_bytes(artifact.plan) == pytest.approx(written, rel=0.02)


def test_two_exports_are_byte_identical_and_replace_each_other(artifact_of: Maker, tmp_path: Path) -> None:
    artifact = artifact_of("llama-biased", "w2g64-asym")
    exporter = OnnxExporter()
    first = digests(exporter.export(artifact, tmp_path / "a", silent).target)
    exporter.export(artifact, tmp_path / "b", silent)
    assert digests(exporter.export(artifact, tmp_path / "b", silent).target) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_folder_is_complete_and_names_no_local_path(artifact_of: Maker, tmp_path: Path) -> None:
    artifact = artifact_of()
    exported = OnnxExporter(accuracy_level=0).export(artifact, tmp_path / "onnx", silent)
    names = {path.name for path in exported.files}
    assert names >= {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "config.json"}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in exported.files)
    graph = (tmp_path / "onnx" / "model.onnx").read_bytes()
    assert str(tmp_path).encode() not in graph
    assert b".py" not in graph
    properties = load_graph(exported.target).metadata_props
    assert properties["signround.scheme"] == "w4g32"
    assert properties["signround.artifact"] == artifact.fingerprint
    assert properties["signround.source_sha256"] == artifact.plan.source_sha256
    assert properties["signround.accuracy_level"] == "0"


def test_graph_is_the_one_that_onnxruntime_runs_fast(artifact_of: Maker, tmp_path: Path) -> None:
    def kinds(family: str, **overrides: Any) -> list[str]:
        folder = tmp_path / f"{family}{len(overrides)}"
        model = load_graph(OnnxExporter().export(artifact_of(family, **overrides), folder, silent).target)
        assert model.ir_version == 10
        assert model.graph.opset_imports == {"": 21, "com.microsoft": 1}
        for node in model.graph:
            if node.op_type == "MatMulNBits":
                assert node.attributes["accuracy_level"].as_int() == 4
        tables = [name for name in model.graph.initializers if name in ("lm_head.weight", "model.embed_tokens.weight")]
        assert len(tables) == (2 if family == "llama-untied" else 1)
        return [node.op_type for node in model.graph]

    assert kinds("llama").count("MatMulNBits") == 2 * 4  # q, k and v in one, gate and up in one
    assert kinds("llama-biased").count("MatMulNBits") == 2 * 4
    assert kinds("llama-untied").count("MatMulNBits") == 2 * 4
    assert kinds("qwen3").count("MatMulNBits") == 2 * 4  # taken apart behind it for the norms of q and k
    assert kinds("llama").count("Cast") == 4  # two for the mask, two for the bf16 table
    assert kinds("llama", dtype=torch.float32).count("Cast") == 2


def test_down_projections_can_stay_exact(artifact_of: Maker, tmp_path: Path) -> None:
    exporter = OnnxExporter(exact_down_proj=True)
    model = load_graph(exporter.export(artifact_of(), tmp_path / "onnx", silent).target)
    levels = {
        node.name: node.attributes["accuracy_level"].as_int() for node in model.graph if node.op_type == "MatMulNBits"
    }
    assert {level for name, level in levels.items() if name.endswith("down_proj")} == {0}
    assert {level for name, level in levels.items() if not name.endswith("down_proj")} == {4}
    assert "products of 8 bits stay at accuracy_level 4" in " ".join(
        exporter.notes(artifact_of("mistral", "q8_0").plan)
    )


@pytest.mark.parametrize(
    "options", [{}, {"flavour": "std", "weights": "dequantize"}], ids=["matmulnbits", "dequantize"]
)
def test_one_weight_is_resident_at_a_time(
    artifact_of: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    artifact = artifact_of("llama", layers=4)
    alive: list[weakref.ref[QuantizedTensor]] = []
    read = QuantizedCheckpoint.quantized
    peak = 0

    def counted(self: QuantizedCheckpoint, name: str, rows: range | None = None) -> QuantizedTensor:
        nonlocal peak
        tensor = read(self, name, rows)
        alive.append(weakref.ref(tensor))
        peak = max(peak, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(QuantizedCheckpoint, "quantized", counted)
    OnnxExporter(**options).export(artifact, tmp_path / "onnx", silent)
    assert len(alive) == 4 * 7  # each weight is read once
    assert peak <= 2


def test_failing_export_leaves_nothing(artifact_of: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = artifact_of()
    seen = 0

    def stop(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, StageAdvanced)
        if seen == 5:
            raise OSError(28, "No space left on device")

    with pytest.raises(FailedError, match="disk is full"):
        OnnxExporter().export(artifact, tmp_path / "onnx", stop)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("exporters.onnx.exporter.problems_of", lambda model, folder: ["x: broken"])
    with pytest.raises(FailedError, match="not sound"):
        OnnxExporter().export(artifact, tmp_path / "onnx", silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_is_one_sentence(artifact_of: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = artifact_of()

    def full(path: Path, mode: str) -> BinaryIO:
        return open("/dev/full", mode)

    monkeypatch.setattr("exporters.onnx.data_files.open", full, raising=False)
    with pytest.raises(FailedError, match="the disk is full"):
        OnnxExporter().export(artifact, tmp_path / "onnx", silent)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_tensor(artifact_of: Maker, tmp_path: Path) -> None:
    events: list[Event] = []
    OnnxExporter().export(artifact_of(), tmp_path / "onnx", events.append)
    done = [event for event in events if isinstance(event, StageAdvanced)]
    assert [event.done for event in done] == list(range(1, done[0].total + 1))


def test_it_is_an_exporter() -> None:
    assert isinstance(OnnxExporter(), Exporter)
    assert (OnnxExporter().name, OnnxExporter().zero_floor) == ("onnx", 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_the_tuner_has_a_graph(family: str, tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", family)
    plan = make_plan(
        SourceCheckpoint(model), "w4g32", settings_for("rtn", context=64, samples=2, seqlen=16), CalibrationSpec("self")
    )
    assert OnnxExporter().refusals(plan) == []


def test_refusals_come_all_at_once(artifact_of: Maker, tmp_path: Path) -> None:
    refusals = OnnxExporter(accuracy_level=7).refusals(artifact_of("llama", "q4_1", head_dim=20).plan)
    text = " ".join(refusal.sentence() for refusal in refusals)
    assert len(refusals) == 3
    assert "accuracy_level 7" in text
    assert "zero as minimum" in text
    assert "heads of 20" in text
    assert "add `--set onnx.flavour=std`" in text
    with pytest.raises(RefusedError):
        OnnxExporter().export(artifact_of("llama", "q5_0"), tmp_path / "onnx", silent)
    assert OnnxExporter().refusals(artifact_of().plan) == []


def test_notes_say_what_the_container_changes(artifact_of: Maker, tmp_path: Path) -> None:
    def notes(scheme: str, level: int = 4) -> str:
        return " ".join(OnnxExporter(level).notes(artifact_of("llama", scheme).plan))

    assert notes("w4g32") == notes("q8_0") == ""
    assert "4-bit fields" in notes("w3g32")
    assert "blocks of 128 that repeat" in notes("w4gc")
    assert "groups of 256 are stored as blocks of 128" in notes("w2g256")
    assert "no fast kernel" in notes("w2g16")
    assert "decodes 8-bit weights again" in notes("q8_0", level=0)
    long = artifact_of("llama", "w4g32", max_position_embeddings=4_000_000, layers=1).plan
    text = " ".join(OnnxExporter().notes(long))
    assert "524288 positions of the model's 4000000" in text
    assert "allocate 4096 tokens" in text
    bare = replace(artifact_of().plan, files=tmp_path)
    assert "no tokenizer.json" in " ".join(OnnxExporter().notes(bare))


def test_only_our_folders_are_opened(artifact_of: Maker, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"no model\.onnx"):
        OnnxExporter().opened(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff not a graph")
    with pytest.raises(RefusedError, match="damaged"):
        OnnxExporter().opened(tmp_path)
    exported = OnnxExporter().export(artifact_of(), tmp_path / "onnx", silent)
    data = (exported.target / "model.onnx.data").read_bytes()
    (exported.target / "model.onnx.data").write_bytes(data[:-1])
    with pytest.raises(RefusedError, match=r"not sound.*ends beyond"):
        OnnxExporter().opened(exported.target)
    (exported.target / "model.onnx.data").write_bytes(data)
    model = load_graph(exported.target)
    del model.metadata_props["signround.scheme"]
    ir.save(model, exported.target / "model.onnx")
    with pytest.raises(RefusedError, match="not written by signround"):
        OnnxExporter().opened(exported.target)
