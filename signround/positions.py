"""How the positions of each block rotate: the rotary embeddings of a config.json, as plain numbers.

`rope_parameters` puts its keys together and refuses what has no meaning; what does not fit the heads is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from signround.errors import RESTORE, Refusal
from signround.families import Family
from signround.rope_parameters import FACTORS, ORIGINAL, ROTARY, STRETCHED, rope_parameters
from signround.windows import read_rotated


@dataclass(frozen=True)
class Rope:
    """Rotary positions: `kind` is default, linear, llama3 or longrope; the other fields are those of
    `rope_parameters`. `rotary` is the part of each head that rotates. longrope divides the frequencies by
    `short_factors`, or by `long_factors` in texts longer than `original_context`, and scales both cosine and sine by
    `attention_factor`."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    rotary: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def dimensions(self, head_dim: int) -> int:
        """How many values of a head rotate."""
        return int(head_dim * self.rotary)


def head_refusals(config: Mapping[str, Any], family: Family, head_dim: int) -> list[Refusal]:
    """What does not fit the heads. `config` has the family's defaults and passes `rope_refusals`."""
    parameters = rope_parameters(config, family)[0]
    width = int(head_dim * parameters.get(ROTARY, 1.0))
    if width < 2 or width % 2:
        problem = f"{width} of {head_dim} values of a head rotate, an even number above 0 is needed"
        return [Refusal(problem, RESTORE, "config.json")]
    if parameters["rope_type"] != "longrope":
        return []
    lengths = [len(parameters[key]) for key in FACTORS]
    if lengths == [width // 2, width // 2]:
        return []
    problem = f"longrope has {lengths[0]} short and {lengths[1]} long factors, {width // 2} of each are needed"
    return [Refusal(problem, RESTORE, "config.json")]


def read_rope(config: Mapping[str, Any], family: Family) -> Rope:
    """The rotary positions of blocks that see everything. Raises nothing: see `rope_refusals`."""
    return _rope(rope_parameters(config, family)[0], config)


def read_ropes(config: Mapping[str, Any], family: Family, windows: tuple[int | None, ...]) -> tuple[Rope | None, ...]:
    """Block by block; None where a block has no positions."""
    first, *local = (_rope(parameters, config) for parameters in rope_parameters(config, family))
    if family.unrotated:
        return tuple(first if rotated else None for rotated in read_rotated(config, len(windows)))
    return tuple(local[0] if local and window is not None else first for window in windows)


def _rope(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> Rope:
    kind = parameters["rope_type"]
    ramp = parameters if kind == "llama3" else {}
    factors = parameters if kind == "longrope" else {}
    return Rope(
        theta=float(parameters["rope_theta"]),
        kind=kind,
        factor=1.0 if kind == "default" else float(parameters.get("factor") or 1.0),
        low_freq_factor=float(ramp.get("low_freq_factor", Rope.low_freq_factor)),
        high_freq_factor=float(ramp.get("high_freq_factor", Rope.high_freq_factor)),
        original_context=parameters[ORIGINAL] if kind in STRETCHED else Rope.original_context,
        rotary=float(parameters.get(ROTARY, 1.0)),
        short_factors=tuple(map(float, factors.get("short_factor", ()))),
        long_factors=tuple(map(float, factors.get("long_factor", ()))),
        attention_factor=_attention_factor(parameters, config),
    )


def _attention_factor(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """transformers' `_compute_longrope_parameters`; 1 for the other kinds."""
    if parameters["rope_type"] != "longrope":
        return 1.0
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    original = parameters[ORIGINAL]
    factor = parameters.get("factor") or config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
