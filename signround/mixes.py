"""llama.cpp's file types as a table: the type of most matrices, and which ones get more bits.

    q4_k_m:  q4_k, but q6_k for attn_v and ffn_down of the first and last eighth of the layers and every third between

What `llama-quantize` does by a file type's name, in the words of src/llama-quant.cpp (`llama_tensor_get_type_impl`)
of llama.cpp 0c1e57098 (ggml 0.25.3), for the types that we tune. Data only; `file_types.py` reads it for a model.
The IQ1 to IQ3 and TQ mixes are not here: their codebooks are out of reach of rounding offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

BLOCK_LENGTHS = {
    "q2_k": 256, "q3_k": 256, "q4_k": 256, "q5_k": 256, "q6_k": 256, "iq4_xs": 256,
    "q2_0": 64,
    "q4_0": 32, "q4_1": 32, "q5_0": 32, "q5_1": 32, "q8_0": 32, "iq4_nl": 32, "mxfp4": 32,
    "f16": 1, "bf16": 1, "f32": 1,
}  # fmt: skip
"""Every type that a tensor of ours can have, and how many weights of a row a block of it holds."""

FALLBACKS = {
    "q2_k": "q4_0", "q3_k": "q4_0", "q2_0": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl",
}  # fmt: skip
"""What llama.cpp takes where a row is no whole number of blocks (`tensor_type_fallback`); f16 where that fails too."""


@dataclass(frozen=True)
class Place:
    """Where a matrix stands: the `index`-th of `count` of its kind. `grouping`: query heads a key head;
    `importance`: an importance matrix is at hand."""

    index: int
    count: int
    grouping: int
    importance: bool


@dataclass(frozen=True)
class Condition:
    """When a rule holds, for the program and (`words`) for the plan's reason."""

    words: str
    holds: Callable[[Place], bool]


def _more_bits(place: Place) -> bool:
    """llama.cpp's `use_more_bits`."""
    eighth = place.count // 8
    return place.index < eighth or place.index >= 7 * place.count // 8 or (place.index - eighth) % 3 == 2


ALWAYS = Condition("more bits on this kind of matrix", lambda place: True)
MORE_BITS = Condition("more bits on this layer", _more_bits)
FIRST_TWO = Condition("more bits on the first two layers", lambda place: place.index < 2)
FIRST_FOUR = Condition("more bits on the first four layers", lambda place: place.index < 4)
FIRST_SIXTEENTH = Condition("more bits on the first layers", lambda place: place.index < place.count // 16)
FIRST_EIGHTH = Condition("more bits on the first layers", lambda place: place.index < place.count // 8)
FIRST_WITH_IMPORTANCE = Condition(
    "a minimum a group on the first layers", lambda place: place.importance and FIRST_EIGHTH.holds(place)
)
FIRST_WITHOUT_IMPORTANCE = Condition(
    "more bits on the first layers, no importance matrix",
    lambda place: not place.importance and FIRST_EIGHTH.holds(place),
)
GROUPED = Condition("four or more heads share this matrix", lambda place: place.grouping >= 4)

Rules = tuple[tuple[str, Condition], ...]  # (type, when), the first that holds; none: the file type's own type


@dataclass(frozen=True)
class FileType:
    """One row: `type` for all matrices that no rule names. `label` is llama.cpp's spelling, `number` its
    `general.file_type`. `mix` goes from a kind of matrix (`TensorRole.kind`) to its rules. `needs_importance`:
    llama.cpp refuses to make the file without an importance matrix."""

    name: str
    label: str
    number: int
    type: str
    description: str
    mix: Mapping[str, Rules] = field(default_factory=dict)
    needs_importance: bool = False


_K_M: Mapping[str, Rules] = {"attn_v": (("q6_k", MORE_BITS),), "ffn_down": (("q6_k", MORE_BITS),)}
_IQ4: Mapping[str, Rules] = {"attn_v": (("q5_k", GROUPED),), "ffn_down": (("q5_k", FIRST_WITHOUT_IMPORTANCE),)}

FILE_TYPES: Mapping[str, FileType] = {
    row.name: row
    for row in (
        FileType(
            "q2_k", "Q2_K", 10, "q2_k", "2.6 bits; 3 or 4 for attention values and outputs and for down projections",
            {
                "attn_v": (("q4_k", GROUPED), ("q3_k", ALWAYS)),
                "attn_output": (("q3_k", ALWAYS),),
                "ffn_down": (("q3_k", ALWAYS),),
            },
        ),
        FileType(
            "q2_k_s", "Q2_K_S", 21, "q2_k", "2.6 bits nearly everywhere",
            {"attn_v": (("q4_k", GROUPED),), "ffn_down": (("q4_k", FIRST_EIGHTH),)},
            needs_importance=True,
        ),
        FileType("q3_k_s", "Q3_K_S", 11, "q3_k", "3.4 bits everywhere"),
        FileType(
            "q3_k_m", "Q3_K_M", 12, "q3_k", "3.4 bits; 4 or 5 for attention values and outputs, down projections",
            {
                "attn_v": (("q5_k", FIRST_TWO), ("q4_k", ALWAYS)),
                "attn_output": (("q4_k", ALWAYS),),
                "ffn_down": (("q5_k", FIRST_SIXTEENTH), ("q4_k", ALWAYS)),
            },
        ),
        FileType(
            "q3_k_l", "Q3_K_L", 13, "q3_k", "3.4 bits; 5 for attention values and outputs and for down projections",
            dict.fromkeys(("attn_v", "attn_output", "ffn_down"), (("q5_k", ALWAYS),)),
        ),
        FileType(
            "q4_k_s", "Q4_K_S", 14, "q4_k", "4.5 bits; 5.5 for attention values and down projections of first layers",
            {"attn_v": (("q5_k", FIRST_FOUR),), "ffn_down": (("q5_k", FIRST_EIGHTH),)},
        ),
        FileType(
            "q4_k_m", "Q4_K_M", 15, "q4_k", "4.5 bits; 6.6 for half of the attention values and down projections", _K_M
        ),
        FileType("q5_k_s", "Q5_K_S", 16, "q5_k", "5.5 bits everywhere"),
        FileType(
            "q5_k_m", "Q5_K_M", 17, "q5_k", "5.5 bits; 6.6 for half of the attention values and down projections", _K_M
        ),
        FileType("q6_k", "Q6_K", 18, "q6_k", "6.6 bits everywhere"),
        FileType(
            "q4_0", "Q4_0", 2, "q4_0", "4.5 bits; has fast kernels on most phones and processors",
            {"ffn_down": (("q4_1", FIRST_WITH_IMPORTANCE),)},
        ),
        FileType("q4_1", "Q4_1", 3, "q4_1", "5 bits with a minimum a group; few fast kernels"),
        FileType(
            "q5_0", "Q5_0", 8, "q5_0", "5.5 bits in groups of 32",
            {"ffn_down": (("q5_1", FIRST_WITH_IMPORTANCE),)},
        ),
        FileType("q5_1", "Q5_1", 9, "q5_1", "6 bits with a minimum a group; few fast kernels"),
        FileType("q8_0", "Q8_0", 7, "q8_0", "8.5 bits; hardly to be told from the float model"),
        FileType("iq4_nl", "IQ4_NL", 25, "iq4_nl", "4.5 bits from a codebook of 16 values, in groups of 32", _IQ4),
        FileType("iq4_xs", "IQ4_XS", 30, "iq4_xs", "4.25 bits from the codebook of iq4_nl, in blocks of 256", _IQ4),
        FileType("mxfp4", "MXFP4_MOE", 38, "mxfp4", "4.25 bits of floating point: experts, or all of a dense model"),
        FileType(
            "q2_0", "Q2_0", 41, "q2_0", "2.25 bits in groups of 64; slow on x86",
            {"token_embd": (("q4_k", ALWAYS),)},
        ),
    )
}  # fmt: skip
"""Name -> row. Outside the blocks all but mxfp4 share one rule: the head (or the embedding that is the head) gets
q6_k, and q8_0 where its rows are no whole number of blocks."""

EIGHT_EXPERTS_Q5_K = frozenset({"q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs"})
"""Mixtral's rule for attn_output: q5_k in these file types, else the file type's own type. Attention keys and values of
a model of 8 experts are always q8_0."""

FALCON: Mapping[str, Mapping[str, Rules]] = {
    "q2_k": {"attn_output": ()},
    "q3_k_m": {"attn_output": (), "ffn_down": (("q5_k", FIRST_SIXTEENTH), ("q4_k", MORE_BITS))},
    "q3_k_l": {"attn_output": (("q4_k", ALWAYS),), "ffn_down": (("q4_k", ALWAYS),)},
    "q4_k_s": {"ffn_down": ()},
    "q4_k_m": {"ffn_down": (("q6_k", FIRST_SIXTEENTH), ("q5_k", MORE_BITS))},
}
"""File type -> what Falcon has instead in its mix. Its head is always q8_0."""

SEVENTY_BILLION = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
"""Architecture -> the number of layers by which llama.cpp knows a 70B model (Llama: only with shared key heads, and
without 8 experts). There attn_v gets q5_k where it would get q3_k or q4_k, as it is small beside attn_q."""

OWN_RULES = ("bailingmoe3", "glm5-next")
"""Architectures for which llama.cpp has exceptions that are not here."""


@dataclass(frozen=True)
class Preset:
    """A name for a purpose. It stands for `file_type`, or for `ragged` in a model with rows that are no multiple of
    256, with `overrides` (pattern, type) on top: what `llama-quantize --tensor-type` could be told as well."""

    name: str
    purpose: str
    file_type: str
    ragged: str
    overrides: tuple[tuple[str, str], ...] = ()


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "mobile",
            "phones and NPUs: every matrix in q4_0, for which they all have kernels, and a head of 6 or 8 bits",
            "q4_0", "q4_0",
            # llama.cpp's q4_0 mix has q4_1 in the first layers: a third of q4_0's speed on x86, no kernel on most NPUs
            overrides=(("ffn_down", "q4_0"),),
        ),
        Preset(
            "laptop",
            "processors of laptops and desktops: q4_k_m, or iq4_nl where rows are no multiples of 256",
            "q4_k_m", "iq4_nl",
        ),
        Preset(
            "small",
            "the least memory that still runs fast: q2_k, or q3_k_m where rows are no multiples of 256 and get 4 bits",
            "q2_k", "q3_k_m",
        ),
    )
}  # fmt: skip
"""Chosen by speed and kernels a type (docs/decisions.md)."""
