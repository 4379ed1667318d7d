"""One block at a time must be the whole model: transformers' own forward pass in float32 is the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from signround.blocks import DecoderBlocks
from signround.checkpoint import SourceCheckpoint
from signround.errors import RefusedError
from signround.runtimes import torch_blocks
from signround.runtimes.torch_blocks import float_model
from tests.small_models import FAMILIES, write_small_model

HALF_WINDOWED: dict[str, Any] = {
    "use_sliding_window": True,
    "sliding_window": 16,
    "layer_types": ["full_attention", "sliding_attention"],
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    "narrow-window": ("mistral", {"sliding_window": 16}),
    "window-of-one-block": ("qwen2", HALF_WINDOWED),
    "first-block-windowed": ("qwen3", HALF_WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]}),
    "linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "sharded": ("llama-untied", {"shard_bytes": 200_000}),
    "fp16": ("llama", {"dtype": torch.float16}),
    "fp32": ("qwen2", {"dtype": torch.float32}),
    "gemma2-uncapped": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2-pattern": ("gemma2", {"num_hidden_layers": 3, "layer_types": None}),
    "gemma3-pattern": ("gemma3", {"num_hidden_layers": 7, "layer_types": None}),
    "gemma3-local-theta": ("gemma3", {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e3}}}),
    "phi3-window": ("phi3", {"sliding_window": 16}),
    "longrope-long": ("phi4-mini-like", {"original_max_position_embeddings": 32}),
    "smollm3-own-pattern": ("smollm3", {"no_rope_layers": [0, 1, 1, 0]}),
    "smollm3-windows": ("smollm3", {"use_sliding_window": True, "sliding_window": 16}),
    "granite-biased": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "olmo2-biased": ("olmo2", {"attention_bias": True}),
}  # fmt: skip
NUMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "scores' cap": ("gemma2", {"attn_logit_softcapping": 1.5}),
    "logits' cap": ("gemma2", {"final_logit_softcapping": 4.0}),
    "scores' scale": ("gemma2", {"query_pre_attn_scalar": 32}),
    "window": ("gemma3", {"sliding_window": 24}),
    "which blocks have it": ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}),
    "global theta": ("gemma3", {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e4}}}),
    "local theta": ("gemma3", {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e5}}}),
    "rotating part": ("phi4-mini-like", {"original_max_position_embeddings": 32}),
    "blocks without positions": ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
    "embedding": ("granite", {"embedding_multiplier": 2.5}),
    "attention": ("granite", {"attention_multiplier": 0.2}),
    "residual": ("granite", {"residual_multiplier": 0.6}),
    "logits": ("granite", {"logits_scaling": 3.0}),
}  # fmt: skip
WINDOWS = torch.randint(3, 512, (3, 64), generator=torch.Generator().manual_seed(0))


def transformers_logits(folder: Path, windows: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        logits: Tensor = model(windows).logits
    return logits


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_block_by_block_is_the_whole_model(variant: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[variant]
    folder = write_small_model(tmp_path / "model", family, **overrides)
    found = torch.cat(list(float_model(SourceCheckpoint(folder)).logits(WINDOWS)))
    assert found.dtype == torch.float32
    assert relative_error(found, transformers_logits(folder, WINDOWS)) <= 1e-5


@pytest.mark.parametrize("number", NUMBERS)
def test_every_number_matters(number: str, tmp_path: Path) -> None:
    """Or equality with transformers would prove nothing: with another number the same weights give other logits, and
    ours follow."""
    family, changes = NUMBERS[number]
    folder = write_small_model(tmp_path / "model", family)
    before = transformers_logits(folder, WINDOWS)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    after = transformers_logits(folder, WINDOWS)
    assert relative_error(after, before) > 1e-3
    found = torch.cat(list(float_model(SourceCheckpoint(folder)).logits(WINDOWS)))
    assert relative_error(found, after) <= 1e-5


def test_a_sliding_window_matters(tmp_path: Path) -> None:
    """Or the windowed variants above would prove nothing."""
    full = write_small_model(tmp_path / "full", "mistral")
    narrow = write_small_model(tmp_path / "narrow", "mistral", sliding_window=16)
    logits = [torch.cat(list(float_model(SourceCheckpoint(folder)).logits(WINDOWS))) for folder in (full, narrow)]
    assert torch.allclose(logits[0][:, :16], logits[1][:, :16], atol=1e-5)
    assert relative_error(logits[1][:, 16:], logits[0][:, 16:]) > 1e-3


def test_small_passes_and_batches_give_the_same_logits(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text runs in passes; what is cut where must not show."""
    model = float_model(SourceCheckpoint(llama_folder))
    whole = torch.cat(list(model.logits(WINDOWS)))
    monkeypatch.setattr(torch_blocks, "HIDDEN_BYTES", 1)
    monkeypatch.setattr(torch_blocks, "LOGIT_BYTES", 1)
    parts = list(model.logits(WINDOWS))
    assert [len(part) for part in parts] == [1, 1, 1]
    assert relative_error(torch.cat(parts), whole) < 1e-6


def test_only_one_block_is_read_at_a_time(untied_folder: Path) -> None:
    checkpoint = SourceCheckpoint(untied_folder)
    asked: list[str] = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return checkpoint.read(name)

    blocks = DecoderBlocks(checkpoint.config, read)
    assert asked == []
    blocks.block(1)
    assert asked
    assert all(name.startswith("model.layers.1.") for name in asked)
    asked.clear()
    blocks.head()
    assert sorted(asked) == ["lm_head.weight", "model.norm.weight"]


def test_a_block_is_a_copy_without_gradients(llama_folder: Path) -> None:
    checkpoint = SourceCheckpoint(llama_folder)
    blocks = DecoderBlocks(checkpoint.config, checkpoint.read)
    first, again = blocks.block(0), blocks.block(0)
    name = "self_attn.q_proj.weight"
    with torch.no_grad():
        first.get_parameter(name).zero_()
    assert torch.equal(again.get_parameter(name), checkpoint.read(f"model.layers.0.{name}").float())
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert not again.training


def test_replaced_weights_are_used_and_carry_gradients(llama_folder: Path) -> None:
    checkpoint = SourceCheckpoint(llama_folder)
    blocks = DecoderBlocks(checkpoint.config, checkpoint.read)
    block = blocks.block(0)
    hidden = blocks.embed(WINDOWS)
    name = "mlp.down_proj.weight"
    weight = torch.zeros_like(block.get_parameter(name), requires_grad=True)
    replaced = blocks.run(block, hidden, 0, {name: weight})
    assert not torch.equal(replaced, blocks.run(block, hidden, 0))
    assert torch.equal(blocks.run(block, hidden, 0), blocks.run(block, hidden, 0, {}))
    (gradient,) = torch.autograd.grad(replaced.square().mean(), [weight])
    assert gradient.abs().sum() > 0
    block_with_zero = blocks.block(0)
    with torch.no_grad():
        block_with_zero.get_parameter(name).zero_()
    assert torch.equal(replaced.detach(), blocks.run(block_with_zero, hidden, 0))


def test_run_all_works_in_place_in_any_batch(llama_folder: Path) -> None:
    checkpoint = SourceCheckpoint(llama_folder)
    blocks = DecoderBlocks(checkpoint.config, checkpoint.read)
    block, hidden = blocks.block(0), blocks.embed(WINDOWS)
    expected = blocks.run(block, hidden, 0)
    blocks.run_all(block, hidden, 0, batch=2)
    assert relative_error(hidden, expected) < 1e-6


def test_a_token_without_a_row_is_one_sentence(tmp_path: Path) -> None:
    checkpoint = SourceCheckpoint(write_small_model(tmp_path))
    blocks = DecoderBlocks(checkpoint.config, checkpoint.read)
    with pytest.raises(RefusedError, match="the text holds token 512, the embedding has 512 rows"):
        blocks.embed(torch.tensor([[1, 512]]))
