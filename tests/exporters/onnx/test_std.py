"""The forms of the ONNX graph beside the default: standard operators, weights in DequantizeLinear, fp16."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.onnx import dequantize
from exporters.onnx.builder import GraphBuilder
from exporters.onnx.checker import problems_of
from exporters.onnx.dequantize import Columns, code_pieces, from_columns, transposed_zeros
from exporters.onnx.exporter import OnnxExporter
from exporters.onnx.packing import layout_of, pack, unpack
from exporters.onnx.reader import constant_array, load_graph
from exporters.onnx.streamed import raw_bytes
from signround.artifact import QuantizedCheckpoint
from signround.errors import FailedError
from signround.events import silent
from signround.formats import grid_for
from signround.parity import compare_weights
from signround.qtensor import QuantizedTensor
from tests.exporters.onnx.test_packing import HELD, random_tensor, same

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")

Maker = Callable[..., QuantizedCheckpoint]
STD, PURE, HALF = {"flavour": "std"}, {"flavour": "std", "weights": "dequantize"}, {"flavour": "std", "dtype": "fp16"}
PURE_HALF = {**PURE, "dtype": "fp16"}
FORMS = [STD, PURE, HALF, PURE_HALF, {"dtype": "fp16"}]


def slow_columns(tensor: QuantizedTensor, block: int) -> np.ndarray:
    """What DequantizeLinear computes, one weight at a time, from the codes and fields of the grid: [columns, rows]."""
    grid, (rows, columns) = tensor.grid, tensor.shape
    group = grid.group_of(columns)
    weight = np.empty((columns, rows), np.float32)
    for column in range(columns):
        for row in range(rows):
            scale = np.float32(tensor.fields["scale"][row, column // group])
            zero = tensor.fields["zero_point"][row, column // group] if grid.zero == "point" else grid.centre
            weight[column, row] = (int(tensor.codes[row, column]) - int(zero)) * scale
    return weight


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(HELD), st.integers(1, 9), st.integers(1, 90), st.sampled_from([1, 100, 1000]),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_columns_hold_the_weight_and_come_back(scheme: str, rows: int, columns: int, piece: int, seed: int) -> None:
    tensor = random_tensor(grid_for(scheme), rows, columns, seed)
    layout = layout_of(tensor.grid, rows, columns)
    packed = pack(tensor)
    signed = "U" if layout.has_zero_points else ""
    dtype = ir.DataType[f"{signed}INT{layout.bits}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dequantize, "PIECE_WEIGHTS", piece)
        made = GraphBuilder().streamed("codes", dtype, (columns, rows), lambda: code_pieces(packed, layout))
        stored = made.const_value
        assert stored is not None
        data = b"".join(piece.tobytes() for piece in raw_bytes(stored))
    read = onnx.numpy_helper.to_array(onnx.TensorProto(dims=(columns, rows), data_type=dtype.value, raw_data=data))
    assert data == onnx.numpy_helper.from_array(read).raw_data  # packed as the onnx package packs
    codes = read.astype(np.uint8 if signed else np.int8)
    zeros = transposed_zeros(packed, layout) if layout.has_zero_points else None
    shift = 0 if zeros is None else np.repeat(zeros.astype(int), layout.block, 0)[:columns]
    scales = np.repeat(packed.scales.T, layout.block, 0)[:columns]
    assert np.array_equal((codes.astype(int) - shift) * scales, slow_columns(tensor, layout.block))
    back = from_columns(Columns(codes, packed.scales.T, zeros), layout)
    assert same(unpack(back, tensor.grid, columns), tensor)


@pytest.mark.parametrize("options", [PURE, PURE_HALF, {"dtype": "fp16"}], ids=str)
@pytest.mark.parametrize(
    ("family", "scheme", "overrides"),
    [
        ("llama-untied", "w3g128-asym", {"dtype": torch.float32}),
        ("llama-biased", "w2g64-asym", {}),
        ("gemma3", "w8g16-asym", {}),
        ("smollm2-like", "w4gc", {}),
        ("phi3", "w2g256", {}),
    ],
)
def test_every_tensor_comes_back(
    artifact_of: Maker, tmp_path: Path, family: str, scheme: str, overrides: dict[str, Any], options: dict[str, str]
) -> None:
    artifact, exporter = artifact_of(family, scheme, **overrides), OnnxExporter(**options)
    exporter.export(artifact, tmp_path / "onnx", silent)
    exported = exporter.opened(tmp_path / "onnx")
    read = dict(exporter.read_back(exported))
    assert read.keys() == artifact.layers.keys()
    assert all(same(tensor, artifact.quantized(name)) for name, tensor in read.items())
    parity = compare_weights(artifact, exporter, exported)
    assert (parity.reader, parity.missing, parity.different) == ("independent", (), ())
    written = sum(path.stat().st_size for path in exported.files)
    assert exporter.estimated_bytes(artifact.plan) == pytest.approx(written, rel=0.01)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize("scheme", ["w2g32", "w2g16-asym", "w3g32-asym", "w4g32"])
def test_weights_small_enough_for_the_graph_come_back(artifact_of: Maker, tmp_path: Path, scheme: str) -> None:
    artifact, exporter = artifact_of("llama", scheme, **SMALL), OnnxExporter(**PURE)
    exported = exporter.export(artifact, tmp_path / "onnx", silent)
    model = onnx.load(exported.target / "model.onnx", load_external_data=False)
    inside = [tensor for tensor in model.graph.initializer if not tensor.external_data]
    assert {"model.layers.0.self_attn.o_proj.codes", "model.layers.1.self_attn.o_proj.codes"} <= {
        tensor.name for tensor in inside
    }
    assert all(same(tensor, artifact.quantized(name)) for name, tensor in exporter.read_back(exported))
    parity = compare_weights(artifact, exporter, exported)  # by the onnx package and onnxruntime
    assert (parity.reader, parity.missing, parity.different) == ("independent", (), ())


def test_an_fp16_file_is_smaller_and_its_integers_are_the_same(artifact_of: Maker, tmp_path: Path) -> None:
    artifact = artifact_of("llama-untied", "w3g128-asym", dtype=torch.float32)
    full = OnnxExporter().export(artifact, tmp_path / "full", silent)
    half = OnnxExporter(dtype="fp16").export(artifact, tmp_path / "half", silent)
    assert (half.target / "model.onnx.data").stat().st_size < 0.7 * (full.target / "model.onnx.data").stat().st_size
    pairs = zip(OnnxExporter().read_back(full), OnnxExporter().read_back(half), strict=True)
    assert all(left[0] == right[0] and same(left[1], right[1]) for left, right in pairs)
    assert (half.kept_dtype, half.casts_vectors) == (torch.float16, True)
    assert (full.kept_dtype, full.casts_vectors) == (None, False)


@pytest.mark.parametrize("options", [STD, PURE, HALF], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi4-mini-like", "smollm3", "olmo2"])
def test_the_standard_accepts_the_graph(
    artifact_of: Maker, tmp_path: Path, family: str, options: dict[str, str]
) -> None:
    """The checker of the onnx package with shape inference, which the contrib flavour's norms do not pass."""
    exported = OnnxExporter(**options).export(artifact_of(family), tmp_path / "onnx", silent)
    onnx.checker.check_model(str(exported.target / "model.onnx"), full_check=True)
    model = load_graph(exported.target)
    domains = {node.domain for node in model.graph}
    assert domains == ({""} if "weights" in options else {"", "com.microsoft"})
    assert set(model.graph.opset_imports) == domains
    assert (model.ir_version, model.graph.opset_imports[""]) == (10, 23)


def kinds_of(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_graphs_have_the_operators_of_their_form(artifact_of: Maker, tmp_path: Path) -> None:
    def kinds(family: str, scheme: str = "w4g32", **options: str) -> Counter[str]:
        folder = tmp_path / "-".join([family, scheme, *options.values()])
        return kinds_of(load_graph(OnnxExporter(**options).export(artifact_of(family, scheme), folder, silent).target))

    std, pure = kinds("llama", **STD), kinds("llama", **PURE)
    assert (std["Attention"], std["RotaryEmbedding"], std["RMSNormalization"]) == (2, 4, 5)
    assert (std["MatMulNBits"], std["DequantizeLinear"], std["CumSum"], std["Max"]) == (8, 0, 1, 1)
    assert (pure["MatMulNBits"], pure["DequantizeLinear"], pure["MatMul"], pure["Gemm"]) == (0, 8, 8, 1)
    assert kinds("qwen2", **PURE)["Add"] == kinds("llama", **PURE)["Add"] + 2  # the biases of q, k, v in one
    assert kinds("gemma2", **STD)["LessOrEqual"] == 2  # a mask for each of its windows
    assert kinds("llama", **STD)["LessOrEqual"] == 1
    assert kinds("smollm3", **STD)["RotaryEmbedding"] == 6  # one block in four has no positions
    # what computes in fp16 casts nothing but its mask and its logits
    assert kinds("llama", **HALF)["Cast"] == 2
    assert kinds("llama", **STD)["Cast"] == 3  # the mask, and the bf16 table at either end


def test_two_bits_need_newer_integers_only_where_they_are_integers(artifact_of: Maker, tmp_path: Path) -> None:
    artifact = artifact_of("llama", "w2g64-asym")
    for options, versions in ((STD, (10, 23)), (PURE, (13, 25))):
        exporter = OnnxExporter(**options)
        model = load_graph(exporter.export(artifact, tmp_path / options.get("weights", "std"), silent).target)
        assert (model.ir_version, model.graph.opset_imports[""]) == versions
        assert ("from 1.24 on" in " ".join(exporter.notes(artifact.plan))) == (options is PURE)


def test_inputs_are_those_of_the_default(artifact_of: Maker, tmp_path: Path) -> None:
    def surface(**options: str) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        folder = tmp_path / "-".join(["onnx", *options.values()])
        graph = load_graph(OnnxExporter(**options).export(artifact_of(), folder, silent).target).graph
        return tuple([(v.name, v.dtype, str(v.shape)) for v in values] for values in (graph.inputs, graph.outputs))

    assert surface(**STD) == surface(**PURE) == surface()
    inputs, outputs = surface(**HALF)
    for name, dtype, _ in [*inputs, *outputs]:
        cache = name.startswith(("past", "present"))
        assert dtype == (ir.DataType.FLOAT16 if cache else ir.DataType.FLOAT if name == "logits" else ir.DataType.INT64)


def test_genai_is_told_what_differs(artifact_of: Maker, tmp_path: Path) -> None:
    def config(level: int = 4, **options: str) -> dict[str, Any]:
        folder = tmp_path / "-".join([str(level), *options.values()])
        OnnxExporter(level, **options).export(artifact_of(), folder, silent)
        loaded: dict[str, Any] = json.loads((folder / "genai_config.json").read_text())
        return loaded

    def session(**options: Any) -> dict[str, Any]:
        found: dict[str, Any] = config(**options)["model"]["decoder"]["session_options"]
        return found

    assert config()["search"]["past_present_share_buffer"] is True
    assert config(**STD)["search"]["past_present_share_buffer"] is False
    assert "position_ids" not in config(**STD)["model"]["decoder"]["inputs"]
    assert session(level=0, **PURE)["session.qdq_matmulnbits_accuracy_level"] == "0"
    assert "session.qdq_matmulnbits_accuracy_level" not in session(**PURE)
    assert "session.qdq_matmulnbits_accuracy_level" not in session(level=0, **STD)


def test_levels_of_dequantized_weights(artifact_of: Maker) -> None:
    plan, eight_bits = artifact_of().plan, artifact_of("llama", "w8g32").plan
    assert OnnxExporter(**PURE).more_exact(plan) == OnnxExporter(accuracy_level=0, **PURE)
    assert OnnxExporter(accuracy_level=0, **PURE).more_exact(plan) is None
    assert OnnxExporter(**PURE).more_exact(eight_bits) is None
    assert OnnxExporter(**STD).more_exact(plan) == OnnxExporter(exact_down_proj=True, **STD)
    assert "other" not in " ".join(OnnxExporter(**PURE).notes(plan))
    assert "computes at 4 unless" in " ".join(OnnxExporter(accuracy_level=0, **PURE).notes(plan))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"flavour": "onnx"}, "flavour 'onnx' does not exist; allowed are contrib, std"),
        ({"flavour": "std", "weights": "qdq"}, "weights 'qdq' does not exist; allowed are matmulnbits, dequantize"),
        ({"dtype": "bf16"}, "dtype 'bf16' does not exist; allowed are fp32, fp16"),
        ({"weights": "dequantize"}, "weights=dequantize is a part of flavour=std"),
        ({**PURE, "exact_down_proj": True}, "exact_down_proj sets the accuracy_level of single nodes"),
        ({**PURE, "keep_fast": True}, "keep_fast sets the accuracy_level of single nodes"),
    ],
)
def test_what_does_not_exist_is_refused(artifact_of: Maker, options: dict[str, Any], found: str) -> None:
    sentences = [refusal.sentence() for refusal in OnnxExporter(**options).refusals(artifact_of().plan)]
    assert len(sentences) == 1
    assert found in sentences[0]


def test_rows_that_onnxruntime_misreads_are_refused(artifact_of: Maker, tmp_path: Path) -> None:
    plan = artifact_of("llama", "w2g64-asym").plan
    first = plan.blocks[0].layers[0]
    odd = replace(plan.blocks[0], layers=(replace(first, rows=126), *plan.blocks[0].layers[1:]))
    sentences = [refusal.sentence() for refusal in OnnxExporter(**PURE).refusals(replace(plan, blocks=(odd,)))]
    assert len(sentences) == 1
    assert f"{first.name} has 126 rows of 2 bits, which onnxruntime misreads" in sentences[0]
    assert OnnxExporter(**STD).refusals(replace(plan, blocks=(odd,))) == []
    # and by the checker, whoever wrote it
    exported = OnnxExporter(**PURE).export(artifact_of("llama", "w2g64-asym"), tmp_path / "onnx", silent)
    model = load_graph(exported.target)
    node = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    for value in node.inputs:
        array = constant_array(value)[:, :-2]
        value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=value.name)
    assert "unless 4 divides them" in " ".join(problems_of(model, exported.target))


@pytest.mark.parametrize("options", [PURE, {"dtype": "fp16"}], ids=str)
def test_mixtures_keep_their_operator(artifact_of: Maker, options: dict[str, str]) -> None:
    sentences = [refusal.sentence() for refusal in OnnxExporter(**options).refusals(artifact_of("mixtral").plan)]
    assert len(sentences) == 1
    assert "QMoE node in float32" in sentences[0]


def test_what_fp16_cannot_hold_ends_in_one_sentence(
    artifact_of: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, read = artifact_of(), QuantizedCheckpoint.tensor

    def scaled(self: QuantizedCheckpoint, name: str, rows: range | None = None) -> torch.Tensor:
        return read(self, name, rows) * (1e6 if name == "model.norm.weight" else 1)

    monkeypatch.setattr(QuantizedCheckpoint, "tensor", scaled)
    with pytest.raises(FailedError, match=r"model\.norm\.weight has values up to .* fp16 ends at 65504"):
        OnnxExporter(dtype="fp16").export(artifact, tmp_path / "onnx", silent)
    assert list(tmp_path.iterdir()) == []
    assert "no fp16 products of 2 bits" in " ".join(
        OnnxExporter(dtype="fp16").notes(artifact_of("llama", "w2g64-asym").plan)
    )
    assert "capped scores of Attention" in " ".join(OnnxExporter(**STD).notes(artifact_of("gemma2").plan))
    notes = OnnxExporter(dtype="fp16").notes(artifact_of("gemma3").plan)
    assert "Gemma3ForCausalLM models can pass 65504" in " ".join(notes)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_two_exports_are_byte_identical(artifact_of: Maker, tmp_path: Path, options: dict[str, str]) -> None:
    digests = []
    for name in "ab":
        target = OnnxExporter(**options).export(artifact_of("qwen2"), tmp_path / name, silent).target
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in target.iterdir()})
    assert digests[0] == digests[1]
