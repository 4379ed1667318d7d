"""What a graph is made of, ours or not: versions, quantised operators by kind, what the checker says.

Reads scales, and our own data files whole, for their hashes. Refuses files that are no graph.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.onnx.checker import problems_of
from exporters.onnx.data_files import changed_files
from exporters.onnx.folder_rules import folder_problems
from exporters.onnx.node_rules import constant_of
from exporters.onnx.reader import SCHEME_KEY, load_any, unlabelled
from signround.runtimes.onnx_files import find_graph

if TYPE_CHECKING:
    import onnx_ir as ir

SHOWN = ("bits", "block_size", "accuracy_level")
PLACES = {  # of weights and zero points among the inputs
    "MatMulNBits": ((1, 3),), "GatherBlockQuantized": ((0, 3),), "DequantizeLinear": ((0, 2),),
    "QMoE": ((2, 11), (5, 12)),
}  # fmt: skip


def inspected(folder: Path) -> dict[str, Any]:
    """See `ForeignFiles.inspected`. `graph` holds versions and metadata, `operators` the quantised nodes."""
    model, path = load_any(folder), find_graph(folder)
    operators = quantised_operators(model)
    graph = {
        "file": path.relative_to(folder).as_posix(),
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version))),
        "ir_version": model.ir_version,
        "opsets": dict(model.graph.opset_imports),
        "nodes": len(model.graph),
        "metadata": dict(model.metadata_props),
    }
    ours = SCHEME_KEY in model.metadata_props
    problems = [*problems_of(model, path.parent, values=True), *folder_problems(model, path, folder, ours=ours)]
    if ours:
        problems += [*unlabelled(model), *changed_files(model, path.parent)]
    return {
        "ours": ours,
        "problems": problems,
        "graph": graph,
        "operators": operators,
        "content": _lines(graph, operators),
    }


def quantised_operators(model: ir.Model) -> list[dict[str, Any]]:
    """One entry for each kind of quantised node: its attributes, how many there are, how many weights they hold."""
    counts: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0])
    for node in model.graph:
        weights = [constant_of(node, weight) for weight, _ in PLACES.get(node.op_type, ())]
        present = [weight for weight in weights if weight is not None]
        if not present:
            continue
        zeros = any(constant_of(node, zero) is not None for _, zero in PLACES[node.op_type])
        shown = tuple(_attribute(node, name) for name in SHOWN)
        count = counts[node.op_type, present[0].dtype.name, shown, zeros]
        count[0] += 1
        count[1] += sum(_weights(node, weight) for weight in present)
    return [
        {"operator": kind, "storage": storage, **dict(zip(SHOWN, shown, strict=True)), "zero_points": zeros,
         "nodes": nodes, "weights": weights}
        for (kind, storage, shown, zeros), (nodes, weights) in counts.items()
    ]  # fmt: skip


def _attribute(node: ir.Node, name: str) -> int | None:
    """QMoE has a name of its own for its bits."""
    name = "expert_weight_bits" if name == "bits" and node.op_type == "QMoE" else name
    return node.attributes[name].as_int() if name in node.attributes else None


def _weights(node: ir.Node, weight: ir.TensorProtocol) -> int:
    if node.op_type == "MatMulNBits" and {"K", "N"} <= node.attributes.keys():
        return node.attributes["K"].as_int() * node.attributes["N"].as_int()
    bits = _attribute(node, "bits") or 8
    return weight.size * (8 // bits) if weight.dtype.name == "UINT8" else weight.size


def _lines(graph: dict[str, Any], operators: list[dict[str, Any]]) -> list[str]:
    opsets = ", ".join(f"{domain or 'ai.onnx'} {number}" for domain, number in graph["opsets"].items())
    lines = [f"{graph['file']}: {graph['producer']}, IR {graph['ir_version']}, {opsets}, {graph['nodes']} nodes"]
    lines += [f"  {key}: {value}" for key, value in sorted(graph["metadata"].items()) if key.startswith("signround.")]
    for entry in operators:
        facts = [f"{name} {entry[name]}" for name in SHOWN if entry[name] is not None]
        facts.append("zero points" if entry["zero_points"] else "no zero points")
        lines.append(f"{entry['nodes']} {entry['operator']}, {entry['weights']:,} weights: {', '.join(facts)}")
    return lines
