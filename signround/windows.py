"""Which blocks see a sliding window of tokens and which have no positions: `layer_types`, patterns and intervals of a
config.json, read as transformers' class of the family reads them.

Refuses what that class fails on, or reads otherwise from one release to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from signround.errors import RESTORE, Refusal
from signround.families import Family
from signround.rope_parameters import FULL, SLIDING

ALTERNATE = 2  # every second block of Gemma 2 sees everything, whatever the file says of a pattern


def window_refusals(config: Mapping[str, Any], family: Family, layers: int) -> list[Refusal]:
    """Why windows and unrotated blocks of this config.json cannot be told; `config` has the family's defaults."""
    problems = [*_window_problems(config, family), *_type_problems(config, family, layers)]
    if family.unrotated:
        problems += _rotation_problems(config, layers)
    return [Refusal(problem, RESTORE, "config.json") for problem in problems]


def _window_problems(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    window = config.get("sliding_window")
    needed = family.window_rule in ("period", "alternate")
    unread = family.window_rule == "never" or (family.window_rule == "switched" and not _switched(config))
    if unread and not isinstance(window, int | None):  # the class checks what it does not use
        yield f"sliding_window is {window!r}, a whole number or null is needed"
    if not unread and (needed or window is not None) and not _is_count(window):
        yield f"sliding_window is {window!r}, {family.hf_class} needs a whole number above 0"
    if config.get("layer_types") is not None:
        return
    if family.window_rule == "period" and not _is_count(config["sliding_window_pattern"]):
        yield f"sliding_window_pattern is {config['sliding_window_pattern']!r}, a whole number above 0 is needed"
    if family.window_rule == "switched" and not unread and not isinstance(config["max_window_layers"], int):
        yield f"max_window_layers is {config['max_window_layers']!r}, a whole number is needed"


def _type_problems(config: Mapping[str, Any], family: Family, layers: int) -> Iterator[str]:
    types = config.get("layer_types")
    if types is None:
        return
    if not isinstance(types, list) or len(types) != layers or not all(kind in (FULL, SLIDING) for kind in types):
        yield f"layer_types is {types!r}, {layers} times {FULL} or {SLIDING} is needed (num_hidden_layers)"
    elif SLIDING in types and (family.window_rule == "never" or _window(config, family) is None):
        yield f"layer_types holds {SLIDING}, but no sliding_window is in force for {family.hf_class}"


def _rotation_problems(config: Mapping[str, Any], layers: int) -> Iterator[str]:
    listed, interval = config.get("no_rope_layers"), config["no_rope_layer_interval"]
    if listed is None and not _is_count(interval):
        yield f"no_rope_layer_interval is {interval!r}, a whole number above 0 is needed"
    entries = listed if isinstance(listed, list) else []
    if listed is not None and (len(entries) < layers or not all(type(entry) is int for entry in entries)):
        yield f"no_rope_layers is {listed!r}, {layers} whole numbers are needed (num_hidden_layers)"


def read_windows(config: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    """Tokens that each block sees, itself included; None for all. Raises nothing: see `window_refusals`."""
    window = _window(config, family)
    return tuple(window if narrow else None for narrow in _windowed(config, family, layers))


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    if family.window_rule == "never" or (family.window_rule == "switched" and not _switched(config)):
        return None
    window: int | None = config.get("sliding_window")
    return window


def _windowed(config: Mapping[str, Any], family: Family, layers: int) -> list[bool]:
    """Which blocks have the window, should there be one."""
    types = config.get("layer_types")
    if family.window_rule in ("never", "every"):
        return [family.window_rule == "every"] * layers
    if types is not None:
        return [kind == SLIDING for kind in types]
    match family.window_rule:
        case "switched":
            return [index >= config["max_window_layers"] for index in range(layers)]
        case "unrotated":
            return [_switched(config) and not rotated for rotated in read_rotated(config, layers)]
        case rule:
            period = ALTERNATE if rule == "alternate" else config["sliding_window_pattern"]
            return [(index + 1) % period != 0 for index in range(layers)]


def read_rotated(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Block by block, whether it has positions, in a family where some have none (`Family.unrotated`)."""
    listed = config.get("no_rope_layers")  # 1 where a block rotates, whatever the name says
    if listed is not None:
        return [bool(entry) for entry in listed[:layers]]
    return [(index + 1) % config["no_rope_layer_interval"] != 0 for index in range(layers)]


def _switched(config: Mapping[str, Any]) -> bool:
    return bool(config.get("use_sliding_window"))


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
