"""Quantised embeddings and heads, and grids that differ from matrix to matrix, in the ONNX folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters.onnx import linear
from exporters.onnx.builder import GraphBuilder
from exporters.onnx.checker import problems_of
from exporters.onnx.data_files import save_chunks
from exporters.onnx.exporter import OnnxExporter
from exporters.onnx.layouts import GENAI, Places
from exporters.onnx.reader import load_graph
from signround.architecture import EMBEDDING, HEAD
from signround.artifact import QuantizedCheckpoint
from signround.checkpoint import SourceCheckpoint
from signround.events import silent
from signround.file_types import Overrides
from signround.plan import CalibrationSpec, ModelPlan, make_plan
from signround.recipes import settings_for
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

Maker = Callable[..., QuantizedCheckpoint]
EXPORTER = OnnxExporter()
COVERING = [
    ("llama", "w4g32", [("lm_head", "w4g32")]),
    ("llama", "w4g32", [("^output", "w8g32-asym")]),
    ("llama", "w2g64", [("embed_tokens", "w3g64-asym")]),
    ("llama", "w4g32", [("token_embd", "w2g16-asym")]),  # an odd number of bytes of zero points a row
    ("llama-untied", "w4g32", [("lm_head", "w8g32"), ("embed", "w4g64-asym")]),
    ("llama-untied", "w8g32", [("lm_head", "w3g32"), ("embed", "w2gc"), (r"layers\.1\.", "float")]),
    ("llama-untied", "w4g32", [("embed", "w8g128")]),
    ("smollm2-like", "w4g128-asym", [("lm_head", "w2g128-asym")]),  # rows of 192: a padded block
    ("smollm2-like", "w3g32", [("embed", "w8g256")]),
    ("llama-biased", "w4g32", [("v_proj", "w8g32"), ("down_proj", "float"), (r"blk\.0\.attn_q", "f16")]),
    ("qwen2", "w4g32", [("attn_v", "w8g32"), ("down_proj", "w4g64-asym"), ("lm_head", "w3gc-asym")]),
    ("mistral", "w4g32", [("lm_head", "float"), (r"blk\.[01]\.ffn", "w3g128"), ("attn_output", "w2g32")]),
]  # fmt: skip


@pytest.fixture(scope="module")
def artifact_of(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    models: dict[str, Path] = {}

    def make(family: str, scheme: str, overrides: Overrides) -> QuantizedCheckpoint:
        folder = tmp_path_factory.mktemp("outer")
        if family not in models:
            models[family] = write_small_model(folder / "model", family)
        return write_rounded_artifact(models[family], folder / "artifact", scheme, overrides=overrides)

    return make


@pytest.mark.parametrize(("family", "scheme", "overrides"), COVERING)
def test_every_tensor_comes_back(
    artifact_of: Maker, tmp_path: Path, family: str, scheme: str, overrides: Overrides
) -> None:
    artifact = artifact_of(family, scheme, overrides)
    assert EXPORTER.refusals(artifact.plan) == []
    exported = EXPORTER.export(artifact, tmp_path / "onnx", silent)
    read = list(EXPORTER.read_back(EXPORTER.opened(exported.target)))
    assert sorted(name for name, _ in read) == sorted(artifact.layers)
    for name, tensor in read:
        stored = artifact.quantized(name)
        assert tensor.grid == stored.grid, name
        assert torch.equal(tensor.codes, stored.codes), name
        assert all(torch.equal(tensor.fields[field], stored.fields[field]) for field in stored.fields), name
    decoded = list(EXPORTER.decode_independently(exported))
    assert sorted(name for name, _ in decoded) == sorted([*artifact.layers, *artifact.kept])
    for name, weight in decoded:
        assert weight.dtype == torch.float32
        assert torch.equal(weight, artifact.weight(name)), name
    written = sum(path.stat().st_size for path in exported.files)
    assert EXPORTER.estimated_bytes(artifact.plan) == pytest.approx(written, rel=0.02)


def constants(folder: Path) -> dict[str, Any]:
    return {name: value.const_value for name, value in load_graph(folder).graph.initializers.items()}


@pytest.mark.parametrize("kind", ["w8g32", "w4g32-asym", "w3g32", "w2g64"])
def test_a_tied_table_lies_in_the_file_once(artifact_of: Maker, tmp_path: Path, kind: str) -> None:
    """In two shapes over the same bytes; scales and zero points are one constant with two users."""
    artifact = artifact_of("llama", "w4g32", [("lm_head", kind)])
    target = EXPORTER.export(artifact, tmp_path / "onnx", silent).target
    found = constants(target)
    blocks, rows = found["embedding.codes"], found["embedding.rows"]
    assert (rows.location, rows.offset, rows.length) == (blocks.location, blocks.offset, blocks.length)
    assert len(blocks.shape) == 3
    assert tuple(rows.shape) == (512, rows.length // 512)
    lengths = sum(tensor.length for tensor in found.values() if isinstance(tensor, ir.ExternalTensor))
    assert (target / "model.onnx.data").stat().st_size == lengths - rows.length
    graph = load_graph(target).graph
    nodes = {node.name: [value.name if value else "" for value in node.inputs] for node in graph}
    assert nodes["head"][1] == "embedding.codes"
    assert nodes["embedding"][0] == "embedding.rows"
    assert nodes["head"][2:] == nodes["embedding"][2:]


def test_an_untied_table_has_no_second_shape(artifact_of: Maker, tmp_path: Path) -> None:
    artifact = artifact_of("llama-untied", "w4g32", [("embed|lm_head", "w8g32")])
    found = constants(EXPORTER.export(artifact, tmp_path / "onnx", silent).target)
    assert tuple(found["embedding.codes"].shape) == (512, 128)
    assert tuple(found["head.codes"].shape) == (512, 4, 32)
    assert "embedding.rows" not in found


def test_large_tables_are_packed_in_slices(artifact_of: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = artifact_of("llama-untied", "w4g32", [("lm_head", "w2g16-asym"), ("embed", "w3g128")])
    whole = (EXPORTER.export(artifact, tmp_path / "whole", silent).target / "model.onnx.data").read_bytes()
    monkeypatch.setattr(linear, "SLICE_WEIGHTS", 100 * 128)
    most = 0
    read = QuantizedCheckpoint.quantized

    def counted(self: QuantizedCheckpoint, name: str, rows: range | None = None) -> Any:
        nonlocal most
        tensor = read(self, name, rows)
        most = max(most, tensor.codes.numel())
        return tensor

    monkeypatch.setattr(QuantizedCheckpoint, "quantized", counted)
    assert (EXPORTER.export(artifact, tmp_path / "parts", silent).target / "model.onnx.data").read_bytes() == whole
    assert most == 100 * 128


def nodes_of(artifact: QuantizedCheckpoint, folder: Path, exporter: OnnxExporter = EXPORTER) -> dict[str, Any]:
    return {node.name: node for node in load_graph(exporter.export(artifact, folder, silent).target).graph}


def test_q_k_and_v_are_one_node_only_where_they_agree(artifact_of: Maker, tmp_path: Path) -> None:
    overrides = [(r"layers\.1\.self_attn\.v", "w8g32"), (r"layers\.2\.self_attn\.[qkv]", "w3g32"),
                 (r"layers\.3\.self_attn\.k", "float")]  # fmt: skip
    folder = tmp_path / "model"
    write_small_model(folder, "llama", layers=4)
    artifact = write_rounded_artifact(folder, tmp_path / "artifact", "w4g32", overrides=overrides)
    found = nodes_of(artifact, tmp_path / "onnx")
    assert found["model.layers.0.self_attn.qkv_proj"].attributes["bits"].as_int() == 4
    assert found["model.layers.2.self_attn.qkv_proj"].attributes["bits"].as_int() == 4  # 3 bits in fields of 4
    bits = {part: found[f"model.layers.1.self_attn.{part}_proj"].attributes["bits"].as_int() for part in "qkv"}
    assert bits == {"q": 4, "k": 4, "v": 8}
    kinds = {part: found[f"model.layers.3.self_attn.{part}_proj"].op_type for part in "qkv"}
    assert kinds == {"q": "MatMulNBits", "k": "FusedMatMul", "v": "MatMulNBits"}


@pytest.mark.parametrize(
    ("exporter", "down", "head", "others"),
    [
        (OnnxExporter(), 4, 4, 4),
        (OnnxExporter(exact_down_proj=True), 0, 4, 4),
        (OnnxExporter(accuracy_level=0, keep_fast=True), 0, 4, 0),
        (OnnxExporter(accuracy_level=0), 0, 0, 0),
    ],
)
def test_levels_of_nodes(
    artifact_of: Maker, tmp_path: Path, exporter: OnnxExporter, down: int, head: int, others: int
) -> None:
    """The 8-bit head and the 2-bit outputs leave level 4 only where level 0 is asked for by its number."""
    artifact = artifact_of("llama-untied", "w4g32", [("lm_head", "w8g32"), ("o_proj", "w2g32")])
    levels = {
        name: node.attributes["accuracy_level"].as_int()
        for name, node in nodes_of(artifact, tmp_path / "onnx", exporter).items()
        if node.op_type == "MatMulNBits"
    }
    assert levels.pop("head") == head
    for name, level in levels.items():
        assert level == (down if name.endswith("down_proj") else head if name.endswith("o_proj") else others), name
    notes = " ".join(exporter.notes(artifact.plan))
    assert ("some 100 times slower" in notes) == (exporter == OnnxExporter(accuracy_level=0))
    assert ("products of 8 bits stay" in notes) == (exporter not in (OnnxExporter(), OnnxExporter(accuracy_level=0)))


def plan_of(model: Path, scheme: str, *overrides: tuple[str, str]) -> ModelPlan:
    tuning = settings_for("rtn", context=64, samples=2, seqlen=16)
    return make_plan(SourceCheckpoint(model), scheme, tuning, CalibrationSpec("self"), overrides=overrides)


def test_steps_to_more_exact_graphs(llama_folder: Path) -> None:
    """Only through what is fast; a graph that would not change is not written again."""

    def steps(scheme: str, *overrides: tuple[str, str]) -> list[OnnxExporter]:
        plan, found, step = plan_of(llama_folder, scheme, *overrides), [], EXPORTER.more_exact
        while (more := step(plan)) is not None:
            found.append(more)
            step = more.more_exact
        return found

    down = OnnxExporter(exact_down_proj=True)
    assert steps("w4g32") == [down, OnnxExporter(accuracy_level=0)]
    assert steps("w3g32-asym") == [down, OnnxExporter(accuracy_level=0)]
    assert steps("w4g32", ("lm_head", "w8g32")) == [down, OnnxExporter(accuracy_level=0, keep_fast=True)]
    assert steps("w4g32", ("down_proj", "w8g32")) == [OnnxExporter(accuracy_level=0, keep_fast=True)]
    assert steps("w2g64", ("lm_head", "w4g32"))[-1].keep_fast
    assert steps("w2g64") == steps("w8g32") == steps("q8_0") == []
    assert OnnxExporter(fallback=False).more_exact(plan_of(llama_folder, "w4g32")) is None


def test_an_embedding_that_is_only_looked_up_has_no_level(untied_folder: Path) -> None:
    for kind in ("w8g32", "w2g16"):
        plan = plan_of(untied_folder, "w4g32", ("embed_tokens", kind))
        step = OnnxExporter(exact_down_proj=True).more_exact(plan)
        assert step == OnnxExporter(accuracy_level=0)
        assert "slower" not in " ".join(step.notes(plan))
        assert not any("products of" in note for note in step.notes(plan))
    plan = plan_of(untied_folder, "w4g32", ("lm_head", "w2g16"))
    assert "no fast kernel" in " ".join(EXPORTER.notes(plan))


@pytest.mark.parametrize("kind", ["q4_1", "q5_0", "iq4_nl", "mxfp4"])
def test_what_no_node_can_hold_is_refused_by_name(llama_folder: Path, kind: str) -> None:
    (refusal,) = EXPORTER.refusals(plan_of(llama_folder, "w4g32", ("lm_head", kind)))
    assert "cannot hold this grid" in refusal.problem
    assert refusal.problem.endswith(": model.embed_tokens.weight")
    (refusal,) = EXPORTER.refusals(plan_of(llama_folder, "w4g32", ("down_proj", kind)))
    assert refusal.problem.endswith(": model.layers.0.mlp.down_proj.weight and 1 more")


# ---- what is wrong with a file is found


def _gather(model: Any) -> Any:
    return next(node for node in model.graph if node.op_type == "GatherBlockQuantized")


def _set(name: str, value: int) -> Callable[[Any], None]:
    return lambda model: _gather(model).attributes.update({name: ir.AttrInt64(name, value)})


def _feed_the_table(model: Any) -> None:
    _gather(model).inputs[0].const_value = None


def _lose_scales(model: Any) -> None:
    _gather(model).replace_input_with(2, None)


@pytest.mark.parametrize(
    ("mutate", "found"),
    [
        (_set("bits", 3), "3 bits"),
        (_set("block_size", 48), "blocks of 48"),
        (_set("quantize_axis", 2), "quantize_axis 2 must be the last"),
        (_set("bits", 8), "input 2 must have shape"),
        (_set("block_size", 64), "input 2 must have shape"),
        (_feed_the_table, "input 0 is not a constant"),
        (_lose_scales, "input 2 is missing"),
    ],
)
def test_checker_catches(artifact_of: Maker, tmp_path: Path, mutate: Callable[[Any], None], found: str) -> None:
    artifact = artifact_of("llama", "w4g32", [("lm_head", "w4g32-asym")])
    exported = EXPORTER.export(artifact, tmp_path / "onnx", silent)
    model = load_graph(exported.target)
    assert problems_of(model, exported.target) == []
    mutate(model)
    assert found in " ".join(problems_of(model, exported.target))


def test_an_embedding_that_is_not_the_head_is_found(artifact_of: Maker, tmp_path: Path) -> None:
    """A tied table that both nodes read at different places: it comes twice, which the comparison counts as wrong."""
    artifact = artifact_of("llama", "w4g32", [("lm_head", "w4g32")])
    exported = EXPORTER.export(artifact, tmp_path / "onnx", silent)
    model = load_graph(exported.target)
    value = model.graph.initializers["embedding.rows"]
    old = value.const_value
    value.const_value = ir.ExternalTensor(
        old.location, old.offset + 64, old.length, old.dtype, shape=old.shape, name=old.name, base_dir=old.base_dir
    )
    ir.save(model, exported.target / "model.onnx")
    names = [name for name, _ in EXPORTER.decode_independently(exported)]
    assert names.count(EMBEDDING) == 2


def test_a_view_of_a_constant_that_is_not_external(tmp_path: Path) -> None:
    builder = GraphBuilder()
    table = builder.constant("table", np.arange(6, dtype=np.uint8))
    view = builder.view("view", table, (2, 3))
    output = builder.op("Identity", "same", [view])[0]
    builder.output(output, "output", ir.DataType.UINT8, [2, 3])
    model = builder.model("views", 21, 10, "test", "0")
    places = Places(GENAI, "model.onnx", "model.onnx.data", None)
    save_chunks(model, builder.views, tmp_path, places, lambda *_: None)
    stored = ir.load(tmp_path / "model.onnx").graph.initializers["view"].const_value
    assert stored.numpy().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_nodes_say_what_they_hold(artifact_of: Maker, tmp_path: Path) -> None:
    artifact = artifact_of("llama-untied", "w4g32", [("lm_head", "w8g32"), ("embed", "w3g64")])
    found = nodes_of(artifact, tmp_path / "onnx")
    assert json.loads(found["head"].metadata_props["signround.weights"]) == [[HEAD, 512]]
    assert json.loads(found["embedding"].metadata_props["signround.weights"]) == [[EMBEDDING, 512]]
    assert json.loads(found["embedding"].metadata_props["signround.grid"])["bits"] == 3
