"""Our own look at a graph: what onnx.checker does not know of quantised weights, and onnxruntime says too late.

Each rule stands for a defect that onnxruntime meets silently, slowly or only at the first run: names used twice, inputs
that nothing makes, versions that it does not load, data that is not where the graph says, and the rules of the
quantised operators (`node_rules`). It judges structure; of values only that scales are finite. Any graph may be asked
about, not only ours.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.onnx.builder import MICROSOFT
from exporters.onnx.expert_checker import expert_problems
from exporters.onnx.experts import OPERATOR as EXPERTS
from exporters.onnx.node_rules import RULES as SINGLE
from exporters.onnx.node_rules import not_finite

if TYPE_CHECKING:
    import onnx_ir as ir

RULES = {**SINGLE, EXPERTS: expert_problems}
# What onnxruntime 1.31 loads (measured); the exporter pins lower ones.
NEWEST_OPSET, NEWEST_IR = 26, 13
MICROSOFT_OPSET = 1
OLDEST_OPSET = {"Attention": 23, "RotaryEmbedding": 23, "RMSNormalization": 23}  # of the standard domain


def problems_of(model: ir.Model, folder: Path, *, values: bool = False) -> list[str]:
    """Every defect found in a loaded graph whose external data lies in `folder`; empty when it is sound. With
    `values`, scales are read (one tensor at a time) and must be finite."""
    problems = [*_emptiness(model), *_versions(model), *_names(model), *_undefined(model)]
    problems += _external_data(model, folder)
    for node in model.graph:
        rule = RULES.get(node.op_type)
        if rule is not None:
            problems += [f"{node.name}: {problem}" for problem in rule(node)]
    if values and not problems:
        problems += not_finite(model)
    return problems


def _emptiness(model: ir.Model) -> Iterator[str]:
    """A file of no bytes is a valid protobuf message."""
    if not model.graph.outputs:
        yield "the graph has no outputs; the file is empty or damaged"


def _versions(model: ir.Model) -> Iterator[str]:
    imports = model.graph.opset_imports
    if model.ir_version > NEWEST_IR:
        yield f"IR version {model.ir_version}; onnxruntime 1.31 loads up to {NEWEST_IR}"
    opset = imports.get("", 0)
    if opset > NEWEST_OPSET:
        yield f"opset {opset}; onnxruntime 1.31 loads up to {NEWEST_OPSET}"
    if imports.get(MICROSOFT, MICROSOFT_OPSET) != MICROSOFT_OPSET:
        yield f"{MICROSOFT} version {imports[MICROSOFT]}; only {MICROSOFT_OPSET} exists"
    for node in model.graph:
        if node.domain not in imports:
            yield f"{node.name}: the domain {node.domain!r} of {node.op_type} is not imported"
        elif node.domain == "" and opset < OLDEST_OPSET.get(node.op_type, 0):
            yield f"{node.name}: {node.op_type} needs opset {OLDEST_OPSET[node.op_type]}, the graph has {opset}"


def _names(model: ir.Model) -> Iterator[str]:
    graph = model.graph
    outputs = [value.name for node in graph for value in node.outputs if value.name]
    values = Counter([*outputs, *graph.initializers, *(value.name for value in graph.inputs)])
    nodes = Counter(node.name for node in graph if node.name)
    for name, count in [*values.items(), *nodes.items()]:
        if count > 1:
            yield f"{name}: the name is used {count} times"


def _undefined(model: ir.Model) -> Iterator[str]:
    """Inputs that no graph input, constant or earlier node gives, and outputs that nothing makes."""
    graph = model.graph
    known = {value.name for value in graph.inputs} | set(graph.initializers)
    for node in graph:
        for value in node.inputs:
            if value is not None and value.name not in known:
                yield f"{node.name}: the input {value.name} is not defined before it"
        known |= {value.name for value in node.outputs}
    for value in graph.outputs:
        if value.name not in known:
            yield f"{value.name}: nothing makes this output"


def _external_data(model: ir.Model, folder: Path) -> Iterator[str]:
    import onnx_ir as ir

    regions: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            yield f"{name}: the constant has no value"
        elif isinstance(tensor, ir.ExternalTensor):
            location, start = str(tensor.location), tensor.offset or 0
            path = folder / location
            size = path.stat().st_size if path.is_file() else None
            if Path(location).name != location:
                yield f"{name}: the data lies outside the folder ({location})"
            elif size is None:
                yield f"{name}: the file of its data, {location}, is missing"
            elif start < 0 or start + tensor.nbytes > size:
                yield f"{name}: the data ends beyond {location}"
            elif tensor.length is not None and tensor.length != tensor.nbytes:
                yield f"{name}: {tensor.length} bytes of data for a tensor of {tensor.nbytes}"
            elif tensor.length is None and start + tensor.nbytes != size:
                yield f"{name}: its data has no length, and is not the rest of {location}"
            elif tensor.nbytes:
                regions[location].append((start, start + tensor.nbytes, name))
    for location, found in regions.items():
        yield from _overlaps(location, found)


def _overlaps(location: str, regions: list[tuple[int, int, str]]) -> Iterator[str]:
    """Constants may share all of their bytes (one table, two shapes), never a part of them."""
    regions.sort()
    reach, owner = 0, (0, 0, "")
    for region in regions:
        start, end, name = region
        if start < reach and region[:2] != owner[:2]:
            yield f"{name}: its data overlaps that of {owner[2]} in {location}"
        if end > reach:
            reach, owner = end, region
