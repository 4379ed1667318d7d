"""Stacked experts in GGUF: order, sizes, keys, routers, refusals; one expert in memory at a time."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from exporters.gguf.container import GgufFile
from exporters.gguf.exporter import GgufExporter
from exporters.gguf.layout import TYPE_BYTES
from signround.artifact import QuantizedCheckpoint
from signround.checkpoint import SourceCheckpoint
from signround.errors import RefusedError
from signround.events import silent
from signround.experts import is_expert
from signround.formats import grid_for
from signround.parity import compare_weights
from signround.plan import BlockPlan, CalibrationSpec, ModelPlan, make_plan
from signround.qtensor import QuantizedTensor
from signround.recipes import settings_for
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import MIXTURES, write_small_model

PARTS = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}


def plan_of(folder: Path, family: str, **overrides: object) -> ModelPlan:
    checkpoint = SourceCheckpoint(write_small_model(folder, family, **overrides))
    settings = settings_for("rtn", context=64, samples=2, seqlen=16)
    return make_plan(checkpoint, "w4g32", settings, CalibrationSpec("self"))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, QuantizedCheckpoint]:
    folder = tmp_path_factory.mktemp("mixtures")
    return {
        family: write_rounded_artifact(
            write_small_model(folder / family, family), folder / f"{family}-artifact", "q4_1"
        )
        for family in MIXTURES
    }


@pytest.mark.parametrize("family", MIXTURES)
def test_stacks_are_the_experts_in_order(
    family: str, artifacts: dict[str, QuantizedCheckpoint], tmp_path: Path
) -> None:
    """Read with gguf-py alone: [experts, rows, columns], router and shared gate as llama.cpp wants them."""
    artifact = artifacts[family]
    mixture = artifact.plan.architecture.mixture
    assert mixture is not None
    path = GgufExporter().export(artifact, tmp_path, silent).target
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    module, names = ("block_sparse_moe", 1) if family == "mixtral" else ("mlp", 0)
    for block in range(2):
        prefix = f"model.layers.{block}.{module}"
        for part, spellings in PARTS.items():
            stack = tensors[f"blk.{block}.ffn_{part}_exps.weight"]
            sizes = [int(size) for size in stack.shape]
            weights = dequantize(stack.data, stack.tensor_type).reshape(sizes[::-1])
            assert len(weights) == mixture.experts
            for expert, weight in enumerate(weights):
                wanted = artifact.weight(f"{prefix}.experts.{expert}.{spellings[names]}.weight")
                assert np.array_equal(weight, wanted.numpy())
        router = tensors[f"blk.{block}.ffn_gate_inp.weight"]
        assert router.data.dtype == np.float32
        assert np.array_equal(router.data, artifact.weight(f"{prefix}.gate.weight").numpy())
        if mixture.shared:
            gate = tensors[f"blk.{block}.ffn_gate_inp_shexp.weight"]
            assert gate.data.shape == (128,)
            assert np.array_equal(gate.data, artifact.weight(f"{prefix}.shared_expert_gate.weight").numpy()[0])


@pytest.mark.parametrize("family", MIXTURES)
def test_keys(family: str, artifacts: dict[str, QuantizedCheckpoint], tmp_path: Path) -> None:
    values = GgufFile(GgufExporter().export(artifacts[family], tmp_path, silent).target, TYPE_BYTES).values
    wanted = {
        "qwen2-moe": ("qwen2moe", {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 96,
                                   "expert_shared_feed_forward_length": 160}),
        "qwen3-moe": ("qwen3moe", {"expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 96}),
        "mixtral": ("llama", {"expert_count": 4, "expert_used_count": 2}),
    }  # fmt: skip
    architecture, numbers = wanted[family]
    assert values["general.architecture"] == architecture
    assert {key: value for key, value in values.items() if "expert" in key} == {
        f"{architecture}.{key}": value for key, value in numbers.items()
    }
    assert values[f"{architecture}.feed_forward_length"] == 256


@pytest.mark.parametrize("float_type", ["f32", "f16", "bf16"])
def test_routers_stay_float32(float_type: str, artifacts: dict[str, QuantizedCheckpoint], tmp_path: Path) -> None:
    exporter, artifact = GgufExporter(float_type=float_type), artifacts["qwen2-moe"]
    exported = exporter.export(artifact, tmp_path, silent)
    found = compare_weights(artifact, exporter, exported)
    assert found.passed
    assert found.reader == "independent"
    assert len(exported.untouched) == 4


def test_one_expert_in_memory_at_a_time(
    artifacts: dict[str, QuantizedCheckpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = QuantizedCheckpoint.quantized

    def counted(self: QuantizedCheckpoint, name: str, rows: range | None = None) -> QuantizedTensor:
        nonlocal most
        tensor = read(self, name, rows)
        alive.append(weakref.ref(tensor.codes))
        gc.collect()
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(QuantizedCheckpoint, "quantized", counted)
    exporter = GgufExporter()
    exported = exporter.export(artifacts["qwen3-moe"], tmp_path, silent)
    assert 1 <= most <= 2
    for reader in (exporter.decode_independently, exporter.read_back):
        sizes = [value.numel() if isinstance(value, torch.Tensor) else value.codes.numel()
                 for name, value in reader(exported) if is_expert(name)]  # fmt: skip
        assert set(sizes) == {96 * 128}


def test_experts_of_one_stack_have_one_grid(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    layers = tuple(
        replace(layer, grid=grid_for("q8_0")) if layer.name == name else layer for layer in plan.blocks[1].layers
    )
    mixed = replace(plan, blocks=(plan.blocks[0], BlockPlan(1, layers, plan.blocks[1].kept)))
    (refusal,) = GgufExporter().refusals(mixed)
    assert "the experts in blk.1.ffn_down_exps.weight have different grids" in refusal.sentence()


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("qwen2-moe", {"norm_topk_prob": True}, "qwen2moe never makes the scores of a token's experts sum to one"),
        ("qwen3-moe", {"norm_topk_prob": False}, "qwen3moe always makes the scores of a token's experts sum to one"),
        ("qwen2-moe", {"tie_word_embeddings": True}, "qwen2moe needs a head of its own"),
        ("qwen2-moe", {"head_dim": 64}, "qwen2moe has heads of hidden / heads = 32 values"),
        ("qwen3-moe", {"attention_bias": True}, "qwen3moe has no place for biases of self_attn.o_proj"),
        ("mixtral", {"intermediate_size": 144}, "rows of 144 weights are not a multiple of 32"),
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_refused(
    family: str, changes: dict[str, object], problem: str, tmp_path: Path
) -> None:
    (refusal,) = GgufExporter().refusals(plan_of(tmp_path, family, **changes))
    assert problem in refusal.sentence()


def test_sliding_windows_of_qwen_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="use_sliding_window is True"):
        plan_of(tmp_path, "qwen3-moe", use_sliding_window=True)
