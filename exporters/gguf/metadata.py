"""The key-values of a GGUF file that say what it is and where it came from.

Names and types as in gguf-py `constants.py`; what llama.cpp needs to build the model is in `hyperparameters.py`.
Nothing here depends on time, host or version, so equal artifacts give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from exporters.gguf.container import KeyValue
from exporters.gguf.names import ARCHITECTURES, gguf_name
from signround.files import canonical_json
from signround.grid import Grid
from signround.plan import ModelPlan

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


def provenance(plan: ModelPlan, fingerprint: str, float_type: str) -> list[KeyValue]:
    """`signround.*`: scheme, method, fingerprints, and the grid of every quantised tensor, for `read_back`."""
    arch = ARCHITECTURES[plan.architecture.family.model_type]
    grids = _grids_text((gguf_name(layer.name, arch), layer.grid) for layer in plan.layers())
    return [
        KeyValue("signround.scheme", "string", plan.scheme),
        KeyValue("signround.method", "string", plan.tuning.method),
        KeyValue("signround.artifact", "string", fingerprint),
        KeyValue("signround.plan", "string", plan.fingerprint),
        KeyValue(FLOAT_TYPE, "string", float_type),
        KeyValue(GRIDS, "string", grids),
    ]


def _grids_text(named: Iterable[tuple[str, Grid]]) -> str:
    tensors: dict[Grid, list[str]] = {}
    for name, grid in dict(named).items():  # experts share a name, and their grid
        tensors.setdefault(grid, []).append(name)
    return canonical_json([{"grid": grid.to_json(), "tensors": names} for grid, names in tensors.items()])


def grids_of(values: Mapping[str, Any]) -> dict[str, Grid]:
    """GGUF tensor name -> grid, from the key-values of a file of ours."""
    rows = json.loads(values[GRIDS])
    return {name: Grid.from_json(row["grid"]) for row in rows for name in row["tensors"]}
