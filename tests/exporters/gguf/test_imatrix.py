"""Importance matrix files against gguf-py's reader, ggml's own writer and quantiser, and against damage."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from exporters.gguf.exporter import GgufExporter
from exporters.gguf.imatrix import Imatrix, imatrix_of, importance_of, read_imatrix, write_imatrix
from signround.checkpoint import SourceCheckpoint
from signround.errors import RefusedError
from signround.importance import Importance, ImportanceFiles, InputSquares
from signround.plan import CalibrationSpec, ModelPlan, make_plan
from signround.recipes import settings_for
from tests import ggml
from tests.ggml_c import imatrix_by_c
from tests.small_models import write_small_model


def random_squares(columns: int, experts: int = 1, seed: int = 0) -> InputSquares:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 5000, (experts,), generator=generator)
    return InputSquares(torch.rand(experts, columns, generator=generator) * 100, counts)


def some_imatrix() -> Imatrix:
    entries = {
        "blk.1.attn_q.weight": random_squares(96, seed=1),
        "blk.0.ffn_down.weight": random_squares(256, seed=2),
        "blk.10.attn_q.weight": random_squares(96, seed=3),
        "blk.0.ffn_gate_exps.weight": random_squares(64, experts=4, seed=4),
        "output.weight": random_squares(32, seed=5),
    }
    return Imatrix(entries, ("calibration.txt",), 128, 512)


def same(one: Imatrix, two: Imatrix) -> bool:
    return (one.datasets, one.chunk_count, one.chunk_size, set(one.entries)) == (
        two.datasets,
        two.chunk_count,
        two.chunk_size,
        set(two.entries),
    ) and all(
        torch.equal(entry.sums, two.entries[name].sums) and torch.equal(entry.counts, two.entries[name].counts)
        for name, entry in one.entries.items()
    )


def planned(folder: Path, family: str = "llama") -> ModelPlan:
    model = write_small_model(folder / "model", family)
    settings = settings_for("rtn", context=64, samples=2, seqlen=16)
    return make_plan(SourceCheckpoint(model), "w4g32", settings, CalibrationSpec("self"))


def measured(plan: ModelPlan) -> Importance:
    found = {layer.name: random_squares(layer.columns, seed=index) for index, layer in enumerate(plan.layers())}
    found["model.embed_tokens.weight"] = random_squares(plan.architecture.hidden, seed=99)
    return Importance(found, "calibration.txt", 4, 64)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "a.gguf", some_imatrix())
    write_imatrix(tmp_path / "b.gguf", some_imatrix())
    assert same(read_imatrix(tmp_path / "a.gguf"), some_imatrix())
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_gguf_py_reads_it(tmp_path: Path) -> None:
    from gguf import GGUFReader

    imatrix = some_imatrix()
    write_imatrix(tmp_path / "a.gguf", imatrix)
    reader = GGUFReader(tmp_path / "a.gguf")
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.type"] == "imatrix"
    assert values["imatrix.datasets"] == ["calibration.txt"]
    assert (values["imatrix.chunk_count"], values["imatrix.chunk_size"]) == (128, 512)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * len(imatrix.entries)
    for name, entry in imatrix.entries.items():
        assert np.array_equal(tensors[f"{name}.in_sum2"].data.reshape(entry.sums.shape), entry.sums.numpy())
        assert np.array_equal(tensors[f"{name}.counts"].data.flatten(), entry.counts.numpy())
    assert tensors["blk.0.ffn_gate_exps.weight.in_sum2"].shape.tolist() == [64, 4]
    assert tensors["blk.0.ffn_gate_exps.weight.counts"].shape.tolist() == [1, 4]


def test_the_bytes_are_those_of_llama_imatrix(tmp_path: Path) -> None:
    """ggml's C writer, called as `llama-imatrix` calls it, makes the same file."""
    imatrix = some_imatrix()
    write_imatrix(tmp_path / "ours.gguf", imatrix)
    tensors = {}
    for name in sorted(imatrix.entries):
        tensors[f"{name}.in_sum2"] = imatrix.entries[name].sums.numpy()
        tensors[f"{name}.counts"] = imatrix.entries[name].counts.numpy().astype(np.float32)[:, None]
    imatrix_by_c(tmp_path / "theirs.gguf", ["calibration.txt"], 128, 512, tensors)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    assert same(read_imatrix(tmp_path / "theirs.gguf"), imatrix)


@pytest.mark.skipif(not ggml.available(), reason="needs xllamacpp, whose library exports ggml's C functions")
@pytest.mark.parametrize("kind", ["q4_0", "q2_k", "q4_k", "iq4_xs"])
def test_the_weights_are_those_of_llama_quantize(kind: str, tmp_path: Path) -> None:
    """A file of ours, read by gguf-py, and sums over counts as `llama-quantize` takes them: ggml makes the same blocks
    of a weight as from our means, and others than without an importance matrix."""
    from gguf import GGUFReader

    squares = random_squares(512, seed=8)
    squares = InputSquares(squares.sums**2, squares.counts)
    write_imatrix(tmp_path / "a.gguf", Imatrix({"blk.0.attn_q.weight": squares}, (), 1, 1))
    sums, counts = (tensor.data.flatten() for tensor in GGUFReader(tmp_path / "a.gguf").tensors)
    weight = np.random.default_rng(3).normal(size=(16, 512)).astype(np.float32)
    theirs = ggml.quantize_chunk(kind, weight, sums / counts)
    read = read_imatrix(tmp_path / "a.gguf").entries["blk.0.attn_q.weight"]
    assert np.array_equal(theirs, ggml.quantize_chunk(kind, weight, read.means().numpy()[0]))
    assert not np.array_equal(theirs, ggml.quantize_chunk(kind, weight)), kind


def dat(entries: dict[str, tuple[int, np.ndarray]], tail: bytes = b"") -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, (calls, values) in entries.items():
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", calls, len(values))]
        parts.append(values.astype("<f4").tobytes())
    return b"".join(parts) + tail


def test_the_older_form_is_read(tmp_path: Path) -> None:
    values = np.arange(1, 9, dtype=np.float32)
    text = b"/home/someone/a long path to the text/" + b"x" * 300
    tail = struct.pack("<ii", 7, len(text)) + text
    (tmp_path / "old.dat").write_bytes(dat({"blk.0.attn_q.weight": (4, values)}, tail))
    found = read_imatrix(tmp_path / "old.dat")
    assert (found.chunk_count, found.chunk_size, found.datasets) == (7, 0, (text.decode(),))
    assert found.entries["blk.0.attn_q.weight"].means().tolist() == [(values / 4).tolist()]
    (tmp_path / "old.dat").write_bytes(dat({"blk.0.attn_q.weight": (4, values)}))
    assert read_imatrix(tmp_path / "old.dat").datasets == ()


def test_plain_sums_of_newer_files_are_passed_over(tmp_path: Path) -> None:
    tensors = {
        "blk.0.attn_q.weight.in_sum2": np.ones((1, 8), np.float32),
        "blk.0.attn_q.weight.counts": np.full((1, 1), 3, np.float32),
        "blk.0.attn_q.weight.in_sum": -np.ones((1, 8), np.float32),
    }
    imatrix_by_c(tmp_path / "new.gguf", [], 1, 8, tensors)
    found = read_imatrix(tmp_path / "new.gguf")
    assert list(found.entries) == ["blk.0.attn_q.weight"]
    assert found.datasets == ()


def test_names_go_both_ways(tmp_path: Path) -> None:
    plan, exporter = planned(tmp_path), GgufExporter()
    assert isinstance(exporter, ImportanceFiles)
    importance = measured(plan)
    exporter.write_importance(importance, tmp_path / "i.gguf", plan)
    stored = read_imatrix(tmp_path / "i.gguf").entries
    assert len(stored) == 15
    assert {"blk.0.attn_q.weight", "blk.1.ffn_down.weight", "token_embd.weight"} < set(stored)
    back = exporter.read_importance(tmp_path / "i.gguf", plan)
    assert (back.dataset, back.chunks, back.chunk_size) == ("calibration.txt", 4, 64)
    assert set(back.squares) == set(importance.squares)
    for name, squares in importance.squares.items():
        assert torch.equal(back.squares[name].sums, squares.sums)
        assert torch.equal(back.squares[name].counts, squares.counts)


def test_heads_may_be_absent_other_weights_not(tmp_path: Path) -> None:
    plan = planned(tmp_path, "llama-untied")
    importance = measured(plan)
    found = dict(importance.squares)
    del found["model.embed_tokens.weight"]
    GgufExporter().write_importance(Importance(found, "", 1, 1), tmp_path / "i.gguf", plan)
    assert GgufExporter().read_importance(tmp_path / "i.gguf", plan).means("lm_head.weight") is None
    for index in range(2):
        del found[f"model.layers.{index}.mlp.up_proj.weight"]
        del found[f"model.layers.{index}.self_attn.v_proj.weight"]
    found["model.layers.0.mlp.down_proj.weight"] = random_squares(512)
    GgufExporter().write_importance(Importance(found, "", 1, 1), tmp_path / "i.gguf", plan)
    with pytest.raises(RefusedError) as caught:
        GgufExporter().read_importance(tmp_path / "i.gguf", plan)
    missing, misfit = (refusal.sentence() for refusal in caught.value.refusals)
    assert "4 of 16 weights are missing (blk.0.attn_v.weight, blk.0.ffn_up.weight, blk.1.attn_v.weight, ...)" in missing
    assert "of another model: blk.0.ffn_down.weight has 512 values, the model needs 256" in misfit


def test_stacked_experts() -> None:
    """Experts with names of their own are rows of one GGUF tensor, in the GGUF and in the older form."""

    names = [f"model.layers.0.mlp.experts.{index}.up_proj.weight" for index in range(12)]
    squares = random_squares(16, experts=12)
    counts = squares.counts.clone()
    counts[3] = 0
    squares = InputSquares(squares.sums, counts)
    rows = {name: InputSquares(squares.sums[i : i + 1], counts[i : i + 1].clamp(min=1)) for i, name in enumerate(names)}
    shuffled = dict(sorted(rows.items()))  # experts.10 before experts.2
    (entry,) = imatrix_of(Importance(shuffled, "", 1, 1)).entries.values()
    assert torch.equal(entry.sums, squares.sums)
    (gaps,) = imatrix_of(Importance({names[2]: rows[names[2]]}, "", 1, 1), experts=4).entries.values()
    assert torch.equal(gaps.sums[2:3], rows[names[2]].sums)
    assert gaps.sums.shape == (4, 16)
    assert gaps.unseen == [0, 1, 3]

    columns = dict.fromkeys(names, 16)
    stack = Imatrix({"blk.0.ffn_up_exps.weight": squares}, (), 1, 1)
    for index, name in enumerate(names):
        found = importance_of(stack, columns, "file").means(name)
        assert found is not None
        assert torch.equal(found[0], squares.means()[index])
    flat = InputSquares(squares.sums.reshape(1, -1), torch.tensor([9]))
    found = importance_of(Imatrix({"blk.0.ffn_up_exps.weight": flat}, (), 1, 0), columns, "file").means(names[5])
    assert found is not None
    assert torch.equal(found[0], squares.sums[5] / 9)
    with pytest.raises(RefusedError, match="has 16 values, the model needs 32"):
        importance_of(stack, dict.fromkeys(names, 32), "file")


def test_a_dense_weight_is_no_stack() -> None:
    doubled = Imatrix({"blk.0.attn_q.weight": random_squares(64)}, (), 1, 0)
    with pytest.raises(RefusedError, match="has 64 values, the model needs 32"):
        importance_of(doubled, {"model.layers.0.self_attn.q_proj.weight": 32}, "file")


def gguf_with(path: Path, **changes: np.ndarray) -> Path:
    tensors = {
        "w.in_sum2": np.ones((1, 8), np.float32),
        "w.counts": np.full((1, 1), 3, np.float32),
    }
    imatrix_by_c(path, ["t"], 1, 8, {name: value for name, value in (tensors | changes).items() if value.size})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w.in_sum2": np.full((1, 8), np.nan, np.float32)}, r"w: it holds NaN or Inf"),
        ({"w.in_sum2": np.full((1, 8), -1, np.float32)}, r"w: it holds a negative sum of squares"),
        ({"w.counts": np.zeros((1, 1), np.float32)}, r"w: no token reached the weight"),
        ({"w.counts": np.full((1, 1), np.nan, np.float32)}, r"w: 8 sums do not go with counts"),
        ({"w.counts": np.ones((3, 1), np.float32)}, r"w: 8 sums do not go with counts"),
        ({"w.counts": np.ones((0, 0), np.float32)}, r"sums and counts do not go together \(w.counts\)"),
        ({"v.counts": np.ones((1, 1), np.float32)}, r"sums and counts do not go together \(v.counts\)"),
        (
            {"token_embd.weight": np.ones((1, 1), np.float32)},
            r"sums and counts do not go together \(token_embd.weight\)",
        ),
    ],
)
def test_damaged_statistics_are_named(changes: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    path = gguf_with(tmp_path / "x.gguf", **changes)
    with pytest.raises(RefusedError, match=r"x\.gguf: not a usable importance matrix \(" + message):
        read_imatrix(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"none\.gguf: no such importance matrix; check the path"):
        read_imatrix(tmp_path / "none.gguf")
    for raw in (b"", b"text", b"some longer text that is not a matrix at all", bytes(100), b"\xff" * 100):
        (tmp_path / "x.dat").write_bytes(raw)
        with pytest.raises(RefusedError, match=r"not a usable importance matrix \(it does not start with GGUF"):
            read_imatrix(tmp_path / "x.dat")
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(RefusedError, match=r"its general\.type is None, not 'imatrix'"):
        read_imatrix(tmp_path / "model.gguf")


def test_no_cut_file_gets_through(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "a.gguf", some_imatrix())
    raw = (tmp_path / "a.gguf").read_bytes()
    old = dat({"blk.0.attn_q.weight": (4, np.ones(8)), "blk.1.attn_q.weight": (4, np.ones(8))})
    for whole, step in ((raw, 97), (old, 1)):
        for keep in range(0, len(whole) - 32, step):
            (tmp_path / "cut").write_bytes(whole[:keep])
            with pytest.raises(RefusedError, match="not a usable importance matrix"):
                read_imatrix(tmp_path / "cut")


def test_a_mixture_of_experts_goes_both_ways(tmp_path: Path) -> None:
    """One expert was never reached: it is in the file with zeros, and weighs all its inputs alike when read."""
    plan, exporter = planned(tmp_path, "qwen3-moe"), GgufExporter()
    mixture = plan.architecture.mixture
    assert mixture is not None
    squares = {layer.name: random_squares(layer.columns, seed=index) for index, layer in enumerate(plan.layers())}
    unseen = [name for name in squares if f".experts.{mixture.experts - 1}." in name]
    assert unseen
    seen = {name: entry for name, entry in squares.items() if name not in unseen}
    exporter.write_importance(Importance(seen, "", 1, 1), tmp_path / "i.gguf", plan)
    stack = read_imatrix(tmp_path / "i.gguf").entries["blk.0.ffn_down_exps.weight"]
    assert stack.sums.shape == (mixture.experts, mixture.intermediate)
    assert stack.unseen == [mixture.experts - 1]
    back = exporter.read_importance(tmp_path / "i.gguf", plan)
    assert set(back.squares) == set(squares)
    for name, entry in squares.items():
        found = back.means(name)
        assert found is not None
        assert torch.equal(found, torch.ones_like(found) if name in unseen else entry.means())
