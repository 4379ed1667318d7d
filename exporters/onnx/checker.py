"""Our own look at a written graph: what onnx.checker does not know of MatMulNBits and GatherBlockQuantized, and
onnxruntime says too late.

Each rule stands for a defect that onnxruntime meets silently, slowly or only at the first run. Weights are not judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.onnx.expert_checker import expert_problems
from exporters.onnx.experts import OPERATOR as EXPERTS
from exporters.onnx.packing import BLOCKS

if TYPE_CHECKING:
    import onnx_ir as ir

BITS = (2, 4, 8)
REQUIRED = ("K", "N", "bits", "block_size", "accuracy_level")
G_IDX = 4


def problems_of(model: ir.Model, folder: Path) -> list[str]:
    """Every defect found in a loaded graph whose external data lies in `folder`; empty when it is sound."""
    problems = [*_names(model), *_external_data(model, folder)]
    for node in model.graph:
        rules = {"MatMulNBits": _matmul, "GatherBlockQuantized": _gather, EXPERTS: expert_problems}.get(node.op_type)
        if rules is not None:
            problems += [f"{node.name}: {problem}" for problem in rules(node)]
    return problems


def _names(model: ir.Model) -> Iterator[str]:
    graph = model.graph
    outputs = [value.name for node in graph for value in node.outputs if value.name]
    values = Counter([*outputs, *graph.initializers, *(value.name for value in graph.inputs)])
    nodes = Counter(node.name for node in graph)
    for name, count in [*values.items(), *nodes.items()]:
        if count > 1:
            yield f"{name}: the name is used {count} times"


def _external_data(model: ir.Model, folder: Path) -> Iterator[str]:
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            yield f"{name}: the constant has no value"
        elif isinstance(tensor, ir.ExternalTensor):
            path = folder / tensor.location
            size = path.stat().st_size if path.is_file() else 0
            if Path(tensor.location).name != str(tensor.location):
                yield f"{name}: the data lies outside the folder ({tensor.location})"
            elif (tensor.offset or 0) + tensor.nbytes > size:
                yield f"{name}: the data ends beyond {tensor.location}"


def _matmul(node: ir.Node) -> Iterator[str]:
    missing = [name for name in REQUIRED if name not in node.attributes]
    if missing:
        yield f"attribute {missing[0]} is missing"
        return
    columns, rows, bits, block, level = (node.attributes[name].as_int() for name in REQUIRED)
    if bits not in BITS:
        yield f"{bits} bits; onnxruntime runs 2, 4 and 8"
    if block not in BLOCKS:
        yield f"blocks of {block}; onnxruntime runs {BLOCKS}"
    if level not in range(5):
        yield f"accuracy_level {level}; 0 to 4 exist"
    if len(node.inputs) > G_IDX and node.inputs[G_IDX] is not None:
        yield "g_idx is set; it is slow at 4 bits and wrong at 2"
    blocks = -(-columns // block)
    wanted = {
        1: (rows, blocks, block * bits // 8),
        2: (rows, blocks),
        3: (rows, -(-blocks * bits // 8)),
        5: (rows,),
    }
    yield from _constants(node, wanted, (1, 2))


def _gather(node: ir.Node) -> Iterator[str]:
    missing = [name for name in ("bits", "block_size", "gather_axis", "quantize_axis") if name not in node.attributes]
    if missing:
        yield f"attribute {missing[0]} is missing"
        return
    bits, block = (node.attributes[name].as_int() for name in ("bits", "block_size"))
    axes = tuple(node.attributes[name].as_int() for name in ("gather_axis", "quantize_axis"))
    if bits not in BITS:
        yield f"{bits} bits; onnxruntime runs 2, 4 and 8"
        return
    if block not in BLOCKS:
        yield f"blocks of {block}; onnxruntime runs {BLOCKS}"
        return
    if axes != (0, 1):
        yield f"axes {axes}; packed codes need gather_axis 0 and quantize_axis 1"
    table = node.inputs[0]
    if table is None or table.const_value is None or len(table.const_value.shape) != 2:
        yield "input 0 is not a constant of two axes"
        return
    rows, width = table.const_value.shape.numpy()
    blocks = -(-(width * 8 // bits) // block)
    yield from _constants(node, {2: (rows, blocks), 3: (rows, -(-blocks * bits // 8))}, (2,))


def _constants(node: ir.Node, wanted: dict[int, tuple[int, ...]], needed: tuple[int, ...]) -> Iterator[str]:
    """Shapes of the inputs that must be constants; those `needed` must be there."""
    for index, shape in wanted.items():
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None and index in needed:
            yield f"input {index} is missing"
        elif value is not None and value.const_value is None:
            yield f"input {index} is not a constant"
        elif value is not None and value.const_value is not None and tuple(value.const_value.shape) != shape:
            yield f"input {index} must have shape {shape}, got {tuple(value.const_value.shape)}"
