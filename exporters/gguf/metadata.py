"""The key-values of a GGUF file beside its tokenizer: what llama.cpp needs to build the model, and where it came from.

Names and types as in gguf-py `constants.py`; the set is what llama.cpp's own converter writes for these families.
Nothing here depends on time, host or version, so equal artifacts give equal bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from exporters.gguf.container import KeyValue
from exporters.gguf.names import ARCHITECTURES, gguf_name
from signround.architecture import Architecture
from signround.files import canonical_json
from signround.grid import Grid
from signround.plan import ModelPlan
from signround.positions import Rope

GRIDS, FLOAT_TYPE = "signround.grids", "signround.float_type"


def general(plan: ModelPlan, file_type: int) -> list[KeyValue]:
    """`general.*`: the architecture comes first, as every loader expects."""
    return [
        KeyValue("general.architecture", "string", ARCHITECTURES[plan.architecture.family.model_type]),
        KeyValue("general.type", "string", "model"),
        KeyValue("general.name", "string", plan.model),
        KeyValue("general.size_label", "string", size_label(plan.parameters)),
        KeyValue("general.quantized_by", "string", "signround"),
        KeyValue("general.quantization_version", "u32", 2),
        KeyValue("general.file_type", "u32", file_type),
    ]


def size_label(parameters: int) -> str:
    """The size in the spelling of GGUF's naming convention: 4.1M, 26M, 7.2B."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            value = parameters / unit
            return f"{value:.1f}{letter}" if value < 10 else f"{value:.0f}{letter}"
    return str(parameters)


def hyperparameters(architecture: Architecture) -> list[KeyValue]:
    """`{architecture}.*`: sizes, heads, norm epsilon, positions."""
    name = ARCHITECTURES[architecture.family.model_type]
    numbers = {
        "vocab_size": architecture.vocabulary,
        "context_length": architecture.context,
        "embedding_length": architecture.hidden,
        "block_count": architecture.layers,
        "feed_forward_length": architecture.intermediate,
        "attention.head_count": architecture.heads,
        "attention.head_count_kv": architecture.kv_heads,
        "attention.key_length": architecture.head_dim,
        "attention.value_length": architecture.head_dim,
        "rope.dimension_count": architecture.head_dim,
    }
    entries = [KeyValue(f"{name}.{key}", "u32", value) for key, value in numbers.items()]
    epsilon = KeyValue(f"{name}.attention.layer_norm_rms_epsilon", "f32", architecture.norm_epsilon)
    base = KeyValue(f"{name}.rope.freq_base", "f32", architecture.rope.theta)
    entries += [epsilon, base]
    if architecture.rope.kind == "linear":
        entries.append(KeyValue(f"{name}.rope.scaling.type", "string", "linear"))
        entries.append(KeyValue(f"{name}.rope.scaling.factor", "f32", architecture.rope.factor))
    return entries


def rope_factors(rope: Rope, head_dim: int) -> npt.NDArray[np.float32] | None:
    """Divisors of the rotary frequencies for Llama 3's scaling, float32 [head_dim / 2]; None for the other kinds.

    Long wavelengths are slowed by `factor`, short ones are kept, those between are interpolated (transformers
    `_compute_llama3_parameters`).
    """
    if rope.kind != "llama3":
        return None
    frequencies = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = rope.original_context * frequencies / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / rope.factor + smooth)).astype(np.float32)


def provenance(plan: ModelPlan, fingerprint: str, float_type: str) -> list[KeyValue]:
    """`signround.*`: scheme, method, fingerprints, and the grid of every quantised tensor, for `read_back`."""
    return [
        KeyValue("signround.scheme", "string", plan.scheme),
        KeyValue("signround.method", "string", plan.tuning.method),
        KeyValue("signround.artifact", "string", fingerprint),
        KeyValue("signround.plan", "string", plan.fingerprint),
        KeyValue(FLOAT_TYPE, "string", float_type),
        KeyValue(GRIDS, "string", _grids_text((gguf_name(layer.name), layer.grid) for layer in plan.layers())),
    ]


def _grids_text(named: Iterable[tuple[str, Grid]]) -> str:
    tensors: dict[Grid, list[str]] = {}
    for name, grid in named:
        tensors.setdefault(grid, []).append(name)
    return canonical_json([{"grid": grid.to_json(), "tensors": names} for grid, names in tensors.items()])


def grids_of(values: Mapping[str, Any]) -> dict[str, Grid]:
    """GGUF tensor name -> grid, from the key-values of a file of ours."""
    rows = json.loads(values[GRIDS])
    return {name: Grid.from_json(row["grid"]) for row in rows for name in row["tensors"]}
