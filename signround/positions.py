"""Where a block looks and how its positions rotate: sliding windows and rotary embeddings of a config.json.

Plain numbers, block by block; the spellings of transformers 5 and of earlier versions. What transformers' class would
read otherwise than we do is refused by `rope_refusals`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from signround.errors import Refusal
from signround.families import Family


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


def rope_refusals(config: Mapping[str, Any], family: Family) -> list[Refusal]:
    """Why positions of this config.json cannot be computed; `config` has the family's defaults."""
    found = []
    for parameters in _all_parameters(config, family):
        kind = parameters["rope_type"]
        if kind not in family.rope_kinds:
            found.append(
                Refusal(
                    f"rope scaling {kind!r} is not supported; supported are {', '.join(family.rope_kinds)}",
                    "remove the scaling from a copy of config.json (shorter context) or choose another model",
                    "config.json",
                )
            )
        rotary = parameters.get("partial_rotary_factor", 1.0)
        if rotary != 1.0 and not family.partial_rotary:
            found.append(
                Refusal(
                    f"partial_rotary_factor is {rotary!r}, {family.hf_class} rotates whole heads",
                    "restore the file from the model's publisher",
                    "config.json",
                )
            )
    return list(dict.fromkeys(found))


def longrope_refusals(config: Mapping[str, Any], family: Family, head_dim: int) -> list[Refusal]:
    """Factors that do not fit the heads."""
    parameters = _all_parameters(config, family)[0]
    if parameters["rope_type"] != "longrope":
        return []
    wanted = int(head_dim * parameters.get("partial_rotary_factor", 1.0)) // 2
    lengths = [len(parameters.get(key) or ()) for key in ("short_factor", "long_factor")]
    if lengths == [wanted, wanted]:
        return []
    return [
        Refusal(
            f"longrope has {lengths[0]} short and {lengths[1]} long factors, {wanted} of each are needed",
            "restore the file from the model's publisher",
            "config.json",
        )
    ]


def read_rope(config: Mapping[str, Any], family: Family) -> Rope:
    """The rotary positions of blocks that see everything. Raises nothing: see `rope_refusals`."""
    return _rope(_all_parameters(config, family)[0], config)


def read_ropes(config: Mapping[str, Any], family: Family, windows: tuple[int | None, ...]) -> tuple[Rope | None, ...]:
    """Block by block; None where a block has no positions."""
    first, *local = (_rope(parameters, config) for parameters in _all_parameters(config, family))
    if family.unrotated:
        return tuple(first if rotated else None for rotated in _rotated(config, len(windows)))
    return tuple(local[0] if local and window is not None else first for window in windows)


def _rotated(config: Mapping[str, Any], layers: int) -> list[bool]:
    listed = config.get("no_rope_layers")  # 1 where a block rotates, whatever the name says
    if listed:
        return [bool(entry) for entry in listed[:layers]]
    return [(index + 1) % config["no_rope_layer_interval"] != 0 for index in range(layers)]


def _all_parameters(config: Mapping[str, Any], family: Family) -> list[dict[str, Any]]:
    """Parameters of blocks that see everything, then (with `local_rope`) those of windowed ones."""
    if not family.local_rope:
        return [_flat(config.get("rope_parameters") or config.get("rope_scaling") or {}, config, config["rope_theta"])]
    nested = config.get("rope_parameters") or {"full_attention": config.get("rope_scaling")}
    return [
        _flat(nested.get("full_attention") or {}, config, config["rope_theta"]),
        _flat(nested.get("sliding_attention") or {}, config, config["rope_local_base_freq"]),
    ]


def _flat(given: Mapping[str, Any], config: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or `rope_theta` with `rope_scaling` of earlier versions."""
    parameters = dict(given)
    parameters.setdefault("rope_type", parameters.pop("type", "default") or "default")
    parameters.setdefault("rope_theta", theta)
    if "partial_rotary_factor" in config:
        parameters.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    return parameters


def _rope(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> Rope:
    original = parameters.get("original_max_position_embeddings", 8192)
    if parameters["rope_type"] == "longrope":
        original = config["original_max_position_embeddings"]
    return Rope(
        theta=float(parameters["rope_theta"]),
        kind=parameters["rope_type"],
        factor=float(parameters.get("factor") or 1.0),
        low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_freq_factor=float(parameters.get("high_freq_factor", 4.0)),
        original_context=int(original),
        rotary=float(parameters.get("partial_rotary_factor", 1.0)),
        short_factors=tuple(map(float, parameters.get("short_factor") or ())),
        long_factors=tuple(map(float, parameters.get("long_factor") or ())),
        attention_factor=_attention_factor(parameters, config, int(original)),
    )


def _attention_factor(parameters: Mapping[str, Any], config: Mapping[str, Any], original: int) -> float:
    """transformers' `_compute_longrope_parameters`; 1 for the other kinds."""
    if parameters["rope_type"] != "longrope":
        return 1.0
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    factor = parameters.get("factor") or config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def window_refusals(config: Mapping[str, Any], family: Family) -> list[Refusal]:
    """A window that the family needs and the file does not tell."""
    window = config.get("sliding_window")
    if family.window_rule != "period" or (isinstance(window, int) and window > 0):
        return []
    return [
        Refusal(
            f"sliding_window is {window!r}, {family.hf_class} needs a whole number above 0",
            "restore the file from the model's publisher",
            "config.json",
        )
    ]


def read_windows(config: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    """Tokens that each block sees, itself included; None for all. `config` has the family's defaults."""
    window = config.get("sliding_window")
    if window is None or family.window_rule == "never":
        return (None,) * layers
    if family.window_rule == "every":
        return (window,) * layers
    switched = bool(config.get("use_sliding_window", False))
    if family.window_rule == "switched" and not switched:
        return (None,) * layers
    types = config.get("layer_types")
    if types:
        return tuple(window if kind == "sliding_attention" else None for kind in types[:layers])
    match family.window_rule:
        case "switched":
            windowed = [index >= config["max_window_layers"] for index in range(layers)]
        case "period":
            windowed = [(index + 1) % config["sliding_window_pattern"] != 0 for index in range(layers)]
        case _:
            windowed = [switched and not rotated for rotated in _rotated(config, layers)]
    return tuple(window if narrow else None for narrow in windowed)
