"""The parts of the ONNX benchmarks that need no time: what they count, compare and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.onnx_vs_builder import (
    Pairs,
    Row,
    failures,
    in_turn,
    lines,
    no_figures,
    share_alike,
    speed_row,
    state_head_size,
)
from benchmarks.onnx_vs_ort_quantizers import OURS, bits_per_weight, shape_of
from benchmarks.onnx_vs_ort_quantizers import lines as quality_lines
from benchmarks.onnx_worker import Bench, Seconds
from benchmarks.ort_quantizers import HEAD, hide_head
from exporters.onnx.exporter import OnnxExporter
from signround.events import silent
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model


def test_ratios_above_one_are_in_our_favour() -> None:
    assert Row("export", 2.0, 6.0, "s").ratio == 3.0
    assert Row("decode", 90.0, 100.0, "tokens/s", more_is_better=True).ratio == 0.9
    memory = Row("peak", 30e6, 50e6, "bytes", target=2.0)
    assert memory.missed
    assert memory.cells() == ["peak", "30.0 MB", "50.0 MB", "1.67", "", "2.00, missed"]


def test_being_faster_nowhere_is_a_failure() -> None:
    equal = Row("prefill", 100.0, 100.0, "tokens/s", more_is_better=True, target=0.97)
    slow = Row("decode", 96.0, 100.0, "tokens/s", more_is_better=True, target=0.97)
    fast = Row("other", 101.0, 100.0, "tokens/s", more_is_better=True, target=0.97, processor=1.5)
    assert failures([equal], 0.0) == ["faster in no column"]
    assert failures([equal, slow, fast], 0.0) == ["decode"]
    assert failures([equal, fast], 9e-6) == []
    assert lines([fast])[2] == "| other | 101.0 tokens/s | 100.0 tokens/s | 1.01 | 1.50 | 0.97 |"


def test_a_speed_is_the_mean_of_the_pairs_ratios() -> None:
    """A slow pair counts as much as a fast one, whichever its own times are."""
    pairs = Pairs()
    for ours, theirs in ((1.0, 2.0), (8.0, 4.0), (0.5, 0.5)):
        pair = {"decode 128": ours, "decode 128 processor": ours}
        pairs.add({"signround": pair, "builder": {"decode 128": theirs, "decode 128 processor": 4 * ours}})
    row = speed_row("raw", "decode", 128, pairs)
    assert row.ratio == pytest.approx(1.0)
    assert row.processor == pytest.approx(4.0)
    assert row.error == pytest.approx(np.log(2) / np.sqrt(3))  # ratios of 2, 1/2 and 1
    assert row.cells()[3] == "1.000 +- 0.400"


@pytest.mark.parametrize("apart", [2e-5, float("nan")])
def test_graphs_of_two_models_are_not_compared(apart: float) -> None:
    fast = Row("decode", 101.0, 100.0, "tokens/s", more_is_better=True, target=0.97)
    (failure,) = failures([fast], apart)
    assert failure.startswith(f"logits are {apart:.1e} apart")


def test_makers_take_turns_and_the_least_counts() -> None:
    asked: list[str] = []

    def ask(maker: str) -> dict[str, float]:
        asked.append(maker)
        return {"seconds": 10.0 - len(asked)}

    least = no_figures()
    in_turn(2, [ask, ask], least)
    ours, theirs = "signround", "builder"
    assert asked == [ours, theirs, ours, theirs, theirs, ours, theirs, ours]
    assert least == {ours: {"seconds": 2.0}, theirs: {"seconds": 3.0}}


class Tape:
    """A decoder that writes down what it is asked."""

    vocabulary = 100

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []

    def begin(self, capacity: int) -> Any:
        class Sequence:
            def append(_, tokens: list[int], past: int) -> Seconds:
                assert all(0 <= token < self.vocabulary for token in tokens)
                self.calls.append((capacity, len(tokens), past))
                return 1.0, 0.5

        return Sequence()


def test_a_prompt_is_read_once_for_all_steps_behind_it() -> None:
    tape = Tape()
    bench = Bench(tape)  # type: ignore[arg-type]
    assert bench.answer("prefill", 8, 2) == [(1.0, 0.5)] * 2
    assert tape.calls == [(8, 8, 0), (8, 8, 0)]
    tape.calls.clear()
    bench.answer("decode", 8, 2)
    bench.answer("decode", 8, 1)
    assert tape.calls == [(9, 8, 0), (9, 1, 8), (9, 1, 8), (9, 1, 8)]


def test_buffers_are_shared_by_both_or_by_none(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("a", "b")}
    for name, folder in folders.items():
        folder.mkdir()
        text = '{"search": {"past_present_share_buffer": %s, "max_length": 7}}' % ("true" if name == "a" else "false")
        (folder / "genai_config.json").write_text(text)
    share_alike(folders)
    assert '"past_present_share_buffer": false' in (folders["a"] / "genai_config.json").read_text()


def float_folder(folder: Path) -> Path:
    """A graph as the builder leaves it: a cache whose width has a name, and a head."""
    folder.mkdir()
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["logits"], name=HEAD)],
        "graph",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4]),
            helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, ["b", 2, "p", "size"]),
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 4])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), str(folder / "model.onnx"))
    (folder / "genai_config.json").write_text('{"model": {"decoder": {"head_size": 16}}}')
    return folder


def test_the_builders_graph_is_made_readable_and_its_head_hidden(tmp_path: Path) -> None:
    folder = float_folder(tmp_path / "float")
    state_head_size(folder)
    hide_head(folder)
    model = onnx.load(str(folder / "model.onnx"))
    assert model.graph.input[1].type.tensor_type.shape.dim[3].dim_value == 16
    assert [(node.op_type, node.domain) for node in model.graph.node] == [("FusedMatMul", "com.microsoft")]
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 21, "com.microsoft": 1}
    assert bits_per_weight(folder) is None


@pytest.mark.parametrize(("scheme", "bits"), [("w4g32", 5.0), ("w2g64", 2.5), ("w4g32-asym", 5.125)])
def test_bits_are_those_that_are_stored(tmp_path: Path, scheme: str, bits: float) -> None:
    model = write_small_model(tmp_path / "model", "llama", layers=1)
    artifact = write_rounded_artifact(model, tmp_path / "artifact", scheme)
    target = OnnxExporter().export(artifact, tmp_path / "onnx", silent).target
    assert bits_per_weight(target) == bits
    assert shape_of(artifact) == (int(scheme[1]), int(scheme[3:5]))


def test_the_best_of_theirs_is_marked_and_a_missed_target_named() -> None:
    def row(maker: str, kl: float, bits: float | None = 5.0) -> dict[str, Any]:
        return {"made_by": maker, "bits_per_weight": bits, "mean_kl": kl, "perplexity": 3.0, "top1": 0.5}

    table = quality_lines([row("a", 0.4), row("b", 0.2, None), row(OURS, 0.12)], 2.5, 0.5)
    assert table[3] == "| a | 5.00 | 4.000e-01 | 3.000 | 50.00% | 0.300 |"
    assert table[4] == "| b | not packed | 2.000e-01 | 3.000 | 50.00% | 0.600 (best; target 0.50, missed) |"
    assert table[5].endswith("| 50.00% |  |")
