"""The rotary parameters of a config.json, put together from its several keys as transformers does (5.5 to 5.23 agree).

Refuses values that transformers' class fails on, turns into nan, or reads otherwise from one release to the next, so
that a config.json either means the same to every exporter and to transformers or is turned down before any work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from signround.errors import RESTORE, Refusal
from signround.families import Family

FULL, SLIDING = "full_attention", "sliding_attention"
ROTARY, ORIGINAL = "partial_rotary_factor", "original_max_position_embeddings"
FACTORS = ("short_factor", "long_factor")
NEEDED = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("rope_theta",),
}
OPTIONAL = {"longrope": ("factor", "attention_factor")}  # null counts as left out
STRETCHED = ("llama3", "longrope")  # kinds that know the context of pretraining


def rope_parameters(config: Mapping[str, Any], family: Family) -> list[dict[str, Any]]:
    """Parameters of blocks that see everything, then (with `local_rope`) those of windowed ones, in transformers 5's
    keys. `config` has the family's defaults, and `rope_refusals` has nothing to say about its shape."""
    if family.local_rope:
        return _by_layer_type(config, family)
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    parameters = _completed(given, config["rope_theta"], config, family)
    if parameters["rope_type"] in STRETCHED:
        # transformers lets the key beside the parameters win over the one among them
        inner = parameters.get(ORIGINAL, config["max_position_embeddings"])
        parameters[ORIGINAL] = config.get(ORIGINAL, inner)
    return [parameters]


def _by_layer_type(config: Mapping[str, Any], family: Family) -> list[dict[str, Any]]:
    nested = config.get("rope_parameters") or {}
    full, local = ({"rope_type": "default"} if nested.get(key) is None else nested[key] for key in (FULL, SLIDING))
    scaled = {**full, **(config.get("rope_scaling") or {})}
    return [
        _completed(scaled, config["rope_theta"], config, family),
        _completed(local, config["rope_local_base_freq"], config, family),
    ]


def _completed(given: Mapping[str, Any], theta: Any, config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    parameters = {"rope_type": given.get("type", "default"), "rope_theta": theta, **given}
    rotary = config.get(ROTARY, 1.0)
    if rotary is not None or family.partial_rotary:  # other classes take null for the whole head
        parameters.setdefault(ROTARY, rotary)
    return parameters


def rope_refusals(config: Mapping[str, Any], family: Family) -> list[Refusal]:
    """Why positions of this config.json cannot be computed; `config` has the family's defaults."""
    found = list(_shape_refusals(config, family))
    if not found:
        found = [
            refusal for parameters in rope_parameters(config, family) for refusal in _value_refusals(parameters, family)
        ]
    return list(dict.fromkeys(found))


def _shape_refusals(config: Mapping[str, Any], family: Family) -> Iterator[Refusal]:
    """What is not the object that it should be."""
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    broken = [key for key in ("rope_scaling", "rope_parameters") if not isinstance(config.get(key), Mapping | None)]
    if broken:
        yield from (_damaged(f"{key} is {config[key]!r}, an object or null is needed") for key in broken)
    elif family.local_rope:
        yield from _nesting_refusals(scaling, parameters, family)
    elif any(isinstance(value, Mapping) for value in (scaling or parameters or {}).values()):
        yield _damaged(f"rope_parameters differ by layer type, {family.hf_class} takes one set for all blocks")


def _nesting_refusals(
    scaling: Mapping[str, Any] | None, parameters: Mapping[str, Any] | None, family: Family
) -> Iterator[Refusal]:
    full = {"rope_type": "default"} if parameters is None else parameters.get(FULL)
    broken = {
        key: value for key in (FULL, SLIDING) if not isinstance(value := (parameters or {}).get(key), Mapping | None)
    }
    yield from (
        _damaged(f"rope_parameters.{key} is {value!r}, an object or null is needed") for key, value in broken.items()
    )
    if broken or scaling is None:
        return
    if full is None:
        yield _damaged(f"rope_scaling stands beside rope_parameters without {FULL}, {family.hf_class} needs it there")
        return
    kind, old = full.get("rope_type"), scaling.get("type")
    if "rope_type" not in scaling and None not in (kind, old) and kind != old:
        # transformers 4 took the older key for the kind; 5 keeps the kind that stands beside it
        yield Refusal(
            f"rope_scaling has type {old!r}, but {family.hf_class} of transformers 5 takes rope_type {kind!r}",
            "rename the key type to rope_type in a copy of config.json, or remove the scaling there",
            "config.json",
        )


def _value_refusals(parameters: Mapping[str, Any], family: Family) -> Iterator[Refusal]:
    kind = parameters["rope_type"]
    if kind not in family.rope_kinds:
        yield Refusal(
            f"rope scaling {kind!r} is not supported; supported are {', '.join(family.rope_kinds)}",
            "remove the scaling from a copy of config.json (shorter context) or choose another model",
            "config.json",
        )
        return
    optional = [key for key in OPTIONAL.get(kind, ()) if parameters.get(key) is not None]
    wrong = [key for key in (*NEEDED[kind], *optional) if not _is_number(parameters.get(key))]
    yield from (_unfit(parameters, key, "a number above 0") for key in wrong)
    if kind in STRETCHED and not _is_context(parameters[ORIGINAL]):
        yield _unfit(parameters, ORIGINAL, "a whole number above 1")
    if kind == "longrope":
        for key in FACTORS:
            if not isinstance(parameters.get(key), list) or not all(map(_is_number, parameters[key])):
                yield _unfit(parameters, key, "a list of numbers above 0")
    if kind == "llama3" and not wrong and parameters["low_freq_factor"] >= parameters["high_freq_factor"]:
        yield _unfit(parameters, "high_freq_factor", f"more than low_freq_factor {parameters['low_freq_factor']!r}")
    yield from _rotary_refusals(parameters.get(ROTARY, 1.0), family)


def _rotary_refusals(rotary: Any, family: Family) -> Iterator[Refusal]:
    if not family.partial_rotary and rotary != 1.0:
        yield _damaged(f"{ROTARY} is {rotary!r}, {family.hf_class} rotates whole heads")
    if family.partial_rotary and not (_is_number(rotary) and rotary <= 1.0):
        yield _damaged(f"{ROTARY} is {rotary!r}, {family.hf_class} needs a number above 0, 1 at most")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _is_context(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _unfit(parameters: Mapping[str, Any], key: str, needed: str) -> Refusal:
    found = repr(parameters[key]) if key in parameters else "missing"
    shown = found if len(found) <= 60 else f"{found[:60]}..."
    return _damaged(f"{key} of {parameters['rope_type']} rotary positions is {shown}, {needed} is needed")


def _damaged(problem: str) -> Refusal:
    return Refusal(problem, RESTORE, "config.json")
