"""Reading QMoE nodes: each expert's weights apart, for our own unpacker and for onnxruntime's MatMulNBits.

The bytes of one expert are those of a MatMulNBits node (`experts`); that QMoE takes their rows in the same order is
what the comparison of logits shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.onnx.experts import EXPERTS_KEY, GRIDS_KEY
from exporters.onnx.packing import Packed, unpack
from signround.grid import Grid
from signround.qtensor import QuantizedTensor

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

PLACES = ((2, 3, 11), (5, 6, 12))  # of codes, scales and zero points among QMoE's inputs, for fc1 and fc2
IN_TURN = (slice(0, 2), slice(2, 3))  # whose rows lie in turn, of the three weights of an expert


def read_experts(node: ir.Node, array: Callable[[ir.Value], NDArray[Any]]) -> Iterator[tuple[str, QuantizedTensor]]:
    """(weight name, integers and fields) of every expert of a node; `array` reads a constant."""
    experts = json.loads(node.metadata_props[EXPERTS_KEY])
    grids = [Grid.from_json(grid) for grid in json.loads(node.metadata_props[GRIDS_KEY])]
    block = node.attributes["block_size"].as_int()
    for grid, places, in_turn in zip(grids, PLACES, IN_TURN, strict=True):
        values = [node.inputs[place] if place < len(node.inputs) else None for place in places]
        codes, scales, zeros = (None if value is None else array(value) for value in values)
        assert codes is not None
        assert scales is not None
        for index, weights in enumerate(experts):
            names = weights[in_turn]
            for place, name in enumerate(names):
                rows = slice(place, None, len(names))
                packed = Packed(
                    codes[index, rows].reshape(*scales[index, rows].shape, -1),
                    scales[index, rows],
                    None if zeros is None else zeros[index, rows],
                )
                yield name, unpack(packed, grid, block * scales.shape[2], block)


def expert_products(
    node: onnx.NodeProto, array: Callable[[str], NDArray[Any]]
) -> Iterator[tuple[list[str], onnx.NodeProto, dict[str, onnx.TensorProto]]]:
    """(weight names whose rows lie in turn, a MatMulNBits node of these rows, its constants) for every expert and
    stack; `array` reads a constant by name."""
    from onnx import helper, numpy_helper

    properties = {entry.key: entry.value for entry in node.metadata_props}
    block = next(attribute.i for attribute in node.attribute if attribute.name == "block_size")
    experts = json.loads(properties[EXPERTS_KEY])
    for places, in_turn in zip(PLACES, IN_TURN, strict=True):
        inputs = {
            name: array(node.input[place])
            for name, place in zip(("codes", "scales", "zero_points"), places, strict=True)
            if place < len(node.input) and node.input[place]
        }
        _, rows, blocks = inputs["scales"].shape
        width = inputs["codes"].shape[2] // blocks
        attributes = {"K": blocks * block, "N": rows, "bits": width * 8 // block, "block_size": block}
        for index, weights in enumerate(experts):
            apart = {name: stack[index] for name, stack in inputs.items()}
            apart["codes"] = apart["codes"].reshape(rows, blocks, width)
            product = helper.make_node(
                "MatMulNBits", ["value", *apart], ["product"], domain="com.microsoft", **attributes
            )
            yield (
                weights[in_turn],
                product,
                {name: numpy_helper.from_array(np.ascontiguousarray(part), name) for name, part in apart.items()},
            )
