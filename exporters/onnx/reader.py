"""Reading a written folder: `read_back` with our own unpacker, `decode` with onnxruntime and the onnx package alone.

Refuses folders whose graph was not written by this exporter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from exporters.onnx.linear import GRID_KEY, WEIGHTS_KEY, bias_name
from exporters.onnx.packing import Packed, split, unpack
from signround.errors import FailedError, RefusedError, refuse
from signround.exporting import missing_packages
from signround.grid import Grid
from signround.qtensor import QuantizedTensor

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

GRAPH = "model.onnx"
DATA = "model.onnx.data"
KEPT_SUFFIX = ".weight"  # kept tensors keep their checkpoint name; what belongs to a MatMulNBits node does not end so
ADDED_KEY = "signround.added_to_norms"  # model metadata: what the file adds to the weight of every norm
DECODED_COLUMNS = 256  # inputs decoded at once: bounds the identity matrix and the time, which grows with its square


def _need(*modules: str) -> None:
    refusals = missing_packages(modules, "onnx", "onnx")
    if refusals:
        raise RefusedError(refusals)


def load_graph(folder: Path) -> ir.Model:
    """The graph of an exported folder; its tensors stay on disk. Raises RefusedError when the folder is not ours."""
    _need("onnx_ir")
    import onnx_ir as ir
    from google.protobuf.message import DecodeError

    path = folder / GRAPH
    if not path.is_file():
        raise refuse(f"the folder has no {GRAPH}", "give a folder that `--to onnx` wrote", str(folder))
    try:
        model = ir.load(path)
    except (DecodeError, ValueError, OSError) as error:
        raise refuse(f"{GRAPH} is damaged", "export the artifact again", str(folder)) from error
    if "signround.scheme" not in model.metadata_props:
        raise refuse(
            f"{GRAPH} was not written by signround (its metadata is missing)",
            "give a folder that `--to onnx` wrote",
            str(folder),
        )
    return model


def added_to(model: ir.Model) -> dict[str, float]:
    """Norm -> what its stored weight has more than the checkpoint's (`ExportedModel.added`)."""
    if ADDED_KEY not in model.metadata_props:
        return {}
    added = float(model.metadata_props[ADDED_KEY])
    return {name: added for name in model.graph.initializers if name and name.endswith(f"norm{KEPT_SUFFIX}")}


def read_quantized(folder: Path) -> Iterator[tuple[str, QuantizedTensor]]:
    """(weight name, integers and fields) of every linear, fused nodes taken apart."""
    for node in load_graph(folder).graph:
        if node.op_type != "MatMulNBits":
            continue
        weights = json.loads(node.metadata_props[WEIGHTS_KEY])
        grid = Grid.from_json(json.loads(node.metadata_props[GRID_KEY]))
        inputs = [*node.inputs, None][:4]
        codes, scales, zeros = (None if value is None else _array(value) for value in inputs[1:])
        if codes is None or scales is None:
            raise FailedError(f"{folder}: node {node.name} has no weight; export the artifact again.")
        packed = split(Packed(codes, scales, zeros), [rows for _, rows in weights])
        for (name, _), part in zip(weights, packed, strict=True):
            yield name, unpack(part, grid, node.attributes["K"].as_int())


def _array(value: ir.Value) -> NDArray[Any]:
    """A copy; onnx_ir maps the whole data file for each tensor, and would keep it mapped while the graph lives."""
    import onnx_ir as ir

    tensor = value.const_value
    assert tensor is not None
    array = tensor.numpy().copy()
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array


def decode_all(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, float32) of every tensor: linears as onnxruntime's MatMulNBits decodes them, the others as the
    onnx package reads them. Shares no code with the packer."""
    _need("onnx", "onnxruntime")
    import onnx

    load_graph(folder)
    model = onnx.load(str(folder / GRAPH), load_external_data=False)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, tensor in constants.items():
        if name.endswith(KEPT_SUFFIX):
            yield name, torch.from_numpy(_read(tensor, folder).astype(np.float32))
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        weight = _decoded(node, constants, folder)
        bias = _read(constants[node.input[5]], folder) if len(node.input) > 5 else None
        properties = {entry.key: entry.value for entry in node.metadata_props}
        end = 0
        for name, rows in json.loads(properties[WEIGHTS_KEY]):
            start, end = end, end + rows
            yield name, weight[start:end].clone()
            if bias is not None:
                yield bias_name(name), torch.from_numpy(bias[start:end].copy())


def _read(tensor: onnx.TensorProto, folder: Path) -> NDArray[Any]:
    """One constant, its external data loaded for this call only."""
    import onnx
    from onnx import external_data_helper, numpy_helper

    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    if external_data_helper.uses_external_data(copy):
        external_data_helper.load_external_data_for_tensor(copy, str(folder))
        copy.data_location = onnx.TensorProto.DEFAULT
    array: NDArray[Any] = numpy_helper.to_array(copy)
    return array


def _decoded(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], folder: Path) -> Tensor:
    """float32 [rows, columns]: the node alone, at accuracy_level 0, fed with the identity. It is cut along its blocks
    (every cut on a byte of the zero points), because each run costs rows * inputs * inputs."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    block, columns, bits = attributes["block_size"], attributes["K"], attributes["bits"]
    codes, scales, *zeros = (_read(constants[name], folder) for name in node.input[1:4] if name)
    step = max(8 // bits, DECODED_COLUMNS // block)
    step += -step % (8 // bits)
    weight = torch.empty(attributes["N"], columns)
    for first in range(0, codes.shape[1], step):
        last = min(first + step, codes.shape[1])
        start, end = first * block, min(last * block, columns)
        constant_inputs = [codes[:, first:last], scales[:, first:last]]
        if zeros:
            constant_inputs.append(zeros[0][:, first * bits // 8 : -(-last * bits // 8)])
        weight[:, start:end] = _identity_product(constant_inputs, attributes | {"K": end - start})
    return weight


def _identity_product(constant_inputs: list[NDArray[Any]], attributes: dict[str, int]) -> Tensor:
    """float32 [N, K]: what MatMulNBits with these constants multiplies by."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    names = ["codes", "scales", "zero_points"][: len(constant_inputs)]
    node = helper.make_node(
        "MatMulNBits", ["value", *names], ["product"], domain="com.microsoft", **(attributes | {"accuracy_level": 0})
    )
    columns, rows = attributes["K"], attributes["N"]
    graph = helper.make_graph(
        [node],
        "one_weight",
        [helper.make_tensor_value_info("value", TensorProto.FLOAT, [columns, columns])],
        [helper.make_tensor_value_info("product", TensorProto.FLOAT, [columns, rows])],
        [
            numpy_helper.from_array(np.ascontiguousarray(array), name)
            for array, name in zip(constant_inputs, names, strict=True)
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"value": np.eye(columns, dtype=np.float32)})
    return torch.from_numpy(product).T
