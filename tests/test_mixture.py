"""Mixtures of experts from config.json: sizes, defaults, every refusal; GPTQ and ONNX refuse them by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporters.gptq.exporter import GptqExporter
from exporters.onnx.exporter import OnnxExporter
from signround.architecture import read_architecture
from signround.checkpoint import SourceCheckpoint
from signround.errors import RefusedError
from signround.families import FAMILIES
from signround.plan import CalibrationSpec, make_plan
from signround.recipes import settings_for
from tests.small_models import MIXTURES, write_small_model

TYPES = [model_type for model_type, family in FAMILIES.items() if family.experts]
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "intermediate_size": 96,
}


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [FAMILIES[model_type].hf_class], **SIZES, **changes}


@pytest.mark.parametrize("model_type", TYPES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(
        **{key: value for key, value in config_of(model_type).items() if key != "architectures"}
    )
    ours = read_architecture(config_of(model_type)).mixture
    assert ours is not None
    count = theirs.num_local_experts if model_type == "mixtral" else theirs.num_experts
    assert (ours.experts, ours.used) == (count, theirs.num_experts_per_tok)
    assert ours.intermediate == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    assert ours.shared == getattr(theirs, "shared_expert_intermediate_size", 0)
    assert ours.norms_scores == getattr(theirs, "norm_topk_prob", True)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_both_spellings_of_the_number_of_experts(key: str) -> None:
    mixture = read_architecture(config_of("qwen3_moe", **{key: 16})).mixture
    assert mixture is not None
    assert mixture.experts == 16


@pytest.mark.parametrize(
    ("model_type", "changes", "problem"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2: some blocks have no experts"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]: some blocks have no experts"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, there are 8 experts"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size is 0, a whole number above 0"),
        ("qwen2_moe", {"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size is missing"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window is True"),
    ],
)
def test_what_is_refused(model_type: str, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(RefusedError, match=problem):
        read_architecture(config_of(model_type, **changes))


@pytest.mark.parametrize("family", MIXTURES)
def test_gptq_refuses_by_name(family: str, tmp_path: Path) -> None:
    checkpoint = SourceCheckpoint(write_small_model(tmp_path, family))
    settings = settings_for("rtn", context=64, samples=2, seqlen=16)
    plan = make_plan(checkpoint, "w4g32", settings, CalibrationSpec("self"))
    (refusal,) = GptqExporter().refusals(plan)
    assert plan.architecture.family.hf_class in refusal.problem
    assert "export this model to gguf instead" in refusal.sentence()
    assert OnnxExporter().refusals(plan) == []


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_keep_their_precision(family: str, tmp_path: Path) -> None:
    checkpoint = SourceCheckpoint(write_small_model(tmp_path, family))
    settings = settings_for("rtn", context=64, samples=2, seqlen=16)
    plan = make_plan(checkpoint, "w4g32", settings, CalibrationSpec("self"))
    routers = {kept.name: kept.reason for kept in plan.kept() if "gate" in kept.name}
    mixture = plan.architecture.mixture
    assert mixture is not None
    assert len(routers) == len(plan.blocks) * (2 if mixture.shared else 1)
    assert all("routers keep their precision" in reason for reason in routers.values())
    linears = len(plan.blocks[0].layers)
    assert linears == 4 + 3 * mixture.experts + (3 if mixture.shared else 0)
