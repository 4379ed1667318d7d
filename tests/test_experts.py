"""Experts apart are the experts that transformers runs stacked: values, gradients, whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import signround
from signround.architecture import BLOCK
from signround.blocks import DecoderBlocks
from signround.checkpoint import SourceCheckpoint
from signround.experts import RoutedExperts, is_expert, module_name, unit_of
from signround.loading import whole_model
from signround.runtimes.torch_blocks import float_model, tuned_model
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import MIXTURES, write_small_model


def windows(count: int = 2, tokens: int = 24) -> torch.Tensor:
    return torch.randint(3, 512, (count, tokens), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", MIXTURES)
def test_blocks_and_whole_models_are_what_transformers_loads(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = SourceCheckpoint(write_small_model(tmp_path, family))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    whole = whole_model(tmp_path, checkpoint.tensors, lambda name: checkpoint.read(name).float(), torch.float32)
    with torch.no_grad():
        wanted = reference(windows()).logits
        torch.testing.assert_close(whole(windows()).logits, wanted, rtol=0, atol=0)
    found = torch.cat(list(float_model(checkpoint).logits(windows())))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert whole.state_dict().keys() == reference.state_dict().keys()


@pytest.mark.parametrize("family", MIXTURES)
def test_gradients_are_those_of_the_stacks(family: str, tmp_path: Path) -> None:
    """Each expert's own gradient is its slice of the stacked one; an expert without tokens has none."""
    from transformers import AutoModelForCausalLM

    checkpoint = SourceCheckpoint(write_small_model(tmp_path, family, layers=1))
    blocks = DecoderBlocks(checkpoint.config, checkpoint.read)
    block, hidden = blocks.block(0), blocks.embed(windows(1, 6))
    names = [name.removeprefix(BLOCK.format(0)) for name in blocks.architecture.block_linears(0)]
    experts = [name for name in names if is_expert(name)]
    weights = {name: blocks.parameter(block, name).detach().clone().requires_grad_() for name in experts}
    loss = blocks.run(block, hidden, 0, weights).square().sum()
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)

    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).model.layers[0]
    output = blocks.run(reference, hidden, 0)
    stacks = reference.mlp.experts
    gate_up, down = torch.autograd.grad(output.square().sum(), [stacks.gate_up_proj, stacks.down_proj])
    unused = 0
    for name, gradient in zip(experts, found, strict=True):
        *_, expert, part, _ = module_name(name).split(".")
        stacked = down[int(expert)]
        if part != "down_proj":
            stacked = gate_up[int(expert)].chunk(2)[part == "up_proj"]
        unused += gradient is None
        wanted = torch.zeros_like(stacked) if gradient is None else gradient
        torch.testing.assert_close(stacked, wanted, rtol=1e-4, atol=1e-5)
    assert unused < len(experts)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_loaded_model_is_the_tuned_one(family: str, tmp_path: Path) -> None:
    """Decoded experts lie in the stacks of a transformers model."""
    artifact = write_rounded_artifact(write_small_model(tmp_path / "model", family), tmp_path / "artifact", "w4g32")
    model = signround.load(artifact.folder)
    parameters = dict(model.named_parameters())
    for name in filter(is_expert, artifact.layers):
        *before, expert, part, _ = module_name(name).split(".")
        stack = parameters[".".join([*before, "down_proj" if part == "down_proj" else "gate_up_proj"])][int(expert)]
        place = stack if part == "down_proj" else stack.chunk(2)[part == "up_proj"]
        assert torch.equal(place, artifact.quantized(name).decode()), name
    with torch.no_grad():
        logits = model(windows()).logits
    expected = torch.cat(list(tuned_model(artifact).logits(windows())))
    assert (logits - expected).norm() / expected.norm() <= 1e-5


def test_an_expert_without_tokens_is_not_called() -> None:
    experts = RoutedExperts(3, 8, 16, torch.nn.SiLU())
    called: list[int] = []
    for index, expert in enumerate(experts):
        expert.register_forward_pre_hook(lambda _, inputs, index=index: called.append((index, len(inputs[0]))))
    chosen, scores = torch.tensor([[2, 0], [0, 2], [2, 0]]), torch.rand(3, 2)
    hidden = torch.randn(3, 8)
    found = experts(hidden, chosen, scores)
    assert called == [(0, 3), (2, 3)]
    wanted = [
        sum(score * experts[int(expert)](token) for expert, score in zip(picks, weights, strict=True))
        for token, picks, weights in zip(hidden, chosen, scores, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(wanted))


def test_names() -> None:
    name = "model.layers.3.block_sparse_moe.experts.11.w3.weight"
    assert module_name(name) == "model.layers.3.mlp.experts.11.up_proj.weight"
    assert module_name("block_sparse_moe.gate.weight") == "mlp.gate.weight"
    assert unit_of(name) == "model.layers.3.block_sparse_moe.experts.11"
    plain = "mlp.shared_expert.up_proj.weight"
    assert module_name(plain) == unit_of(plain) == plain
    assert is_expert("mlp.experts.0.down_proj.weight")
    assert not is_expert(plain)
