"""How tensors of a checkpoint lie in a GGUF file: their shapes, and the row order that llama.cpp wants for q and k.

Names are those of `signround.gguf_names`. Some of llama.cpp's architectures (INTERLEAVED) rotate neighbouring pairs of
a head, Hugging Face rotates its halves: rows of q and k (and their biases) are interleaved on the way in. Whole rows
move, so groups along the inputs are untouched (`LlamaModel.permute` in llama.cpp's conversion/llama.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from signround.architecture import Architecture
from signround.gguf_names import ARCHITECTURES, checkpoint_name, is_stack

INTERLEAVED = ("llama", "smollm3", "granite")  # `llama_model_rope_type` says NORM, not NEOX
PLUS_ONE = ("gemma2", "gemma3")  # norms multiply by weight + 1 in the checkpoint, by what the file holds in llama.cpp
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
COMPUTED = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)  # of no checkpoint: they follow from config.json

_VECTOR = ".ffn_gate_inp_shexp.weight"  # one row in Hugging Face's linear, a vector in llama.cpp
_ROTATED = re.compile(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)")


def is_router(name: str) -> bool:
    """Whether GGUF tensor `name` decides which experts run: float32 whatever the file's other matrices are."""
    return ".ffn_gate_inp" in name


def file_shape(name: str, shape: tuple[int, ...], experts: int) -> tuple[int, ...]:
    """Shape of GGUF tensor `name`, outermost first, for checkpoint tensors of `shape`."""
    if is_stack(name):
        return (experts, *shape)
    return shape[1:] if name.endswith(_VECTOR) and len(shape) == 2 else shape


def checkpoint_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of each checkpoint tensor in GGUF tensor `name` of `shape`: the inverse of `file_shape`."""
    if is_stack(name):
        return shape[1:]
    return (1, *shape) if name.endswith(_VECTOR) else shape


def checkpoint_names(name: str, architecture: str, shape: Sequence[int]) -> tuple[str, ...]:
    """The checkpoint tensors in GGUF tensor `name` of `shape` (outermost first), in file order: as many as there are
    experts in a stack, else one."""
    own = checkpoint_name(name, architecture)
    if not is_stack(name):
        return (own,)
    return tuple(own.replace(".experts.", f".experts.{expert}.") for expert in range(shape[0]))


def added(name: str, architecture: str) -> float:
    """What is added to every value of GGUF tensor `name` on the way in."""
    return 1.0 if architecture in PLUS_ONE and name.endswith("norm.weight") else 0.0


def rotated_heads(name: str, architecture: str, heads: int, kv_heads: int) -> int | None:
    """Number of heads whose rows are interleaved in GGUF tensor `name`; None for tensors that keep their order."""
    match = _ROTATED.fullmatch(name)
    if architecture not in INTERLEAVED or match is None:
        return None
    return heads if match[1] == "q" else kv_heads


def rotated_heads_of(name: str, architecture: Architecture) -> int | None:
    """`rotated_heads` for one of our architectures."""
    arch = ARCHITECTURES[architecture.family.model_type]
    return rotated_heads(name, arch, architecture.heads, architecture.kv_heads)


def interleaved(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """[rows, ...] in Hugging Face order -> GGUF order: in each head, row i of half h moves to 2 i + h."""
    split = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def halved(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """The inverse of `interleaved`."""
    split = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)
