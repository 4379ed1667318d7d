"""Experts that the calibration text hardly reaches are rounded and named; the others see their own tokens alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporters.gguf.exporter import GgufExporter
from exporters.gguf.imatrix import read_imatrix
from signround.artifact import QuantizedCheckpoint
from signround.blocks import DecoderBlocks
from signround.checkpoint import SourceCheckpoint
from signround.estimate import describe
from signround.experts import is_expert, unit_of
from signround.formats import grid_for
from signround.pipeline import Job, prepare, tune
from signround.report import build_report, markdown
from signround.tuning.chain import LEAST_EXPERT_TOKENS
from signround.tuning.inputs import recorded
from signround.tuning.rtn import rounded, rounded_unseen
from tests.small_models import write_small_model

TEXT = "\n".join(f"word{i} {i * 7919} some more text number {i}" for i in range(1500))
EXPERTS, DEAD = 6, (4, 5)


def write_model(folder: Path) -> Path:
    """Mixtral whose experts 4 and 5 never run: of v, -v, w, -w two always score above 0, and the last two score 0."""
    write_small_model(folder, "mixtral", num_local_experts=EXPERTS, dtype=torch.float32)
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, router in weights.items():
        if name.endswith("block_sparse_moe.gate.weight"):
            router[1], router[3] = -router[0], -router[2]
            router[list(DEAD)] = 0
    save_file(weights, path, {"format": "pt"})
    return folder


def job_of(model: Path, out: Path, method: str = "signround") -> Job:
    text = model.parent / "text.txt"
    text.write_text(TEXT)
    steps = {} if method == "rtn" else {"iters": 10}
    return prepare(model, "w4g32", out, method=method, calibration=str(text), samples=16, seqlen=32, **steps)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, QuantizedCheckpoint]:
    folder = tmp_path_factory.mktemp("experts")
    job = job_of(write_model(folder / "model"), folder / "out")
    return job, tune(job)


def test_unreached_experts_are_rounded_and_named(finished: tuple[Job, QuantizedCheckpoint]) -> None:
    job, artifact = finished
    for record in artifact.records():
        tokens = [record.expert_tokens[f"block_sparse_moe.experts.{expert}"] for expert in range(EXPERTS)]
        assert [tokens[expert] for expert in DEAD] == [0, 0]
        assert sum(tokens) == 16 * 32 * 2  # every token has two
        for name, choice in record.kept.items():
            count = record.expert_tokens.get(unit_of(name), LEAST_EXPERT_TOKENS)
            if count < LEAST_EXPERT_TOKENS:
                assert choice == f"rounded ({count} tokens)"
                whole = f"model.layers.{record.index}.{name}"
                plain = rounded_unseen(artifact.layers[whole].grid, job.checkpoint.read(whole))
                found = artifact.quantized(whole)
                assert torch.equal(found.codes, plain.codes)
                assert torch.equal(found.fields["scale"], plain.fields["scale"])
            else:
                assert choice in ("tuned", "start", "rounded")
        assert {"tuned"} & {choice for name, choice in record.kept.items() if is_expert(name)}
        assert record.loss_tuned < record.loss_rounded


def test_the_report_tells_it(finished: tuple[Job, QuantizedCheckpoint], tmp_path: Path) -> None:
    _, artifact = finished
    report = build_report(artifact, "job", "model", None, [], tmp_path)
    for block in report["tuning"]["blocks"]:
        assert block["expert_tokens"]["block_sparse_moe.experts.4"] == 0
        short = sum(count < LEAST_EXPERT_TOKENS for count in block["expert_tokens"].values())
        assert f"| {block['index']} | {EXPERTS} | 0 | " in markdown(report | {"perplexity": None, "exports": {}})
        assert short >= len(DEAD)


def test_the_plan_tells_it(finished: tuple[Job, QuantizedCheckpoint]) -> None:
    (note,) = [note for note in describe(finished[0])["notes"] if note.startswith("experts:")]
    assert "2 of 6 see each token, about 170 calibration tokens an expert" in note
    assert f"fewer than {LEAST_EXPERT_TOKENS} reach are rounded" in note


def test_the_importance_matrix_has_whole_stacks(finished: tuple[Job, QuantizedCheckpoint], tmp_path: Path) -> None:
    """[experts, columns] as llama.cpp has it, with a count of 0 for an expert that no token reached."""
    _, artifact = finished
    importance = artifact.importance()
    assert importance is not None
    GgufExporter().write_importance(importance, tmp_path / "imatrix.gguf", artifact.plan)
    found = read_imatrix(tmp_path / "imatrix.gguf").entries
    for record in artifact.records():
        for part, columns in (("gate", 128), ("up", 128), ("down", 256)):
            squares = found[f"blk.{record.index}.ffn_{part}_exps.weight"]
            assert squares.sums.shape == (EXPERTS, columns)
            assert squares.counts.tolist() == [
                record.expert_tokens[f"block_sparse_moe.experts.{expert}"] for expert in range(EXPERTS)
            ]
            assert squares.unseen == list(DEAD)
            assert not squares.sums[list(DEAD)].any()
    again = GgufExporter().read_importance(tmp_path / "imatrix.gguf", artifact.plan)
    assert again.squares.keys() >= artifact.layers.keys()


def test_a_block_taken_away_comes_back_the_same(finished: tuple[Job, QuantizedCheckpoint]) -> None:
    job, artifact = finished
    files = sorted(path for path in artifact.folder.rglob("*.safetensors"))
    before = {path: path.read_bytes() for path in files}
    (artifact.folder / "blocks" / "00001.safetensors").unlink()
    again = tune(job)
    assert {path: path.read_bytes() for path in files} == before
    assert [record.expert_tokens for record in again.records()] == [
        record.expert_tokens for record in artifact.records()
    ]


def test_rounding_alone_has_no_counts(tmp_path: Path) -> None:
    artifact = tune(job_of(write_model(tmp_path / "model"), tmp_path / "out", "rtn"))
    assert all(record.expert_tokens == {} for record in artifact.records())
    assert all(set(record.kept.values()) == {"rounded"} for record in artifact.records())


@pytest.mark.parametrize("scheme", ["w4g32", "q4_k", "q2_k", "iq4_nl", "q8_0"])
def test_rounding_unseen_weights_is_not_worse_than_plain_rounding(scheme: str) -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(4))
    grid = grid_for(scheme)
    plain, found = (
        float((rounding(grid, weight).decode() - weight).square().sum()) for rounding in (rounded, rounded_unseen)
    )
    assert found <= plain
    assert found < 0.95 * plain or scheme == "q8_0"


def test_two_bits_with_one_scale_a_group_stay_with_the_plain_range() -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(4))
    plain, found = (rounding(grid_for("w2g64"), weight) for rounding in (rounded, rounded_unseen))
    assert torch.equal(found.codes, plain.codes)


def test_experts_are_weighed_by_their_own_tokens(tmp_path: Path) -> None:
    """The mean square of an expert's inputs is over the tokens that the router sent to it."""
    checkpoint = SourceCheckpoint(write_model(tmp_path))
    blocks = DecoderBlocks(checkpoint.config, checkpoint.read)
    block = blocks.block(0)
    hidden = blocks.embed(torch.randint(3, 512, (3, 20), generator=torch.Generator().manual_seed(2)))
    routed: list[tuple[torch.Tensor, torch.Tensor]] = []
    experts = block.get_submodule("mlp.experts")
    experts.register_forward_pre_hook(lambda _, inputs: routed.append(inputs[:2]))
    names = [f"block_sparse_moe.experts.{expert}.w3.weight" for expert in range(EXPERTS)]
    with recorded({name: blocks.linear(block, name) for name in names}) as seen:
        blocks.run_all(block, hidden, 0, batch=2)
    for expert, name in enumerate(names):
        own = torch.cat([inputs[(chosen == expert).any(-1)] for inputs, chosen in routed])
        if expert in DEAD:
            assert name not in seen
            continue
        assert seen[name].tokens == len(own)
        torch.testing.assert_close(seen[name].mean_square, own.square().mean(0), rtol=1e-5, atol=1e-6)
    with recorded({}) as nothing:
        blocks.run_all(block, hidden, 0)
    assert nothing == {}
