"""What is refused and what is noted, at plan time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from exporters.gptq.exporter import GptqExporter
from signround.checkpoint import SourceCheckpoint
from signround.errors import RefusedError
from signround.exporting import Exporter, make_exporters
from signround.formats import grid_for
from signround.grid import Grid, SuperBlock
from signround.plan import BlockPlan, CalibrationSpec, ModelPlan, make_plan
from signround.recipes import settings_for
from tests.small_models import write_small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("llama"))


def plan_for(model: Path, scheme: str, zero_floor: int = 0) -> ModelPlan:
    tuning = settings_for("rtn", context=64, samples=2, seqlen=16)
    return make_plan(SourceCheckpoint(model), scheme, tuning, CalibrationSpec("self"), zero_floor)


def with_grid(plan: ModelPlan, grid: Grid, blocks: int | None = None) -> ModelPlan:
    """The plan with another grid in its first `blocks` blocks."""

    def changed(block: BlockPlan) -> BlockPlan:
        return dataclasses.replace(block, layers=tuple(dataclasses.replace(layer, grid=grid) for layer in block.layers))

    count = len(plan.blocks) if blocks is None else blocks
    return dataclasses.replace(plan, blocks=tuple(map(changed, plan.blocks[:count])) + plan.blocks[count:])


def sentences(plan: ModelPlan, exporter: GptqExporter | None = None) -> str:
    return "\n".join(refusal.sentence() for refusal in (exporter or GptqExporter()).refusals(plan))


def test_it_is_the_installed_exporter() -> None:
    assert make_exporters(["gptq"]) == [GptqExporter()]
    options = {"gptq": {"checkpoint_format": "gptq_v2", "max_shard_bytes": "1000"}}
    assert make_exporters(["gptq"], options) == [GptqExporter("gptq_v2", 1000)]
    assert isinstance(GptqExporter(), Exporter)


def test_bad_options_are_refused() -> None:
    with pytest.raises(RefusedError, match="'v3' is not known; allowed: gptq, gptq_v2"):
        GptqExporter("v3")
    with pytest.raises(RefusedError, match="must be positive, got 0"):
        GptqExporter(max_shard_bytes=0)


@pytest.mark.parametrize("scheme", ["w2g16", "w3g32", "w4g128", "w8gc", "q4_0", "q8_0"])
def test_symmetric_schemes_are_taken(model: Path, scheme: str) -> None:
    assert GptqExporter().refusals(plan_for(model, scheme)) == []
    assert GptqExporter("gptq_v2").refusals(plan_for(model, scheme)) == []


@pytest.mark.parametrize("scheme", ["q4_1", "q5_0", "q5_1", "iq4_nl", "mxfp4"])
def test_other_grids_are_refused_once_for_all_layers(model: Path, scheme: str) -> None:
    refusals = GptqExporter().refusals(plan_for(model, scheme))
    assert len(refusals) == 1
    assert "model.layers.0.self_attn.q_proj.weight and 13 more" in refusals[0].problem
    assert "leave out --to gptq" in refusals[0].next_step


def test_two_level_grids_are_refused(model: Path) -> None:
    q6_k = Grid(bits=8, group=16, super_block=SuperBlock(bits=8, groups=8, signed=True))
    assert "one fp16 scale" in sentences(with_grid(plan_for(model, "w4g32"), q6_k))


def test_asymmetric_needs_gptq_as_a_target_from_the_start(model: Path) -> None:
    free, floored = plan_for(model, "w4g32-asym"), plan_for(model, "w4g32-asym", GptqExporter().zero_floor)
    assert "quantize again with --to gptq" in sentences(free)
    assert "gptq.checkpoint_format=gptq_v2" in sentences(free)
    assert sentences(floored) == ""
    assert GptqExporter("gptq_v2").zero_floor == 0
    assert sentences(free, GptqExporter("gptq_v2")) == ""


def test_mixed_grids_are_refused(model: Path) -> None:
    mixed = with_grid(plan_for(model, "w4g32"), grid_for("w8g32"), blocks=1)
    assert "one grid for all linears" in sentences(mixed)


def test_every_reason_is_given_at_once(tmp_path: Path) -> None:
    odd = write_small_model(
        tmp_path, hidden_size=240, intermediate_size=336, num_attention_heads=3, num_key_value_heads=1, head_dim=80
    )
    text = sentences(plan_for(odd, "w4g32"))
    assert "multiples of 32" in text
    assert "groups must divide the inputs" in text
    assert "groups must divide" not in sentences(plan_for(odd, "w4g16"))
    assert "groups must divide" not in sentences(plan_for(odd, "w4gc"))


@pytest.mark.parametrize(
    ("scheme", "said", "unsaid"),
    [
        ("w4g32", ["portable profile"], ["vLLM and the Marlin"]),
        ("w4g16", ["groups of 32, 64, 128 or a row, not of 16"], []),
        ("w3g32", ["3 bits", "vLLM, the onnxruntime-genai builder"], ["portable"]),
        ("w2g64", ["2 bits", "vLLM does not"], ["portable"]),
        ("w8g32", ["8 bits", "ExLlamaV2"], ["portable"]),
        ("w4g32-asym", ["refused by vLLM, by auto-round's torch backend and by gptqmodel"], ["portable"]),
    ],
)
def test_notes_name_the_loaders(model: Path, scheme: str, said: list[str], unsaid: list[str]) -> None:
    text = "\n".join(GptqExporter().notes(plan_for(model, scheme, 1)))
    assert all(part in text for part in said), text
    assert not any(part in text for part in unsaid), text


def test_v2_names_the_readers_that_get_it_silently_wrong(model: Path) -> None:
    text = "\n".join(GptqExporter("gptq_v2").notes(plan_for(model, "w4g32")))
    assert all(reader in text for reader in ("auto-round", "onnxruntime-genai builder", "Intel Neural Compressor"))
    assert "portable" not in text


def test_a_long_row_as_one_group_and_a_missing_tokenizer_are_noted(tmp_path: Path) -> None:
    folder = write_small_model(tmp_path, intermediate_size=512)
    (folder / "tokenizer.json").unlink()
    text = "\n".join(GptqExporter().notes(plan_for(folder, "w4gc")))
    assert "onnxruntime takes blocks of 16, 32, 64, 128 or 256 only" in text
    assert "no tokenizer" in text


def test_float32_biases_are_noted(tmp_path: Path) -> None:
    for dtype, noted in [(torch.float32, True), (torch.bfloat16, False)]:
        folder = write_small_model(tmp_path / str(dtype), "qwen2", dtype=dtype)
        assert ("keeps biases in float16" in "\n".join(GptqExporter().notes(plan_for(folder, "w4g32")))) is noted
