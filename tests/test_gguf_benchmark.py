"""The parts of `benchmarks/gguf_vs_llama_quantize.py` that need no llama.cpp: what it counts, compares and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gguf_vs_llama_quantize import (
    OURS,
    THEIRS,
    Entry,
    Tally,
    check_equal_types,
    given_files,
    lines,
    tensor_types,
)
from benchmarks.llama_quantize import chunks_of, collect_importance
from exporters.gguf.exporter import GgufExporter
from signround.calibration import load_tokenizer
from signround.events import silent
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model


def test_a_tally_is_the_definition_of_its_figures() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, reference = (torch.randn(2, 6, 11, generator=generator).double() for _ in range(2))
    following = torch.randint(11, (2, 6), generator=generator)
    tally = Tally()
    for window in range(2):
        tally.add(logits[window].float(), reference[window].float().log_softmax(-1), following[window])
    ours, wanted = logits.softmax(-1), reference.softmax(-1)
    perplexity, best = ((-part.gather(-1, following[..., None]).log().mean()).exp().item() for part in (ours, wanted))
    figures = tally.figures()
    assert figures["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert figures["perplexity_ratio"] == pytest.approx(perplexity / best, rel=1e-5)
    assert figures["mean_kl"] == pytest.approx((wanted * (wanted / ours).log()).sum(-1).mean().item(), rel=1e-5)
    assert figures["top1"] == (ours.argmax(-1) == wanted.argmax(-1)).double().mean().item()
    assert figures["positions"] == 12


def test_files_are_found_by_the_type_at_the_end_of_their_names(tmp_path: Path) -> None:
    for name in ("Qwen3-26M-Q4_K_M.gguf", "model-q4_k_s.gguf", "sub/iq4_xs.gguf", "model-f32.gguf", "aq4_0.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = given_files([str(tmp_path), "Q2_K=elsewhere.gguf"])
    assert {kind: path.name for kind, path in found.items()} == {
        "q4_k_m": "Qwen3-26M-Q4_K_M.gguf",
        "q4_k_s": "model-q4_k_s.gguf",
        "iq4_xs": "iq4_xs.gguf",
        "q2_k": "elsewhere.gguf",
    }
    (tmp_path / f"{THEIRS}-q4_k_m.gguf").touch()
    assert given_files([str(tmp_path)])["q4_k_m"].name == "Qwen3-26M-Q4_K_M.gguf"
    (tmp_path / "other-q4_k_m.gguf").touch()
    with pytest.raises(SystemExit, match="two files of type q4_k_m"):
        given_files([str(tmp_path)])


def test_files_of_different_types_are_not_compared(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama", layers=1)
    paths = []
    for scheme in ("q4_0", "q4_1"):
        artifact = write_rounded_artifact(model, tmp_path / scheme, scheme)
        paths.append(GgufExporter().export(artifact, tmp_path / f"{scheme}-out", silent).target)
    check_equal_types(paths[0], paths[0])
    assert set(tensor_types(paths[0]).values()) == {2, 30}
    with pytest.raises(SystemExit, match=r"7 tensors differ in type .*blk\.0\.attn_k\.weight 2 / 3"):
        check_equal_types(*paths)


def test_the_table_sets_our_kl_against_theirs_and_names_a_missed_target(tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    path.write_bytes(bytes(1234))
    entries = [Entry("q4_0", THEIRS, path), Entry("q4_0", OURS, path), Entry("q4_0", "peer", path)]
    for entry, divergence in zip(entries, (2.0, 1.5, 1.0), strict=True):
        entry.texts["eval.txt"] = Tally(-10.0, -9.0, divergence, 3, 4)
    rows = lines([entry.as_row() for entry in entries], ["eval.txt"])
    assert "1,234" in rows[2]
    assert "| 5.000e-01 | 75.00% |" in rows[2]
    assert rows[3].endswith("| 0.750 (target 0.60, missed) |")
    assert rows[4].endswith("| 0.500 |")


def test_the_importance_matrix_is_the_squares_of_the_inputs(tmp_path: Path) -> None:
    """Of the first block's q and of its down projection, from hidden states taken another way."""
    from transformers import AutoModelForCausalLM

    folder = write_small_model(tmp_path / "model", "llama", layers=1)
    windows = torch.randint(3, 500, (5, 12), generator=torch.Generator().manual_seed(2))
    imatrix = collect_importance(folder, windows, "text", batch=2)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    block = network.model.layers[0]
    with torch.no_grad():
        normed = block.input_layernorm(network.model.embed_tokens(windows))
    found = imatrix.entries["blk.0.attn_q.weight"]
    torch.testing.assert_close(found.sums[0], normed.square().sum((0, 1)))
    assert found.counts.tolist() == [60]
    assert torch.equal(found.sums, imatrix.entries["blk.0.attn_v.weight"].sums)
    assert imatrix.entries["blk.0.ffn_down.weight"].sums.shape == (1, 256)
    assert set(imatrix.entries) == {
        f"blk.0.{part}.weight"
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    assert (imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size) == (("text",), 5, 12)


def test_chunks_begin_with_bos_where_the_file_says_so(tmp_path: Path) -> None:
    folder = write_small_model(tmp_path / "model", "llama", layers=1)
    text = tmp_path / "text.txt"
    text.write_text("some text of a few words, " * 40)
    plain, marked = (chunks_of(folder, text, 3, 16, bos) for bos in (None, 0))
    tokens = load_tokenizer(folder)(text.read_text(), add_special_tokens=False)["input_ids"]
    assert plain.flatten().tolist() == tokens[:48]
    assert (marked[:, 0] == 0).all()
    assert torch.equal(marked[:, 1:], plain[:, 1:])
