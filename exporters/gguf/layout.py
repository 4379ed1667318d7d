"""The table of contents of a GGUF file: every tensor with its type and size, known from the plan alone.

Quantised linears take the block type that holds their grid; kept matrices their own dtype or the one asked for; vectors
are float32, as llama.cpp wants them. Never looks at weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from exporters.gguf.container import TensorEntry
from exporters.gguf.hyperparameters import rope_tensors
from exporters.gguf.names import file_shape, is_router
from exporters.gguf.packing import BLOCK_TYPES, block_type_for
from signround.gguf_names import ARCHITECTURES, gguf_name
from signround.mixes import FILE_TYPES
from signround.plan import KeptTensor, LayerPlan, ModelPlan

AUTO = "auto"
Source = TypeVar("Source", LayerPlan, KeptTensor)


@dataclass(frozen=True)
class FloatType:
    """`code` is ggml's type id, `file_type` what `general.file_type` says of a file of such matrices."""

    name: str
    dtype: torch.dtype
    code: int
    file_type: int


FLOAT_TYPES = {
    "f32": FloatType("f32", torch.float32, 0, 0),
    "f16": FloatType("f16", torch.float16, 1, 1),
    "bf16": FloatType("bf16", torch.bfloat16, 30, 32),
}
TYPE_BYTES = {kind.code: (kind.elements, kind.bytes) for kind in BLOCK_TYPES} | {
    kind.code: (1, kind.dtype.itemsize) for kind in FLOAT_TYPES.values()
}


@dataclass(frozen=True)
class Slot:
    """One tensor of the file: its table entry, and the checkpoint tensors that lie in it one after the other: one, or
    as many as there are experts, or none (it is computed, `rope_tensors`)."""

    entry: TensorEntry
    sources: tuple[LayerPlan | KeptTensor, ...]


def float_type_of(kept: KeptTensor, choice: str) -> FloatType:
    """How a kept tensor is stored: vectors and routers float32, matrices in their own dtype or the chosen one."""
    if len(kept.shape) == 1 or is_router(gguf_name(kept.name)):
        return FLOAT_TYPES["f32"]
    if choice != AUTO:
        return FLOAT_TYPES[choice]
    return next(kind for kind in FLOAT_TYPES.values() if kind.dtype == kept.torch_dtype)


def float_bytes(tensor: Tensor) -> torch.Tensor:
    """A contiguous CPU tensor of bytes-compatible integers: numpy has no bfloat16."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def layout(plan: ModelPlan, float_type: str) -> list[Slot]:
    """Every tensor in file order: outer ones, then block by block, then factors of rotary positions."""
    arch = ARCHITECTURES[plan.architecture.family.model_type]
    slots = [_kept_slot((kept,), arch, float_type) for kept in plan.outer]
    slots += [_layer_slot((layer,), arch) for layer in plan.outer_layers]
    for block in plan.blocks:
        slots += [_kept_slot(stack, arch, float_type) for stack in _stacks(block.kept, arch)]
        slots += [_layer_slot(stack, arch) for stack in _stacks(block.layers, arch)]
    for name, factors in rope_tensors(plan.architecture).items():
        slots.append(Slot(TensorEntry(name, factors.shape, FLOAT_TYPES["f32"].code, factors.nbytes), ()))
    return slots


def _stacks(tensors: Sequence[Source], arch: str) -> list[tuple[Source, ...]]:
    """Tensors of one block by the GGUF tensor that holds them, experts in their order."""
    stacks: dict[str, list[Source]] = {}
    for tensor in tensors:
        stacks.setdefault(gguf_name(tensor.name, arch), []).append(tensor)
    return [tuple(stack) for stack in stacks.values()]


def _kept_slot(stack: tuple[KeptTensor, ...], arch: str, choice: str) -> Slot:
    first, name = stack[0], gguf_name(stack[0].name, arch)
    kind = float_type_of(first, choice)
    size = len(stack) * math.prod(first.shape) * kind.dtype.itemsize
    return Slot(TensorEntry(name, file_shape(name, first.shape, len(stack)), kind.code, size), stack)


def _layer_slot(stack: tuple[LayerPlan, ...], arch: str) -> Slot:
    first, name = stack[0], gguf_name(stack[0].name, arch)
    kind = block_type_for(first.grid, first.columns)
    size = len(stack) * first.rows * kind.row_bytes(first.columns)
    shape = file_shape(name, (first.rows, first.columns), len(stack))
    return Slot(TensorEntry(name, shape, kind.code, size), stack)


def file_type(plan: ModelPlan, float_type: str) -> int:
    """`general.file_type`: the number of the file type, or of the type of most weights."""
    if plan.file_type:
        return FILE_TYPES[plan.file_type].number
    counted: Counter[int] = Counter()
    for layer in plan.layers():
        counted[block_type_for(layer.grid, layer.columns).file_type] += layer.rows * layer.columns
    if not counted:
        for kept in plan.kept():
            if len(kept.shape) > 1:
                counted[float_type_of(kept, float_type).file_type] += math.prod(kept.shape)
    return counted.most_common(1)[0][0]
