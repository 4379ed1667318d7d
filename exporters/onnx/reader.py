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

from exporters.onnx.dequantize import NODE_SUFFIX, Columns, decoded_weight, from_columns, is_weight
from exporters.onnx.expert_reader import expert_products, read_experts
from exporters.onnx.experts import OPERATOR as EXPERTS
from exporters.onnx.linear import COLUMNS_KEY, GRID_KEY, WEIGHTS_KEY, bias_name
from exporters.onnx.packing import Packed, layout_of, split, unpack, unpack_bits
from exporters.onnx.single_node import output_of
from signround.errors import FailedError, UnavailableError, refuse
from signround.exporting import missing_packages
from signround.grid import Grid
from signround.qtensor import QuantizedTensor
from signround.runtimes.onnx_files import find_graph

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

SCHEME_KEY = "signround.scheme"  # model metadata: what tells our graphs from others
ADDED_KEY = "signround.added_to_norms"  # model metadata: what the file adds to the weight of every norm
DTYPE_KEY = "signround.dtype"  # model metadata: what the graph computes in; absent in files of earlier versions
KEPT_SUFFIXES = (".weight", ".bias")  # kept tensors keep their checkpoint name
PRODUCT, GATHER = "MatMulNBits", "GatherBlockQuantized"
LABELS = {WEIGHTS_KEY, GRID_KEY}  # metadata of each node that holds weights
PLACES = {PRODUCT: (1, 2, 3), GATHER: (0, 2, 3)}  # which inputs are codes, scales, zero points
DEQUANTIZE_PLACES = (0, 1, 2)
GATHERED_WEIGHTS = 1 << 24  # of an embedding that are looked up at once
DECODED_COLUMNS = 256  # inputs decoded at once: bounds the identity matrix and the time, which grows with its square


def _need(*modules: str) -> None:
    refusals = missing_packages(modules, "onnx", "onnx")
    if refusals:
        raise UnavailableError(refusals)


def load_any(folder: Path) -> ir.Model:
    """The graph of a folder, whoever wrote it; its tensors stay on disk. Raises RefusedError when there is none."""
    _need("onnx_ir")
    import onnx_ir as ir
    from google.protobuf.message import DecodeError

    path = find_graph(folder)
    try:
        return ir.load(path)
    except (DecodeError, ir.serde.SerdeError, ValueError, OSError) as error:
        raise refuse(f"{path.name} is damaged", "export the artifact again", str(folder)) from error


def load_graph(folder: Path) -> ir.Model:
    """The graph of an exported folder. Raises RefusedError when the folder is not ours."""
    model = load_any(folder)
    if SCHEME_KEY not in model.metadata_props:
        raise refuse(
            f"{find_graph(folder).name} was not written by signround (its metadata is missing)",
            "give a folder that `--to onnx` wrote",
            str(folder),
        )
    return model


def unlabelled(model: ir.Model) -> Iterator[str]:
    """Quantised nodes of a graph of ours that do not say which weights they hold."""
    for node in model.graph:
        if (node.op_type in (PRODUCT, GATHER) or is_weight(node)) and LABELS - node.metadata_props.keys():
            yield f"{node.name}: it does not say which weights it holds; another tool rewrote the graph"


def added_to(model: ir.Model) -> dict[str, float]:
    """Norm -> what its stored weight has more than the checkpoint's (`ExportedModel.added`)."""
    if ADDED_KEY not in model.metadata_props:
        return {}
    added = float(model.metadata_props[ADDED_KEY])
    return {name: added for name in model.graph.initializers if name and name.endswith("norm.weight")}


def read_quantized(folder: Path) -> Iterator[tuple[str, QuantizedTensor]]:
    """(weight name, integers and fields) of every linear, fused nodes taken apart, and of a quantised embedding, once
    where it is the head too."""
    seen: set[str] = set()
    for node in load_graph(folder).graph:
        if node.op_type == EXPERTS:
            yield from read_experts(node, constant_array)
        if node.op_type not in (PRODUCT, GATHER) and not is_weight(node):
            continue
        weights = json.loads(node.metadata_props[WEIGHTS_KEY])
        if all(name in seen for name, _ in weights):
            continue
        seen |= {name for name, _ in weights}
        grid = Grid.from_json(json.loads(node.metadata_props[GRID_KEY]))
        packed, columns = _packed(node, grid, sum(rows for _, rows in weights))
        for (name, _), part in zip(weights, split(packed, [rows for _, rows in weights]), strict=True):
            yield name, unpack(part, grid, columns)


def _packed(node: ir.Node, grid: Grid, rows: int) -> tuple[Packed, int]:
    """What a node holds in MatMulNBits' layout, and how many inputs it has."""
    inputs = [*node.inputs, None, None][:4]
    places = DEQUANTIZE_PLACES if is_weight(node) else PLACES[node.op_type]
    codes, scales, zeros = (None if inputs[place] is None else constant_array(inputs[place]) for place in places)
    if codes is None or scales is None:
        raise FailedError(f"node {node.name} has no weight; export the artifact again.")
    scales = scales.astype(np.float32)
    if is_weight(node):
        columns = codes.shape[0]
        return from_columns(Columns(codes, scales, zeros), layout_of(grid, rows, columns)), columns
    columns = node.attributes["K"].as_int() if node.op_type == PRODUCT else int(node.metadata_props[COLUMNS_KEY])
    return Packed(codes.reshape(*scales.shape, -1), scales, zeros), columns


def constant_array(value: ir.Value | None) -> NDArray[Any]:
    """A copy, read and unpacked here: onnx_ir maps the whole data file for each tensor, and would keep it mapped while
    the graph lives; onnx_ir 0.1 also wants twice the bytes of 2-bit integers, which the end of a file does not have."""
    import onnx_ir as ir

    assert value is not None
    tensor = value.const_value
    assert tensor is not None
    if isinstance(tensor, ir.ExternalTensor):
        stored = np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset or 0)
    else:
        stored = np.frombuffer(tensor.tobytes(), np.uint8).copy()
    shape, dtype = tensor.shape.numpy(), tensor.dtype
    if dtype.name not in _BYTES:
        return stored.view(dtype.numpy()).reshape(shape)
    codes = unpack_bits(stored[None], dtype.bitwidth)[0, : tensor.size].reshape(shape)
    # ml_dtypes' integers of 2 and 4 bits become those of 8 that hold one of them a byte
    return codes.view(dtype.numpy()).astype(_BYTES[dtype.name])


_BYTES = {"INT2": np.int8, "INT4": np.int8, "UINT2": np.uint8, "UINT4": np.uint8}


def decode_all(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, float32) of every tensor: linears as onnxruntime decodes them, a quantised embedding as its
    GatherBlockQuantized does, the others as the onnx package reads them. Where the embedding is the head too, both are
    decoded; it comes twice when they differ. Shares no code with the packer."""
    _need("onnx", "onnxruntime")
    import onnx

    load_graph(folder)
    graph = find_graph(folder)
    model, folder = onnx.load(str(graph), load_external_data=False), graph.parent
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    biases = _biases(model)
    for name, tensor in constants.items():
        if name.endswith(KEPT_SUFFIXES) and name not in biases.values():
            yield name, torch.from_numpy(_read(tensor, folder).astype(np.float32))
    tables = {_weights_of(node)[0][0]: node for node in model.graph.node if node.op_type == GATHER}
    for name, node in tables.items():
        yield name, torch.cat([rows for _, rows in _gathered(node, constants, folder)])
    for node in model.graph.node:
        if node.op_type == EXPERTS:
            for names, product, parts in expert_products(node, lambda name: _read(constants[name], folder)):
                decoded = _decoded(product, parts, folder)
                yield from ((name, decoded[place :: len(names)].clone()) for place, name in enumerate(names))
        if node.op_type != PRODUCT and not is_weight(node):
            continue
        weights = _weights_of(node)
        if is_weight(node):
            weight = decoded_weight(node, [_read(constants[name], folder) for name in node.input])
        else:
            weight = _decoded(node, constants, folder)
        table = tables.get(weights[0][0])
        if table and all(torch.equal(weight[part], rows) for part, rows in _gathered(table, constants, folder)):
            continue
        bias = _read(constants[biases[node.name]], folder).astype(np.float32) if node.name in biases else None
        end = 0
        for name, rows in weights:
            start, end = end, end + rows
            yield name, weight[start:end].clone()
            if bias is not None:
                yield bias_name(name), torch.from_numpy(bias[start:end].copy())


def _biases(model: onnx.ModelProto) -> dict[str, str]:
    """Node that holds weights -> the constant that is their bias."""
    constants = {tensor.name for tensor in model.graph.initializer}
    found = {node.name: node.input[5] for node in model.graph.node if node.op_type == PRODUCT and len(node.input) > 5}
    standard = {
        node.name: node.name.removesuffix(NODE_SUFFIX) + ".bias" for node in model.graph.node if is_weight(node)
    }
    return found | {node: bias for node, bias in standard.items() if bias in constants}


def _weights_of(node: onnx.NodeProto) -> list[tuple[str, int]]:
    """Names and rows of the weights in a node of ours."""
    properties = {entry.key: entry.value for entry in node.metadata_props}
    return [(name, rows) for name, rows in json.loads(properties[WEIGHTS_KEY])]


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
    scales = scales.astype(np.float32)  # those of an fp16 graph: the product would be rounded
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
    codes, *others = constant_inputs
    identity = np.eye(attributes["K"], dtype=np.float32)
    return _result(PRODUCT, [identity, codes, *others], 0, attributes | {"accuracy_level": 0}).T


def _gathered(
    node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], folder: Path
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, float32 [rows, columns]): every row that the node can give, looked up in slices of its table."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    properties = {entry.key: entry.value for entry in node.metadata_props}
    codes, scales, *zeros = (_read(constants[name], folder) for name in [node.input[0], *node.input[2:]])
    scales = scales.astype(np.float32)
    rows, columns = codes.shape[0], int(properties[COLUMNS_KEY])
    step = max(1, GATHERED_WEIGHTS // columns)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        ids = np.arange(part.stop - start, dtype=np.int64)
        inputs = [codes[part], ids, scales[part], *(array[part] for array in zeros)]
        yield part, _result(GATHER, inputs, 1, attributes)[:, :columns]


def _result(kind: str, inputs: list[NDArray[Any]], fed: int, attributes: dict[str, int]) -> Tensor:
    """What one node of onnxruntime gives for these inputs, float32; all but the input `fed` are its constants."""
    from onnx import helper, numpy_helper

    names = [f"input{index}" for index in range(len(inputs))]
    node = helper.make_node(kind, names, ["output"], domain="com.microsoft", **attributes)
    constants = [
        numpy_helper.from_array(np.ascontiguousarray(array), name)
        for index, (name, array) in enumerate(zip(names, inputs, strict=True))
        if index != fed
    ]
    return output_of(node, constants, {names[fed]: inputs[fed]})
