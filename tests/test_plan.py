"""The plan: every tensor accounted for with a reason, refusals all at once, a fingerprint of what decides the bytes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from signround.checkpoint import SourceCheckpoint
from signround.errors import RefusedError
from signround.plan import CalibrationSpec, ModelPlan, make_plan
from signround.recipes import TuningSettings, settings_for
from tests.small_models import FAMILIES, write_small_model

SELF = CalibrationSpec("self")


def settings(seed: int = 0, samples: int = 8) -> TuningSettings:
    return settings_for("signround", "fast", "cpu", context=512, samples=samples, seed=seed)


def plan_of(folder: Path, scheme: str = "w4g32", zero_floor: int = 0) -> ModelPlan:
    return make_plan(SourceCheckpoint(folder), scheme, settings(), SELF, zero_floor)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama_folder, tmp_path / "model")


@pytest.mark.parametrize("family", ["llama", "llama-untied", "llama-biased", "qwen2", "qwen3", "mistral"])
def test_every_tensor_is_in_the_plan_once_with_a_reason(family: str, tmp_path: Path) -> None:
    checkpoint = SourceCheckpoint(write_small_model(tmp_path / family, family))
    plan = make_plan(checkpoint, "w4g32", settings(), SELF)
    layers, kept = list(plan.layers()), list(plan.kept())
    names = [layer.name for layer in layers] + [entry.name for entry in kept] + list(plan.skipped)
    assert sorted(names) == sorted(checkpoint.tensors)
    assert all([*(layer.reason for layer in layers), *(entry.reason for entry in kept), *plan.skipped.values()])
    for layer in layers:
        assert checkpoint.tensors[layer.name].shape == (layer.rows, layer.columns)
        assert "scheme w4g32" in layer.reason
    for entry in kept:
        info = checkpoint.tensors[entry.name]
        assert (info.shape, info.dtype) == (entry.shape, entry.torch_dtype)
    assert [block.index for block in plan.blocks] == [0, 1]
    assert plan.parameters == checkpoint.parameters


def test_reasons_name_the_kind_of_tensor(tmp_path: Path) -> None:
    plan = plan_of(write_small_model(tmp_path / "qwen2", "qwen2"))
    reasons = {entry.name: entry.reason for entry in plan.kept()}
    assert "embedding" in reasons["model.embed_tokens.weight"]
    assert "norm" in reasons["model.layers.0.input_layernorm.weight"]
    assert "bias" in reasons["model.layers.1.self_attn.q_proj.bias"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_in_the_plan_and_an_unknown_one_is_refused(family: str, tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", family)
    plan = plan_of(model)
    listed = [layer.name for layer in plan.layers()] + [kept.name for kept in plan.kept()]
    assert sorted(listed) == sorted(SourceCheckpoint(model).tensors)
    edit(model, lambda tensors: tensors.update({"model.layers.0.mlp.shared.weight": torch.zeros(4)}))
    with pytest.raises(
        RefusedError, match=r"model\.layers\.0\.mlp\.shared\.weight: a tensor that \w+ForCausalLM does not"
    ):
        plan_of(model)


def test_ragged_groups_are_noted(folder: Path) -> None:
    reasons = {layer.name: layer.reason for layer in plan_of(folder, "w4g256").layers()}
    assert "holds 128 of 256 inputs" in reasons["model.layers.0.self_attn.q_proj.weight"]
    assert "last group" not in reasons["model.layers.0.mlp.down_proj.weight"]  # 256 inputs


def test_the_zero_floor_is_in_grid_and_reason(folder: Path) -> None:
    layer = next(plan_of(folder, "w4g32-asym", zero_floor=1).layers())
    assert layer.grid.zero_floor == 1
    assert "zero point >= 1" in layer.reason
    assert next(plan_of(folder, "w4g32", zero_floor=1).layers()).grid.zero_floor == 0


@pytest.mark.parametrize(("scheme", "learns"), [("w4g32", True), ("iq4_nl", True), ("q4_k", False), ("mxfp4", False)])
def test_steps_on_the_scales_are_planned_where_a_scale_can_move(tmp_path: Path, scheme: str, learns: bool) -> None:
    tuning = plan_of(write_small_model(tmp_path / "wide", hidden_size=256), scheme).tuning
    assert (tuning.scale_iters > 0) == (tuning.scale_rate > 0) == learns


def test_bits_per_weight_are_averaged_over_the_linears(folder: Path) -> None:
    assert plan_of(folder).bits_per_weight() == pytest.approx(4.5)


def test_a_tied_head_that_is_stored_is_skipped_with_its_reason(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    plan = plan_of(folder)
    assert "tied" in plan.skipped["lm_head.weight"]
    assert all(entry.name != "lm_head.weight" for entry in plan.kept())


def test_inverse_frequencies_are_skipped_with_their_reason(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda tensors: tensors.update({name: torch.ones(16)}))
    assert "positions" in plan_of(folder).skipped[name]


def test_all_mismatches_are_listed_at_once(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 128)
        tensors["model.layers.0.mlp.experts.0.weight"] = torch.zeros(4)
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(4)
        tensors["an.extra"] = torch.zeros(1)

    edit(folder, spoil)
    with pytest.raises(RefusedError) as caught:
        plan_of(folder)
    found = {refusal.subject: refusal.sentence() for refusal in caught.value.refusals}
    assert list(found) == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "an.extra",
        "model.layers.0.mlp.experts.0.weight",
        "model.layers.2.mlp.up_proj.weight",
    ]
    assert "missing" in found["model.norm.weight"]
    assert "[64, 128]" in found["model.layers.0.self_attn.q_proj.weight"]
    assert "[128, 128]" in found["model.layers.0.self_attn.q_proj.weight"]
    assert "config.json says 2 blocks" in found["model.layers.2.mlp.up_proj.weight"]


def test_an_unknown_architecture_and_scheme_are_refused(folder: Path) -> None:
    with pytest.raises(RefusedError, match="w4g33"):
        plan_of(folder, "w4g33")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["BloomForCausalLM"], "model_type": "bloom"})
    )
    with pytest.raises(RefusedError, match=r"BloomForCausalLM.*LlamaForCausalLM, MistralForCausalLM"):
        plan_of(folder)


def test_the_fingerprint_does_not_know_the_place_or_the_name(folder: Path, tmp_path: Path) -> None:
    before = plan_of(folder)
    after = plan_of(folder.rename(tmp_path / "another name"))
    assert before.model != after.model
    assert before.files != after.files
    assert before.fingerprint == after.fingerprint


def test_the_fingerprint_knows_all_that_decides_the_bytes(folder: Path) -> None:
    checkpoint = SourceCheckpoint(folder)
    plans = {
        "base": make_plan(checkpoint, "w4g32", settings(), SELF),
        "scheme": make_plan(checkpoint, "w4g64", settings(), SELF),
        "floor": make_plan(checkpoint, "w4g32-asym", settings(), SELF),
        "no floor": make_plan(checkpoint, "w4g32-asym", settings(), SELF, zero_floor=1),
        "seed": make_plan(checkpoint, "w4g32", settings(seed=1), SELF),
        "samples": make_plan(checkpoint, "w4g32", settings(samples=9), SELF),
        "file": make_plan(checkpoint, "w4g32", settings(), CalibrationSpec("file", "00")),
        "edited file": make_plan(checkpoint, "w4g32", settings(), CalibrationSpec("file", "01")),
        "weights": dataclasses.replace(make_plan(checkpoint, "w4g32", settings(), SELF), source_sha256="0"),
    }
    assert len({plan.fingerprint for plan in plans.values()}) == len(plans)


@pytest.mark.parametrize("scheme", ["w4g32", "w4g32-asym", "w3gc", "q4_1", "q8_0"])
def test_json_round_trip(folder: Path, scheme: str) -> None:
    plan = plan_of(folder, scheme, zero_floor=1)
    data = json.loads(json.dumps(plan.identity))
    assert data == plan.identity
    again = ModelPlan.from_json(data, plan.model, plan.files)
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    assert again.architecture == plan.architecture


def test_a_plan_of_another_version_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="plan version 99"):
        ModelPlan.from_json(plan_of(folder).identity | {"plan_version": 99}, "m", folder)
