"""config.json and quantize_config.json of a GPTQ folder: written from the plan, read again into a `GptqFormat`.

Written: `quant_method, bits, group_size, sym, desc_act, checkpoint_format, lm_head`, all of them, because readers
differ in their defaults. Never `meta`: it makes auto-round refuse the file. Never act-order, never per-module
overrides: transformers with optimum ignores the latter without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from signround.errors import refuse
from signround.grid import Grid

from .packing import BITS

V1 = "gptq"
V2 = "gptq_v2"
CHECKPOINT_FORMATS = (V1, V2)
WHOLE_ROW = -1
# Scales are fp16, and loaders cast them to this dtype: bfloat16 would cost them three bits (docs/formats.md).
MODEL_DTYPE = "float16"


@dataclass(frozen=True)
class GptqFormat:
    """What `quantization_config` says: the one grid of every linear, and how zero points are stored."""

    bits: int
    group: int | None
    sym: bool
    checkpoint_format: str

    @property
    def zero_offset(self) -> int:
        """What is subtracted from a zero point before it is stored."""
        return 1 if self.checkpoint_format == V1 else 0

    @property
    def grid(self) -> Grid:
        if self.sym:
            return Grid(self.bits, self.group)
        return Grid(self.bits, self.group, zero="point", zero_floor=self.zero_offset)

    def to_json(self) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": WHOLE_ROW if self.group is None else self.group,
            "sym": self.sym,
            "desc_act": False,
            "checkpoint_format": self.checkpoint_format,
            "lm_head": False,
        }


def format_of(grid: Grid, checkpoint_format: str) -> GptqFormat:
    """The format that holds `grid`, one that `refusals` let pass."""
    return GptqFormat(grid.bits, grid.group, grid.zero == "centre", checkpoint_format)


def model_config(source: Mapping[str, Any], gptq: GptqFormat) -> dict[str, Any]:
    """The source's config.json with the quantisation added and the dtype set, under its new and its old name."""
    config = {key: value for key, value in source.items() if key not in ("dtype", "torch_dtype")}
    return {**config, "dtype": MODEL_DTYPE, "torch_dtype": MODEL_DTYPE, "quantization_config": gptq.to_json()}


def read_format(folder: Path) -> GptqFormat:
    """The format of a GPTQ folder. Raises RefusedError for another kind of folder and for what we do not read."""
    path = folder / "config.json"
    if not path.is_file():
        raise refuse(
            "the folder has no config.json", "give a folder that `signround export --to gptq` wrote", str(folder)
        )
    try:
        config = json.loads(path.read_text())["quantization_config"]
        if config["quant_method"] != "gptq":
            raise refuse(
                f"quantization method is {config['quant_method']!r}, 'gptq' is needed", "give a GPTQ folder", str(path)
            )
        group = config["group_size"]
        gptq = GptqFormat(
            config["bits"], None if group == WHOLE_ROW else group, config["sym"], config.get("checkpoint_format", V1)
        )
    except (ValueError, KeyError, TypeError) as error:
        raise refuse(
            f"not the config.json of a GPTQ folder ({type(error).__name__}: {error})", "give a GPTQ folder", str(path)
        ) from error
    unread = [
        f"{key} {value!r}"
        for key, value, allowed in (
            ("bits", gptq.bits, gptq.bits in BITS),
            ("checkpoint_format", gptq.checkpoint_format, gptq.checkpoint_format in CHECKPOINT_FORMATS),
            ("desc_act", config.get("desc_act"), not config.get("desc_act")),
            ("dynamic", config.get("dynamic"), not config.get("dynamic")),
            ("lm_head", config.get("lm_head"), not config.get("lm_head")),
        )
        if not allowed
    ]
    if unread:
        raise refuse(
            f"{', '.join(unread)} is not read here; bits 2, 3, 4, 8 in v1 or v2 without act-order, overrides or a "
            "quantised head are",
            "give a folder that `signround export --to gptq` wrote",
            str(path),
        )
    return gptq
