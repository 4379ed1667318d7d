"""`Grid.decode` against the readers that ship, bit for bit: gguf-py for llama.cpp's types, onnxruntime for the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from signround.formats import grid_for
from signround.grid import Grid, grouped
from signround.qtensor import QuantizedTensor
from tests.gguf_blocks import pack
from tests.small_artifacts import rounded_tensor
from tests.test_grid import SUPER

DIRECT = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4")


def awkward_weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Every magnitude from far below fp16's subnormals to beyond its range, zero blocks, positive and negative rows."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.logspace(-9, 5, rows).unsqueeze(1)
    weight[::7, :256] = 0.0  # a whole super-block
    weight[1::7, 32:64] = 0.0  # a group inside one
    weight[2::7] = weight[2::7].abs()
    weight[3::7] = -weight[3::7].abs()
    weight[4::7, ::64] *= 100
    return weight


def assert_bit_equal(ours: torch.Tensor, theirs: np.ndarray[Any, Any]) -> None:
    assert theirs.dtype == np.float32
    different = (ours.numpy().view(np.int32) != theirs.view(np.int32)).mean()
    assert different == 0, f"{different:.2%} of the weights differ"


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("name", [*DIRECT, *SUPER])
def test_llama_cpp_types_decode_as_gguf_py_does(name: str, flips: bool) -> None:
    from gguf import GGMLQuantizationType, quants

    grid = SUPER[name] if name in SUPER else grid_for(name)
    generator = torch.Generator().manual_seed(22) if flips else None
    tensor = rounded_tensor(awkward_weight(512, 512, seed=21), grid, generator)
    data = pack(tensor, name)
    kind = GGMLQuantizationType[name.upper()]
    assert_bit_equal(tensor.decode(), quants.dequantize(data, kind))


@pytest.mark.parametrize("name", SUPER)
def test_the_awkward_weight_reaches_the_corners_of_two_level_scales(name: str) -> None:
    """Without subnormal and zero super-scales, and sub-scales at both ends, the test above would prove less."""
    tensor = rounded_tensor(awkward_weight(512, 512, seed=21), SUPER[name])
    shared = tensor.fields["scale_super"].float().abs()
    assert ((shared > 0) & (shared < 2.0**-14)).any()
    assert (shared == 0).any()
    level = SUPER[name].super_block
    assert level is not None
    assert int(tensor.fields["scale_sub"].max()) == level.high
    assert int(tensor.fields["scale_sub"].min()) == level.low


def matmulnbits(tensor: QuantizedTensor) -> np.ndarray[Any, Any]:
    """The weight as onnxruntime decodes it: MatMulNBits with float activations on the identity matrix."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = tensor.shape
    grid = tensor.grid
    group = grid.group_of(columns)
    per_byte = 8 // grid.bits
    weights = [1 << (grid.bits * place) for place in range(per_byte)]
    blocks = grouped(tensor.codes, group).numpy().astype(np.uint32)
    packed = (blocks.reshape(*blocks.shape[:2], -1, per_byte) * weights).sum(-1).astype(np.uint8)
    inputs = {"B": packed, "scales": tensor.fields["scale"].float().numpy()}
    if grid.zero == "point":
        points = tensor.fields["zero_point"].numpy().astype(np.uint32)
        points = np.pad(points, ((0, 0), (0, -points.shape[1] % per_byte)))
        inputs["zero_points"] = (points.reshape(rows, -1, per_byte) * weights).sum(-1).astype(np.uint8)
    node = helper.make_node(
        "MatMulNBits", ["A", *inputs], ["Y"], domain="com.microsoft",
        K=columns, N=rows, bits=grid.bits, block_size=group, accuracy_level=0,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, [columns, columns])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [columns, rows])],
        [numpy_helper.from_array(value, name) for name, value in inputs.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"A": np.eye(columns, dtype=np.float32)})
    return np.ascontiguousarray(result.T)


@pytest.mark.parametrize("name", ["w4g32", "w2g64-asym", "w8g128-asym", "w4g16-asym", "w2g32", "w8g64"])
@pytest.mark.parametrize("columns", [256, 272])
def test_onnxruntime_decodes_the_same_weights(name: str, columns: int) -> None:
    """272 leaves a ragged last group. Adding exact zeros can turn -0.0 into 0.0, so values are compared, not bits."""
    grid = grid_for(name)
    weight = awkward_weight(96, columns, seed=23).clamp(-1e4, 1e4)
    tensor = rounded_tensor(weight, grid, torch.Generator().manual_seed(24))
    assert np.array_equal(tensor.decode().numpy(), matmulnbits(tensor))


def test_a_grid_is_not_the_other_one() -> None:
    """The comparisons above can fail: Q4_0 bytes read through another zero are other weights."""
    from gguf import GGMLQuantizationType, quants

    tensor = rounded_tensor(awkward_weight(8, 256, seed=25), Grid(bits=4, group=32))
    data = pack(tensor, "q4_0")
    data[:, 2] ^= 1
    assert not np.array_equal(tensor.decode().numpy(), quants.dequantize(data, GGMLQuantizationType.Q4_0))
