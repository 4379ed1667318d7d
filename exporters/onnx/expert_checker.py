"""Our own look at a QMoE node, as `checker` has for MatMulNBits: what onnxruntime meets silently or says too late."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from exporters.onnx.experts import BITS, EXPERTS_KEY
from exporters.onnx.node_rules import constant_of, level_problems, shape_of
from exporters.onnx.packing import BLOCKS

if TYPE_CHECKING:
    import onnx_ir as ir

REQUIRED = ("k", "expert_weight_bits", "block_size", "accuracy_level", "swiglu_fusion", "weights_prepacked")


def expert_problems(node: ir.Node) -> Iterator[str]:
    """Every defect of one node."""
    missing = [name for name in REQUIRED if name not in node.attributes]
    if missing:
        yield f"attribute {missing[0]} is missing"
        return
    used, bits, block, level, fusion, packed = (node.attributes[name].as_int() for name in REQUIRED)
    if bits not in BITS:
        yield f"experts of {bits} bits; {BITS} can be checked"
    if any(name.startswith("fc") for name in node.attributes):
        yield "widths of their own for fc1 or fc2, which onnxruntime's CPU kernel does not compute"
    if block not in BLOCKS:
        yield f"blocks of {block}; onnxruntime runs {BLOCKS}"
        return
    yield from level_problems(level)
    if fusion != 1:
        yield f"swiglu_fusion {fusion}; onnxruntime's CPU kernel knows rows of gate and up in turn alone (1)"
    if packed != 0:
        yield f"weights_prepacked {packed}; the codes lie as in MatMulNBits (0)"
    if EXPERTS_KEY not in node.metadata_props:
        return  # not ours: how many experts there are, and how their rows lie, is written there
    experts = len(json.loads(node.metadata_props[EXPERTS_KEY]))
    if not 1 <= used <= experts:
        yield f"{used} of {experts} experts are used"
    yield from _shapes(node, experts, block, bits)


def _shapes(node: ir.Node, experts: int, block: int, bits: int) -> Iterator[str]:
    """Codes say the widths: fc1 [experts, 2 * intermediate, ..], fc2 [experts, hidden, ..]."""
    codes = [_shape(node, index) for index in (2, 5)]
    if any(len(shape) != 3 for shape in codes):
        yield "codes of fc1 or fc2 are not constants of three axes"
        return
    (_, twice, _), (_, hidden, _) = codes
    for (rows, columns), start, zeros in (((twice, hidden), 2, 11), ((hidden, twice // 2), 5, 12)):
        blocks = columns // block
        if columns % block:
            yield f"blocks of {block} do not divide rows of {columns}"
        wanted = {
            start: (experts, rows, columns * bits // 8),
            start + 1: (experts, rows, blocks),
            zeros: (experts, rows, -(-blocks * bits // 8)),
        }
        for index, shape in wanted.items():
            found = _shape(node, index)
            if found != shape and not (found == () and index == zeros):
                yield f"input {index} must have shape {shape}, got {found}"


def _shape(node: ir.Node, index: int) -> tuple[int, ...]:
    """Of a constant input; () where it is no constant, or left out."""
    tensor = constant_of(node, index)
    return () if tensor is None else shape_of(tensor)
