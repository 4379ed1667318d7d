"""The key-values of a GGUF file that say what it is and where it came from.

Names and types as in gguf-py `constants.py`; what llama.cpp needs to build the model is in `hyperparameters.py`.
Nothing here depends on time, host or version, so equal artifacts give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from exporters.gguf.card import read_card
from exporters.gguf.container import KeyValue
from exporters.gguf.naming import model_name
from signround.architecture import EMBEDDING
from signround.files import canonical_json
from signround.gguf_names import ARCHITECTURES, gguf_name
from signround.grid import Grid
from signround.plan import ModelPlan

GRIDS, FLOAT_TYPE = "signround.grids", "signround.float_type"


def general(plan: ModelPlan, file_type: int) -> list[KeyValue]:
    """`general.*`: the architecture comes first, as every loader expects."""
    name = model_name(plan.model, plan.parameters)
    texts = {
        "architecture": ARCHITECTURES[plan.architecture.family.model_type],
        "type": "model",
        "name": name.title,
        "basename": name.base,
        "finetune": name.fine_tune,
        "version": name.version,
        "size_label": name.size,
        "quantized_by": "signround",
    }
    return [
        *(KeyValue(f"general.{key}", "string", text) for key, text in texts.items() if text),
        *read_card(plan.files).entries(),
        KeyValue("general.quantization_version", "u32", 2),
        KeyValue("general.file_type", "u32", file_type),
    ]


def planned_grids(plan: ModelPlan) -> list[tuple[str, Grid]]:
    """(GGUF name, grid) of every quantised tensor of a family that we know."""
    arch = ARCHITECTURES[plan.architecture.family.model_type]
    return [(gguf_name(layer.name, arch), layer.grid) for layer in plan.layers()]


def provenance(plan: ModelPlan, fingerprint: str, float_type: str, grids: Iterable[tuple[str, Grid]]) -> list[KeyValue]:
    """`signround.*`: scheme, method, fingerprints, and the grid of every quantised tensor, for `read_back`."""
    return [
        KeyValue("signround.scheme", "string", plan.scheme),
        *_tuning(plan),
        *_importance(plan),
        KeyValue("signround.artifact", "string", fingerprint),
        KeyValue("signround.plan", "string", plan.fingerprint),
        KeyValue(FLOAT_TYPE, "string", float_type),
        KeyValue(GRIDS, "string", grids_text(grids)),
    ]


def _tuning(plan: ModelPlan) -> list[KeyValue]:
    """How the rounding was tuned, and on what text: what decides the integers besides model and scheme."""
    tuning, calibration = plan.tuning, plan.calibration
    texts = {
        "method": tuning.method,
        "recipe": tuning.recipe,
        "calibration.source": calibration.source,
        "calibration.sha256": calibration.sha256,
    }
    numbers = {
        "calibration.samples": tuning.samples,
        "calibration.seqlen": tuning.seqlen,
        "iters": tuning.iters,
        "batch_size": tuning.batch_size,
        "seed": tuning.seed,
    }
    return [
        *(KeyValue(f"signround.{key}", "string", text) for key, text in texts.items() if text),
        *(KeyValue(f"signround.{key}", "u64", number) for key, number in numbers.items()),
    ]


def _importance(plan: ModelPlan) -> list[KeyValue]:
    """Under the keys of `llama-quantize` where calibration measured the importance of inputs; of a matrix that the user
    gave, its hash: names and paths are no part of a plan."""
    if plan.imatrix_sha256:
        return [KeyValue("signround.imatrix.sha256", "string", plan.imatrix_sha256)]
    if plan.tuning.start != "search":
        return []
    seen = [layer for layer in plan.layers() if layer.name != EMBEDDING or plan.architecture.tied]
    return [
        KeyValue("quantize.imatrix.dataset", "string", plan.calibration.source),
        KeyValue("quantize.imatrix.entries_count", "u32", len(seen)),
        KeyValue("quantize.imatrix.chunks_count", "u32", plan.tuning.samples),
    ]


def grids_text(named: Iterable[tuple[str, Grid]]) -> str:
    """The value of GRIDS: (GGUF tensor name, grid) of every quantised tensor."""
    tensors: dict[Grid, list[str]] = {}
    for name, grid in dict(named).items():  # experts share a name, and their grid
        tensors.setdefault(grid, []).append(name)
    return canonical_json([{"grid": grid.to_json(), "tensors": names} for grid, names in tensors.items()])


def grids_of(values: Mapping[str, Any]) -> dict[str, Grid]:
    """GGUF tensor name -> grid, from the key-values of a file of ours."""
    rows = json.loads(values[GRIDS])
    return {name: Grid.from_json(row["grid"]) for row in rows for name in row["tensors"]}
