"""Mixtures of experts in ONNX: every expert comes back from its QMoE node, and what QMoE cannot hold is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters.onnx.checker import problems_of
from exporters.onnx.experts import expert_refusals
from exporters.onnx.exporter import OnnxExporter
from exporters.onnx.inspection import inspected
from exporters.onnx.packing import unpack_bits
from exporters.onnx.reader import load_graph
from signround.artifact import QuantizedCheckpoint
from signround.checkpoint import SourceCheckpoint
from signround.events import silent
from signround.formats import grid_for
from signround.plan import CalibrationSpec, LayerPlan, ModelPlan, make_plan
from signround.recipes import settings_for
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import MIXTURES, write_small_model

pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

Exported = Callable[..., tuple[QuantizedCheckpoint, Path]]
COVERING = [  # experts are 96 wide, which blocks of 64 and 128 do not divide
    ("qwen3-moe", "w4g32"), ("qwen3-moe", "w8g64-asym"), ("qwen2-moe", "w3g128-asym"), ("mixtral", "w4gc"),
    ("mixtral", "q8_0"),
]  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """(artifact, folder) of a small mixture."""
    made: dict[str, tuple[QuantizedCheckpoint, Path]] = {}

    def make(family: str, scheme: str) -> tuple[QuantizedCheckpoint, Path]:
        key = f"{family} {scheme}"
        if key not in made:
            folder = tmp_path_factory.mktemp("onnx")
            write_small_model(folder / "model", family)
            artifact = write_rounded_artifact(folder / "model", folder / "artifact", scheme)
            OnnxExporter().export(artifact, folder / "onnx", silent)
            made[key] = artifact, folder / "onnx"
        return made[key]

    return make


def experts_of(folder: Path) -> list[Any]:
    return [node for node in load_graph(folder).graph if node.op_type == "QMoE"]


@pytest.mark.parametrize(("family", "scheme"), COVERING)
def test_every_tensor_comes_back(exported: Exported, family: str, scheme: str) -> None:
    artifact, folder = exported(family, scheme)
    exporter = OnnxExporter()
    read = dict(exporter.read_back(exporter.opened(folder)))
    assert read.keys() == artifact.layers.keys()
    for name, tensor in read.items():
        stored = artifact.quantized(name)
        assert tensor.grid == stored.grid, name
        assert torch.equal(tensor.codes, stored.codes), name
        assert all(torch.equal(tensor.fields[field], stored.fields[field]) for field in stored.fields), name
    decoded = list(exporter.decode_independently(exporter.opened(folder)))
    assert sorted(name for name, _ in decoded) == sorted([*artifact.layers, *artifact.kept])
    assert all(torch.equal(weight, artifact.weight(name)) for name, weight in decoded)
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert exporter.estimated_bytes(artifact.plan) == pytest.approx(written, rel=0.02)


def test_rows_of_gate_and_up_lie_in_turn(exported: Exported) -> None:
    artifact, folder = exported("mixtral", "w4gc")
    node = experts_of(folder)[1]
    codes = node.inputs[2].const_value.numpy()
    assert codes.shape == (4, 2 * 256, 128 // 2)
    for part, rows in (("w1", slice(0, None, 2)), ("w3", slice(1, None, 2))):
        name = f"model.layers.1.block_sparse_moe.experts.3.{part}.weight"
        assert np.array_equal(unpack_bits(codes[3, rows], 4), artifact.quantized(name).codes.numpy())
    down = artifact.quantized("model.layers.1.block_sparse_moe.experts.3.w2.weight").codes.numpy()
    assert np.array_equal(unpack_bits(node.inputs[5].const_value.numpy()[3], 4), down)
    assert node.inputs[3].const_value.shape == (4, 512, 1)  # whole rows of 128 inputs are one block of 128


def test_blocks_divide_both_widths(exported: Exported) -> None:
    for family, scheme, block in (("qwen2-moe", "w3g128-asym", 32), ("mixtral", "w4gc", 128), ("mixtral", "q8_0", 32)):
        assert {node.attributes["block_size"].as_int() for node in experts_of(exported(family, scheme)[1])} == {block}


def test_scores_are_those_of_the_family(exported: Exported) -> None:
    def attribute(family: str, scheme: str) -> tuple[int, int]:
        node = experts_of(exported(family, scheme)[1])[0]
        return node.attributes["normalize_routing_weights"].as_int(), len(node.inputs)

    assert attribute("qwen3-moe", "w4g32") == attribute("mixtral", "q8_0") == (1, 6 + 1)
    assert attribute("qwen2-moe", "w3g128-asym") == (0, 15)  # the softmax over all experts is an input of its own


def test_down_projections_that_stay_exact_take_their_experts_along(exported: Exported, tmp_path: Path) -> None:
    artifact, _ = exported("mixtral", "w4gc")
    OnnxExporter(exact_down_proj=True).export(artifact, tmp_path / "onnx", silent)
    assert {node.attributes["accuracy_level"].as_int() for node in experts_of(tmp_path / "onnx")} == {0}


def test_notes(exported: Exported) -> None:
    assert "needs onnxruntime 1.31" in " ".join(OnnxExporter().notes(exported("mixtral", "w4gc")[0].plan))
    assert "int8 activations at every" not in " ".join(OnnxExporter().notes(exported("mixtral", "w4gc")[0].plan))
    assert "int8 activations at every" in " ".join(OnnxExporter().notes(exported("mixtral", "q8_0")[0].plan))


def plan_of(model: Path, scheme: str) -> ModelPlan:
    settings = settings_for("rtn", context=64, samples=2, seqlen=16)
    return make_plan(SourceCheckpoint(model), scheme, settings, CalibrationSpec("self"))


def changed(plan: ModelPlan, end: str, scheme: str | None) -> ModelPlan:
    """Layers whose names end so on another grid, or (None) not quantised."""

    def regridded(layer: LayerPlan) -> list[LayerPlan]:
        if not layer.name.endswith(end):
            return [layer]
        return [] if scheme is None else [replace(layer, grid=grid_for(scheme))]

    blocks = (
        replace(block, layers=tuple(new for layer in block.layers for new in regridded(layer))) for block in plan.blocks
    )
    return replace(plan, blocks=tuple(blocks))


@pytest.mark.parametrize("family", MIXTURES)
def test_refusals(family: str, tmp_path: Path) -> None:
    def said(plan: ModelPlan) -> str:
        assert OnnxExporter().refusals(plan) == expert_refusals(plan)
        return " ".join(refusal.sentence() for refusal in expert_refusals(plan))

    model = write_small_model(tmp_path / "model", family)
    last = {"mixtral": "3.w2.weight"}.get(family, "5.down_proj.weight")
    plan = plan_of(model, "w4g32")
    assert OnnxExporter().refusals(plan) == []
    down = last.partition(".")[2]
    assert OnnxExporter().refusals(changed(plan, down, "w3g64-asym")) == []  # 3 bits lie in fields of 4
    assert "fields of different widths" in said(changed(plan, down, "w8g32"))
    assert "experts of 2 bits" in said(plan_of(model, "w2g32"))
    assert "down linears of a block's experts lie on 2 grids" in said(changed(plan, f"experts.{last}", "w8g32"))
    assert "some experts stay unquantised" in said(changed(plan, f"experts.{last}", None))


def test_rows_that_no_block_divides_are_refused(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "qwen3-moe", moe_intermediate_size=40)
    (refusal,) = OnnxExporter().refusals(plan_of(model, "w4g32"))
    assert "divides the experts' groups and rows of 40 and 128" in refusal.sentence()


def _set(name: str, value: int) -> Callable[[Any], None]:
    return lambda node: node.attributes.update({name: ir.AttrInt64(name, value)})


def _forget(node: Any) -> None:
    del node.attributes["accuracy_level"]


def _feed(node: Any) -> None:
    node.inputs[2].const_value = None


@pytest.mark.parametrize(
    ("mutate", "found"),
    [
        (_set("expert_weight_bits", 2), "experts of 2 bits"),
        (_set("expert_weight_bits", 4), "input 2 must have shape"),
        (_set("fc2_expert_weight_bits", 4), "widths of their own"),
        (_set("block_size", 48), "blocks of 48"),
        (_set("block_size", 64), "blocks of 64 do not divide rows of 96"),
        (_set("block_size", 16), "input 3 must have shape"),
        (_set("accuracy_level", 9), "accuracy_level 9"),
        (_set("swiglu_fusion", 2), "swiglu_fusion 2"),
        (_set("weights_prepacked", 1), "weights_prepacked 1"),
        (_set("k", 9), "9 of 8 experts"),
        (_forget, "accuracy_level is missing"),
        (_feed, "not constants of three axes"),
    ],
)
def test_checker_catches(exported: Exported, mutate: Callable[[Any], None], found: str) -> None:
    _, folder = exported("qwen3-moe", "w8g64-asym")
    model = load_graph(folder)
    assert problems_of(model, folder) == []
    mutate(next(node for node in model.graph if node.op_type == "QMoE"))
    assert found in " ".join(problems_of(model, folder))


@pytest.mark.parametrize("index", [3, 6])
def test_scales_of_experts_must_be_finite(exported: Exported, index: int) -> None:
    _, folder = exported("qwen3-moe", "w8g64-asym")
    model = load_graph(folder)
    assert problems_of(model, folder, values=True) == []
    value = next(node for node in model.graph if node.op_type == "QMoE").inputs[index]
    assert value is not None
    assert value.const_value is not None
    scales = value.const_value.numpy().copy()
    scales.flat[-1] = np.nan
    value.const_value = ir.tensor(scales, name=value.name)
    (problem,) = problems_of(model, folder, values=True)
    assert f"input {index} (scales) holds NaN or Inf" in problem


def test_inspection_counts_experts(exported: Exported) -> None:
    artifact, folder = exported("qwen3-moe", "w8g64-asym")
    operators = {entry["operator"]: entry for entry in inspected(folder)["operators"]}
    assert set(operators) == {"MatMulNBits", "QMoE"}
    experts = operators["QMoE"]
    assert (experts["bits"], experts["block_size"], experts["zero_points"], experts["nodes"]) == (8, 32, True, 2)
    counted = sum(entry["weights"] for entry in operators.values())
    assert counted == sum(layer.rows * layer.columns for layer in artifact.plan.layers())
