"""What operators must look like: MatMulNBits, GatherBlockQuantized and DequantizeLinear in blocks, and attention.

One function an operator gives the problems of a node, as text. They know what onnxruntime's CPU kernels take (measured,
1.31), which is less than the schemas allow; 1-D scales, as other exporters write them, pass.
Source: schemas of com.microsoft 1 and of DequantizeLinear 21 to 25; kernels of onnxruntime 1.31.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from exporters.onnx.packing import BLOCKS

if TYPE_CHECKING:
    import onnx_ir as ir

    Rule = Callable[[ir.Node], Iterator[str]]
    Shape = tuple[int, ...]

BITS = (2, 4, 8)
LEVELS = range(5)
REQUIRED = ("K", "N", "bits", "block_size", "accuracy_level")
SCALES = MappingProxyType({"MatMulNBits": (2,), "GatherBlockQuantized": (2,), "DequantizeLinear": (1,), "QMoE": (3, 6)})
FLOATS = ("FLOAT", "FLOAT16")
PACKED_FIELDS = {"UINT8": 1, "INT8": 1, "UINT4": 2, "INT4": 2, "UINT2": 4, "INT2": 4}
OLDEST_OPSET = {"UINT4": 21, "INT4": 21, "UINT2": 25, "INT2": 25}


def constant_of(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    """Input `index` of a node where it is given and a constant."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else value.const_value


def _is_given(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None


def _integer(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def shape_of(tensor: ir.TensorProtocol) -> Shape:
    return tuple(size for size in tensor.shape if isinstance(size, int))


def _tensors(node: ir.Node, wanted: Mapping[int, tuple[Shape, ...]], needed: tuple[int, ...]) -> Iterator[str]:
    """Each constant input has one of its shapes; those `needed` are there."""
    for index, shapes in wanted.items():
        tensor = constant_of(node, index)
        if not _is_given(node, index):
            if index in needed:
                yield f"input {index} is missing"
        elif tensor is None:
            yield f"input {index} is not a constant"
        elif shape_of(tensor) not in shapes:
            yield f"input {index} must have shape {shapes[0]}, got {shape_of(tensor)}"


def _dtypes(node: ir.Node, wanted: Mapping[int, tuple[str, ...]]) -> Iterator[str]:
    for index, names in wanted.items():
        tensor = constant_of(node, index)
        if tensor is not None and tensor.dtype.name not in names:
            yield f"input {index} must be {' or '.join(names)}, got {tensor.dtype.name}"


def matmul_nbits(node: ir.Node) -> Iterator[str]:
    """com.microsoft::MatMulNBits: B [N, blocks, block * bits / 8], scales [N, blocks], zero points packed by rows."""
    missing = [name for name in REQUIRED if name not in node.attributes]
    yield from (f"attribute {name} is missing" for name in missing)
    if set(missing) - {"accuracy_level"}:
        return
    columns, rows, bits, block = (node.attributes[name].as_int() for name in REQUIRED[:4])
    yield from _grid_problems(bits, block)
    yield from level_problems(_integer(node, "accuracy_level", 0))
    if _is_given(node, 4):
        yield "g_idx is set; it is slow at 4 bits and wrong at 2"
    if block not in BLOCKS or bits not in BITS:
        return
    blocks = -(-columns // block)
    zeros = -(-blocks * bits // 8)
    wanted: dict[int, tuple[Shape, ...]] = {
        1: ((rows, blocks, block * bits // 8),),
        2: ((rows, blocks), (rows * blocks,)),
        3: ((rows, zeros), (rows * zeros,)),
        5: ((rows,),),
    }
    yield from _tensors(node, wanted, (1, 2))
    yield from _dtypes(node, {1: ("UINT8",), 2: FLOATS, 3: ("UINT8",), 5: FLOATS})


def level_problems(level: int) -> Iterator[str]:
    """Of the accuracy_level of any operator that has one."""
    if level not in LEVELS:
        yield f"accuracy_level {level}; {LEVELS.start} to {LEVELS.stop - 1} exist"


def _grid_problems(bits: int, block: int) -> Iterator[str]:
    if bits not in BITS:
        yield f"{bits} bits; onnxruntime runs 2, 4 and 8"
    if block not in BLOCKS:
        yield f"blocks of {block}; onnxruntime runs {', '.join(map(str, BLOCKS))}"


def gather_block_quantized(node: ir.Node) -> Iterator[str]:
    """com.microsoft::GatherBlockQuantized: uint8 data packed along its last axis, which is the quantised one; scales
    of the same rank; zero points packed like the data."""
    bits, block = _integer(node, "bits", 4), _integer(node, "block_size", 128)
    yield from _grid_problems(bits, block)
    data, source = constant_of(node, 0), node.inputs[0]
    if data is None:
        if source is None or source.producer() is None:  # else: a reshaped constant, as others share a table
            yield "input 0 is missing" if source is None else "input 0 is not a constant"
        return
    shape, axis = shape_of(data), _integer(node, "quantize_axis", 1)
    yield from _dtypes(node, {0: ("UINT8", "UINT4", "INT4"), 2: FLOATS, 3: (data.dtype.name,)})
    if _integer(node, "gather_axis", 0) != 0:
        yield "gather_axis must be 0"
    if axis % len(shape) != len(shape) - 1:
        yield f"quantize_axis {axis} must be the last of {len(shape)} axes"
    if block not in BLOCKS or bits not in BITS:
        return
    packed = 8 // bits if data.dtype.name == "UINT8" else 1
    wanted = _gather_shapes(shape, packed, block)
    yield from _tensors(node, wanted, (2,))


def _gather_shapes(shape: Shape, packed: int, block: int) -> dict[int, tuple[Shape, ...]]:
    """Scales and zero points of data [rows, bytes], or of [rows, blocks, bytes of a block] with a scale a block."""
    blocks = -(-shape[-1] * packed // block)
    return {2: ((*shape[:-1], blocks),), 3: ((*shape[:-1], -(-blocks // packed)),)}


def dequantize_linear(node: ir.Node) -> Iterator[str]:
    """DequantizeLinear in blocks: one scale and zero point for each `block_size` values along `axis`. Without a block
    size there is one for all, or one a slice along `axis`."""
    block = _integer(node, "block_size", 0)
    data = constant_of(node, 0)
    if data is None:
        return  # an activation is none of our business
    shape = shape_of(data)
    axis = _integer(node, "axis", 1) % max(len(shape), 1)
    yield from _dtypes(node, {0: tuple(PACKED_FIELDS), 1: FLOATS, 2: (data.dtype.name,)})
    wanted: tuple[Shape, ...] = ((), (1,), shape[axis : axis + 1])
    if block:
        if block not in BLOCKS:
            yield f"blocks of {block}; onnxruntime runs {', '.join(map(str, BLOCKS))}"
            return
        wanted = ((*shape[:axis], -(-shape[axis] // block), *shape[axis + 1 :]),)
        if any(use.op_type == "Transpose" for use in node.outputs[0].consumers()):
            yield "the weight is transposed after it is decoded: onnxruntime decodes all of it on every call"
        if PACKED_FIELDS.get(data.dtype.name) == 4 and shape[-1] % 4:
            yield f"rows of {shape[-1]} 2-bit codes: onnxruntime fuses them into other weights unless 4 divides them"
    yield from _tensors(node, {1: wanted, 2: wanted}, (1,))
    yield from _too_new(node, data.dtype.name)


def _too_new(node: ir.Node, dtype: str) -> Iterator[str]:
    graph = node.graph
    opset = 0 if graph is None else graph.opset_imports.get("", 0)
    if opset < OLDEST_OPSET.get(dtype, 0):
        yield f"{dtype} needs opset {OLDEST_OPSET[dtype]}, the graph has {opset}"


def group_query_attention(node: ir.Node) -> Iterator[str]:
    """com.microsoft::GroupQueryAttention: its heads are those of the cache that it is given."""
    heads, kv_heads = _integer(node, "num_heads", 0), _integer(node, "kv_num_heads", 0)
    if not heads or not kv_heads or heads % kv_heads:
        yield f"num_heads {heads} must be a multiple of kv_num_heads {kv_heads}"
    past = node.inputs[3] if _is_given(node, 3) else None
    shape = None if past is None else past.shape
    if shape is not None and len(shape) == 4 and isinstance(shape[1], int) and shape[1] != kv_heads:
        yield f"kv_num_heads {kv_heads}, the cache has {shape[1]}"


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "MatMulNBits": matmul_nbits,
        "GatherBlockQuantized": gather_block_quantized,
        "DequantizeLinear": dequantize_linear,
        "GroupQueryAttention": group_query_attention,
    }
)


def not_finite(model: ir.Model) -> Iterator[str]:
    """Scales with NaN or Inf: onnxruntime computes with them without a word."""
    import onnx_ir as ir

    seen: set[str | None] = set()
    for node in model.graph:
        for index in SCALES.get(node.op_type, ()):
            tensor = constant_of(node, index)
            if tensor is None or tensor.name in seen:
                continue
            seen.add(tensor.name)
            if not np.isfinite(tensor.numpy().astype(np.float32, copy=False)).all():
                yield f"{node.name}: input {index} (scales) holds NaN or Inf"
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()  # onnx_ir maps the whole file for each tensor
