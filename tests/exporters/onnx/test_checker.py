"""One thing is broken in a sound graph at a time, and the checker names it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.onnx.builder import MICROSOFT, GraphBuilder
from exporters.onnx.checker import problems_of
from exporters.onnx.exporter import OnnxExporter
from exporters.onnx.packing import BLOCKS
from exporters.onnx.reader import load_graph
from signround.errors import RefusedError
from signround.events import silent
from signround.inspection import inspect_target, inspection_lines
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")
Mutation = Callable[[Any, Path], None]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checker")
    write_small_model(folder / "model", "llama", layers=1)
    artifact = write_rounded_artifact(folder / "model", folder / "artifact", "w2g64-asym")
    return OnnxExporter().export(artifact, folder / "onnx", silent).target


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(exported, tmp_path / "onnx"))


def node_of(model: Any, kind: str = "MatMulNBits") -> Any:
    return next(node for node in model.graph if node.op_type == kind)


def attribute(name: str, value: int, kind: str = "MatMulNBits") -> Mutation:
    return lambda model, folder: node_of(model, kind).attributes.update({name: ir.AttrInt64(name, value)})


def without(name: str, kind: str = "MatMulNBits") -> Mutation:
    def mutate(model: Any, folder: Path) -> None:
        del node_of(model, kind).attributes[name]

    return mutate


def constant(index: int, array: Any, kind: str = "MatMulNBits") -> Mutation:
    """Put another constant in the place of input `index`; a function is given the old one."""

    def mutate(model: Any, folder: Path) -> None:
        value = node_of(model, kind).inputs[index]
        new = array(value.const_value.numpy()) if callable(array) else array
        value.const_value = new if isinstance(new, ir.Tensor) else ir.tensor(new, name=value.name)

    return mutate


def dropped(index: int, kind: str = "MatMulNBits") -> Mutation:
    return lambda model, folder: node_of(model, kind).replace_input_with(index, None)


def poisoned(number: float) -> Callable[[Any], Any]:
    def change(scales: Any) -> Any:
        scales = scales.copy()
        scales.flat[-1] = number
        return scales

    return change


def placed(offset: Callable[[Any], int], location: str | None = None, length: int | None = None) -> Mutation:
    """Move the data of the first weight."""

    def mutate(model: Any, folder: Path) -> None:
        value = node_of(model).inputs[1]
        old = value.const_value
        value.const_value = ir.ExternalTensor(
            location or old.location, offset(old), length or old.length, old.dtype, shape=old.shape, name=old.name,
            base_dir=folder,
        )  # fmt: skip

    return mutate


def g_idx(model: Any, folder: Path) -> None:
    node = node_of(model)
    node.resize_inputs(5)
    node.replace_input_with(4, node.inputs[2])


def fed(model: Any, folder: Path) -> None:
    node_of(model).inputs[1].const_value = None


def valueless(model: Any, folder: Path) -> None:
    next(iter(model.graph.initializers.values())).const_value = None


def truncated(model: Any, folder: Path) -> None:
    os.truncate(folder / "model.onnx.data", 1000)


def missing_data(model: Any, folder: Path) -> None:
    (folder / "model.onnx.data").unlink()


def twin_nodes(model: Any, folder: Path) -> None:
    first, second, *_ = model.graph
    second.name = first.name


def twin_values(model: Any, folder: Path) -> None:
    first, second, *_ = model.graph
    second.outputs[0].name = first.outputs[0].name


def dangling(model: Any, folder: Path) -> None:
    node_of(model).replace_input_with(0, ir.Value(name="nowhere"))


def out_of_order(model: Any, folder: Path) -> None:
    first = model.graph[0]
    model.graph.remove(first)
    model.graph.append(first)


def unmade_output(model: Any, folder: Path) -> None:
    model.graph.outputs.append(ir.Value(name="more"))


def unimported(model: Any, folder: Path) -> None:
    del model.graph.opset_imports[MICROSOFT]


def opset(number: int, domain: str = "") -> Mutation:
    return lambda model, folder: model.graph.opset_imports.update({domain: number})


def newer_ir(model: Any, folder: Path) -> None:
    model.ir_version = 14


def too_early(model: Any, folder: Path) -> None:
    node = next(iter(model.graph))
    node.op_type = "RotaryEmbedding"


BROKEN: list[tuple[Mutation, str]] = [
    (attribute("bits", 3), "3 bits; onnxruntime runs 2, 4 and 8"),
    (attribute("block_size", 48), "blocks of 48"),
    (attribute("block_size", 512), "blocks of 512"),
    (attribute("accuracy_level", 9), "accuracy_level 9; 0 to 4 exist"),
    (attribute("N", 31), "input 1 must have shape"),
    (attribute("kv_num_heads", 1, "GroupQueryAttention"), "kv_num_heads 1, the cache has 2"),
    (attribute("num_heads", 3, "GroupQueryAttention"), "num_heads 3 must be a multiple of kv_num_heads 2"),
    (attribute("K", 4096), "input 2 must have shape"),
    (without("accuracy_level"), "attribute accuracy_level is missing"),
    (without("bits"), "attribute bits is missing"),
    (g_idx, "g_idx is set"),
    (fed, "input 1 is not a constant"),
    (valueless, ": the constant has no value"),
    (dropped(1), "input 1 is missing"),
    (dropped(2), "input 2 is missing"),
    (constant(1, lambda codes: codes.reshape(len(codes), -1)), "input 1 must have shape"),
    (constant(1, lambda codes: codes.astype(np.int8)), "input 1 must be UINT8, got INT8"),
    (constant(2, lambda scales: scales[:, :-1].copy()), "input 2 must have shape"),
    (constant(2, lambda scales: scales.astype(np.float64)), "input 2 must be FLOAT or FLOAT16, got DOUBLE"),
    (constant(2, poisoned(np.nan)), "input 2 (scales) holds NaN or Inf"),
    (constant(2, poisoned(-np.inf)), "input 2 (scales) holds NaN or Inf"),
    (constant(3, lambda zeros: zeros[:-1].copy()), "input 3 must have shape"),
    (constant(3, lambda zeros: zeros.astype(np.float32)), "input 3 must be UINT8, got FLOAT"),
    (truncated, "ends beyond model.onnx.data"),
    (missing_data, "model.onnx.data, is missing"),
    (placed(lambda old: old.offset, location="../model.onnx.data"), "outside the folder"),
    (placed(lambda old: -4), "ends beyond"),
    (placed(lambda old: old.offset + 1), "overlaps"),
    (placed(lambda old: 0), "overlaps"),
    (placed(lambda old: old.offset, length=12), "12 bytes of data for a tensor of"),
    (twin_nodes, "used 2 times"),
    (twin_values, "used 2 times"),
    (dangling, "the input nowhere is not defined"),
    (out_of_order, "is not defined before it"),
    (unmade_output, "more: nothing makes this output"),
    (unimported, "the domain 'com.microsoft'"),
    (opset(27), "opset 27; onnxruntime 1.31 loads up to 26"),
    (opset(2, MICROSOFT), "com.microsoft version 2; only 1 exists"),
    (newer_ir, "IR version 14"),
    (too_early, "RotaryEmbedding needs opset 23, the graph has 21"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mutate", "found"), BROKEN, ids=[f"{index}-{found}" for index, (_, found) in enumerate(BROKEN)]
)
def test_each_break_is_named(folder: Path, mutate: Mutation, found: str) -> None:
    model = load_graph(folder)
    assert problems_of(model, folder, values=True) == []
    mutate(model, folder)
    problems = problems_of(model, folder, values=True)
    assert any(found in problem for problem in problems), problems


def test_constants_may_share_all_of_their_bytes(folder: Path) -> None:
    """One table in two shapes: embedding and head."""
    model = load_graph(folder)
    value = node_of(model).inputs[1]
    old = value.const_value
    twin = ir.ExternalTensor(
        old.location, old.offset, old.length, old.dtype, shape=ir.Shape([old.size]), name="twin", base_dir=folder
    )
    model.graph.initializers["twin"] = ir.Value(name="twin", const_value=twin)
    assert problems_of(model, folder, values=True) == []


def graph_with(kind: str, inputs: Sequence[Any], domain: str, attributes: dict[str, int], opset: int = 21) -> Any:
    """A graph of one node over constants (numpy arrays or ir tensors); "x" is a graph input of int64."""
    builder = GraphBuilder()
    values: list[Any] = []
    for index, item in enumerate(inputs):
        if isinstance(item, str):
            values.append(builder.input(item, ir.DataType.INT64, ["n"]))
        elif item is None:
            values.append(None)
        else:
            tensor = item if isinstance(item, ir.Tensor) else ir.tensor(item, name=f"c{index}")
            values.append(ir.Value(name=f"c{index}", const_value=tensor, shape=tensor.shape))
            builder.constants[f"c{index}"] = values[-1]
    (out,) = builder.op(kind, "node", values, domain=domain, attributes=attributes)
    builder.output(out, "out", ir.DataType.FLOAT, ["n", "m"])
    return builder.model("test", opset, 10, "test", "0")


def packed(dtype: str, *shape: int) -> Any:
    import ml_dtypes

    kinds = {"UINT4": ml_dtypes.uint4, "INT4": ml_dtypes.int4, "UINT2": ml_dtypes.uint2}
    return ir.Tensor(np.zeros(shape, kinds[dtype]), dtype=ir.DataType[dtype], name="c0")


def scales(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def codes(*shape: int) -> Any:
    return np.zeros(shape, np.uint8)


GATHER = {"bits": 4, "block_size": 32, "quantize_axis": 1, "gather_axis": 0}
SOUND_GATHERS: list[tuple[list[Any], dict[str, int]]] = [
    ([codes(10, 32), "x", scales(10, 2)], GATHER),
    ([codes(10, 32), "x", scales(10, 2), codes(10, 1)], GATHER),
    ([codes(10, 16), "x", scales(10, 2), codes(10, 1)], {**GATHER, "bits": 2}),
    ([codes(10, 96), "x", scales(10, 3), codes(10, 3)], {**GATHER, "bits": 8}),
    ([codes(10, 2, 16), "x", scales(10, 2, 1)], {**GATHER, "quantize_axis": 2}),
    ([packed("UINT4", 10, 64), "x", scales(10, 2)], GATHER),
]
BROKEN_GATHERS: list[tuple[list[Any], dict[str, int], str]] = [
    ([codes(10, 32), "x", scales(10, 2)], {**GATHER, "bits": 3}, "3 bits"),
    ([codes(10, 32), "x", scales(10, 2)], {**GATHER, "block_size": 8}, "blocks of 8"),
    ([codes(10, 32), "x", scales(10, 4)], GATHER, "input 2 must have shape (10, 2), got (10, 4)"),
    ([codes(10, 32), "x", scales(20)], GATHER, "input 2 must have shape (10, 2), got (20,)"),
    ([codes(10, 32), "x", scales(10, 2), codes(10, 2)], GATHER, "input 3 must have shape (10, 1)"),
    ([codes(10, 32), "x", scales(10, 2), scales(10, 1)], GATHER, "input 3 must be UINT8, got FLOAT"),
    ([codes(10, 32).astype(np.int8), "x", scales(10, 2)], GATHER, "input 0 must be UINT8"),
    ([codes(10, 32), "x", scales(10, 2)], {**GATHER, "gather_axis": 1}, "gather_axis must be 0"),
    ([codes(10, 32), "x", scales(10, 2)], {**GATHER, "quantize_axis": 0}, "quantize_axis 0 must be the last"),
    ([codes(10, 32), "x", scales(10, 2) * np.nan], GATHER, "NaN or Inf"),
    ([codes(10, 32), "x", None], GATHER, "input 2 is missing"),
]


@pytest.mark.parametrize(("inputs", "attributes"), SOUND_GATHERS)
def test_sound_tables(inputs: list[Any], attributes: dict[str, int], tmp_path: Path) -> None:
    model = graph_with("GatherBlockQuantized", inputs, MICROSOFT, attributes)
    assert problems_of(model, tmp_path, values=True) == []
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options)
    assert session.run(None, {"x": np.array([0, 9])})[0].shape[0] == 2


@pytest.mark.parametrize(("inputs", "attributes", "found"), BROKEN_GATHERS)
def test_broken_tables(inputs: list[Any], attributes: dict[str, int], found: str, tmp_path: Path) -> None:
    model = graph_with("GatherBlockQuantized", inputs, MICROSOFT, attributes)
    problems = problems_of(model, tmp_path, values=True)
    assert any(found in problem for problem in problems), problems
    assert all(problem.startswith("node: ") for problem in problems)


BLOCKED = {"axis": 0, "block_size": 32}
DEQUANTIZED: list[tuple[list[Any], dict[str, int], int, str]] = [
    ([packed("UINT4", 64, 10), scales(2, 10)], BLOCKED, 21, ""),
    ([packed("UINT4", 64, 10), scales(2, 10), packed("UINT4", 2, 10)], BLOCKED, 21, ""),
    ([codes(64, 10), scales(2, 10), codes(2, 10)], BLOCKED, 21, ""),
    ([packed("UINT2", 64, 12), scales(2, 12)], BLOCKED, 25, ""),
    ([packed("UINT2", 64, 10), scales(2, 10)], BLOCKED, 25, "unless 4 divides them"),
    ([codes(64, 10), scales()], {}, 21, ""),
    ([codes(64, 10), scales(10)], {"axis": 1}, 21, ""),
    ([packed("UINT2", 64, 12), scales(2, 12)], BLOCKED, 24, "UINT2 needs opset 25, the graph has 24"),
    ([packed("INT4", 64, 10), scales(2, 10)], BLOCKED, 20, "INT4 needs opset 21"),
    ([packed("UINT4", 64, 10), scales(2, 9)], BLOCKED, 21, "input 1 must have shape (2, 10), got (2, 9)"),
    ([packed("UINT4", 64, 10), scales(10, 2)], BLOCKED, 21, "input 1 must have shape (2, 10)"),
    ([packed("UINT4", 64, 10), scales(2, 10), codes(2, 10)], BLOCKED, 21, "input 2 must be UINT4, got UINT8"),
    ([packed("UINT4", 64, 10), scales(1, 10)], {"axis": 0, "block_size": 512}, 21, "blocks of 512"),
    ([packed("UINT4", 64, 10), scales(2, 10) * np.inf], BLOCKED, 21, "NaN or Inf"),
    ([codes(64, 10), scales(64)], {"axis": 1}, 21, "input 1 must have shape"),
]


@pytest.mark.parametrize(("inputs", "attributes", "opset", "found"), DEQUANTIZED)
def test_dequantize_linear(
    inputs: list[Any], attributes: dict[str, int], opset: int, found: str, tmp_path: Path
) -> None:
    problems = problems_of(graph_with("DequantizeLinear", inputs, "", attributes, opset), tmp_path, values=True)
    assert [found] * len(problems) == [found for problem in problems if found in problem]
    assert bool(problems) == bool(found)


def test_a_weight_that_is_transposed_after_decoding_is_named(tmp_path: Path) -> None:
    model = graph_with("DequantizeLinear", [packed("UINT4", 64, 10), scales(2, 10)], "", BLOCKED)
    decoded = model.graph[0].outputs[0]
    model.graph.append(ir.node("Transpose", [decoded], name="turned"))
    assert "transposed after it is decoded" in " ".join(problems_of(model, tmp_path))


@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from((2, 4, 8)), st.sampled_from(BLOCKS), st.booleans())
def test_every_legal_weight_passes_and_no_neighbour(rows: int, columns: int, bits: int, block: int, asym: bool) -> None:
    blocks = -(-columns // block)
    zeros = -(-blocks * bits // 8)
    inputs: list[Any] = [None, codes(rows, blocks, block * bits // 8), scales(rows, blocks)]
    inputs += [codes(rows, zeros)] if asym else []
    attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": 4}
    model = graph_with("MatMulNBits", inputs, MICROSOFT, attributes)
    assert problems_of(model, Path()) == []
    for name, wrong in (("N", rows + 1), ("K", columns + block), ("bits", {2: 4, 4: 8, 8: 2}[bits])):
        model.graph[0].attributes[name] = ir.AttrInt64(name, wrong)
        assert problems_of(model, Path()), name
        model.graph[0].attributes[name] = ir.AttrInt64(name, attributes[name])


def test_inspect_lists_problems_and_looks_into_other_graphs(folder: Path) -> None:
    model = load_graph(folder)
    without("accuracy_level")(model, folder)
    ir.save(model, folder / "model.onnx")
    found = inspect_target(folder)
    assert (found["kind"], found["ours"], found["grids"]) == ("onnx", True, [])
    (problem,) = found["problems"]
    assert "attribute accuracy_level is missing" in problem
    with pytest.raises(RefusedError, match="not sound"):
        OnnxExporter().opened(folder)
    model.metadata_props.clear()
    model.producer_name = "somebody"
    ir.save(model, folder / "model.onnx")
    found = inspect_target(folder)
    assert found["ours"] is False
    text = "\n".join(inspection_lines(found))
    assert "model.onnx: somebody" in text
    assert "problem: model.layers.0." in text
    assert "3 MatMulNBits, 114,688 weights: bits 2, block_size 64, accuracy_level 4, zero points" in text
