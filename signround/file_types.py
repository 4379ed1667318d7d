"""From a llama.cpp file type (`q4_k_m`) or preset (`laptop`) to the type of each matrix, as llama-quantize chooses it.

Pure functions on names and shapes; the rules are the table in `mixes.py`. Compared with llama.cpp's own choice in
tests/test_file_types.py. Refuses unknown names, overrides that match nothing, files that llama.cpp would refuse too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from signround.errors import Refusal, RefusedError, refuse
from signround.mixes import (
    ALWAYS,
    BLOCK_LENGTHS,
    EIGHT_EXPERTS_Q5_K,
    FALCON,
    FALLBACKS,
    FILE_TYPES,
    OWN_RULES,
    PRESETS,
    SEVENTY_BILLION,
    FileType,
    Place,
    Rules,
)

Overrides = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class TensorRole:
    """One matrix as llama.cpp sees it: its GGUF part ("attn_q", "ffn_down_exps", "token_embd", "output"), the block it
    lies in (None: outside of them), and its shape [rows, columns]; for stacked experts the shape of one of them."""

    part: str
    block: int | None
    rows: int
    columns: int

    @property
    def name(self) -> str:
        """The tensor's name in the file."""
        return f"{self.part}.weight" if self.block is None else f"blk.{self.block}.{self.part}.weight"

    @property
    def reading_order(self) -> tuple[int, str]:
        """llama.cpp goes through a file by block, then name, wherever the tensors lie in it."""
        return (-1 if self.block is None else self.block, self.name)

    @property
    def kind(self) -> str:
        """What the rules are keyed by (`tensor_get_category`); the part itself where several parts share no rule."""
        if self.block is None:
            return "token_embd" if self.part == "per_layer_token_embd" else self.part
        if "ffn_down" in self.part:
            return "ffn_down"
        return {"attn_qkv": "attn_v", "attn_kv_b": "attn_v"}.get(self.part, self.part)

    @property
    def stays_float(self) -> bool:
        """Routers, norms and single rows, which llama.cpp does not quantise (`tensor_allows_quantization`)."""
        return self.rows < 2 or self.part == "ffn_gate_inp" or self.part.endswith("norm")


@dataclass(frozen=True)
class ModelShape:
    """What the rules look at: GGUF's `general.architecture`, the number of blocks, the attention heads of the first
    block, experts (0: dense), and whether the head is the embedding (no "output" matrix)."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0
    tied: bool = False

    @property
    def grouping(self) -> int:
        """Query heads a key head."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def seventy_billion(self) -> bool:
        if self.architecture == "llama" and (self.experts == 8 or self.heads == self.kv_heads):
            return False
        return SEVENTY_BILLION.get(self.architecture) == self.layers


@dataclass(frozen=True)
class TypeChoice:
    """A type (a key of `BLOCK_LENGTHS`) and why, in a phrase for the plan."""

    type: str
    reason: str


@dataclass(frozen=True)
class _Override:
    pattern: re.Pattern[str]
    choice: TypeChoice


def resolve(name: str, roles: Iterable[TensorRole]) -> tuple[FileType, Overrides]:
    """The row of a file type, or of the one that a preset means for these matrices, and the preset's overrides.

    Upper case is as good as lower. Raises RefusedError for a name that is neither, with the nearest ones.
    """
    key = name.lower()
    if key in PRESETS:
        preset = PRESETS[key]
        ragged = any(role.columns % 256 for role in roles if not role.stays_float)
        return FILE_TYPES[preset.ragged if ragged else preset.file_type], preset.overrides
    if key not in FILE_TYPES:
        names = [*FILE_TYPES, *PRESETS]
        near = difflib.get_close_matches(key, names, n=3) or ["q4_k_m", "laptop"]
        raise refuse(
            f"file type {name!r} is not known; allowed are {', '.join(FILE_TYPES)} and the presets "
            f"{', '.join(PRESETS)}",
            f"take {' or '.join(near)}",
        )
    return FILE_TYPES[key], ()


def parse_overrides(texts: Iterable[str]) -> list[tuple[str, str]]:
    """["ffn_down=q6_k"] to [("ffn_down", "q6_k")], as `llama-quantize --tensor-type` takes them.

    Raises RefusedError for a text that is not PATTERN=TYPE.
    """
    overrides = []
    for text in texts:
        pattern, _, name = text.partition("=")
        if not pattern or not name:
            raise refuse(f"--tensor-type {text!r} is not PATTERN=TYPE", "write one such as 'ffn_down=q6_k'")
        overrides.append((pattern, name))
    return overrides


def tensor_types(
    file_type: str,
    shape: ModelShape,
    roles: Sequence[TensorRole],
    overrides: Overrides = (),
    has_importance: bool = True,
) -> list[TypeChoice]:
    """The type of each role, in their order. `roles` are all matrices of the model: rules count them.

    `overrides` are (pattern, type): the pattern is put in lower case and searched for in the tensor's name
    (`re.search`, llama.cpp's `std::regex_search`), the first that matches wins over the mix. A row that is no whole
    number of blocks falls back as in llama.cpp, in overridden matrices too. Not part of llama.cpp's rules: in a dense
    model `mxfp4` means every linear, where llama.cpp's MXFP4_MOE would leave all of it q8_0.

    Raises RefusedError for unknown names and types, for a pattern that matches no matrix that can be quantised, for an
    architecture with rules of its own that are not known here, and for a file that needs an importance matrix.
    """
    row, fixed = resolve(file_type, roles)
    from_preset = [_Override(re.compile(text), TypeChoice(name, f"preset {file_type.lower()}")) for text, name in fixed]
    if shape.architecture in OWN_RULES:
        raise refuse(
            f"file type {row.name}: llama.cpp has rules of its own for architecture {shape.architecture!r} which are "
            "not known here",
            "give one scheme for all layers instead",
        )
    patterns = [*_compiled(overrides, roles), *from_preset]
    manual = {index: choice for index, role in enumerate(roles) if (choice := _manual(role, patterns)) is not None}
    places = dict(_places(shape, roles, manual.keys(), has_importance))
    choices = []
    for index, role in enumerate(roles):
        if role.stays_float:
            choices.append(TypeChoice("f32", "llama.cpp keeps routers, norms and single rows in f32"))
            continue
        chosen = manual[index] if index in manual else _by_mix(row, shape, role, places[index])
        choices.append(_fitting(chosen, role.columns))
    if row.needs_importance and not has_importance:
        _need_importance(row, roles, choices)
    return choices


def _compiled(overrides: Overrides, roles: Sequence[TensorRole]) -> list[_Override]:
    """The overrides ready for use. Raises RefusedError with everything that is wrong with them."""
    names = [role.name for role in roles if not role.stays_float]
    compiled, refusals = [], []
    for text, type_name in overrides:
        subject, kind = f"--tensor-type {text}={type_name}", type_name.lower()
        if kind not in BLOCK_LENGTHS:
            near = difflib.get_close_matches(kind, BLOCK_LENGTHS, n=2) or ["q6_k", "q8_0"]
            allowed = ", ".join(BLOCK_LENGTHS)
            problem = f"type {type_name!r} is not one that a tensor can have; allowed are {allowed}"
            refusals.append(Refusal(problem, f"take {' or '.join(near)}", subject))
            continue
        try:
            pattern = re.compile(text.lower())
        except re.error as error:
            refusals.append(Refusal(f"the pattern is no regular expression: {error}", "correct it", subject))
            continue
        if not any(pattern.search(name) for name in names):
            parts = ", ".join(dict.fromkeys(role.part for role in roles if not role.stays_float))
            refusals.append(Refusal("the pattern matches no matrix of this model", f"it has {parts}", subject))
        compiled.append(_Override(pattern, TypeChoice(kind, subject)))
    if refusals:
        raise RefusedError(refusals)
    return compiled


def _manual(role: TensorRole, patterns: Sequence[_Override]) -> TypeChoice | None:
    return next((override.choice for override in patterns if override.pattern.search(role.name)), None)


def _places(
    shape: ModelShape, roles: Sequence[TensorRole], manual: Iterable[int], importance: bool
) -> Iterator[tuple[int, Place]]:
    """(index of a role, its place). Value matrices and, in dense models, down projections are counted, where an
    overridden matrix does not count: the next one takes its place."""
    overridden = set(manual)
    seen = dict.fromkeys(("attn_v", "ffn_down"), 0)
    values = sum(role.kind == "attn_v" for role in roles)
    for index, role in sorted(enumerate(roles), key=lambda entry: entry[1].reading_order):
        count = values if role.kind == "attn_v" else shape.layers
        by_block = role.kind == "ffn_down" and shape.experts > 1
        at = (role.block or 0) if by_block else seen.get(role.kind, 0)
        yield index, Place(at, count, shape.grouping, importance)
        if role.kind in seen and index not in overridden:
            seen[role.kind] += 1


def _by_mix(row: FileType, shape: ModelShape, role: TensorRole, place: Place) -> TypeChoice:
    """The file type's choice, before the row's length is looked at."""
    if row.name == "mxfp4":
        return _mxfp4(shape, role)
    if role.kind == "output" or (shape.tied and role.kind == "token_embd"):
        ragged = shape.architecture == "falcon" or role.columns % BLOCK_LENGTHS[row.type] != 0
        words = "more bits on the head" if role.kind == "output" else "more bits on the embedding, it is the head too"
        return _choice(row, "q8_0" if ragged or row.type == "q8_0" else "q6_k", words)
    if shape.experts == 8 and role.kind in ("attn_k", "attn_v"):
        return _choice(row, "q8_0", "8 bits for attention keys and values in models of 8 experts")
    rules = row.mix.get(role.kind, ())
    if shape.architecture == "falcon":
        rules = FALCON.get(row.name, {}).get(role.kind, rules)
    if shape.experts == 8 and role.kind == "attn_output":
        rules = (("q5_k", ALWAYS),) if row.name in EIGHT_EXPERTS_Q5_K else ()
    name, words = _first(rules, place) or (row.type, "")
    if shape.seventy_billion and role.kind == "attn_v" and name in ("q3_k", "q4_k"):
        name, words = "q5_k", "more bits on attention values in a 70B model"
    return _choice(row, name, words)


def _first(rules: Rules, place: Place) -> tuple[str, str] | None:
    return next(((name, condition.words) for name, condition in rules if condition.holds(place)), None)


def _choice(row: FileType, name: str, words: str) -> TypeChoice:
    return TypeChoice(name, f"file type {row.name}" if name == row.type else f"{row.name}: {words}")


def _mxfp4(shape: ModelShape, role: TensorRole) -> TypeChoice:
    """Experts only, everything else q8_0; in a dense model every linear stands for the experts."""
    if role.block is None:
        return TypeChoice("q8_0", "mxfp4: 8 bits outside the blocks")
    if shape.experts and not role.part.endswith("_exps"):
        return TypeChoice("q8_0", "mxfp4: 8 bits outside the experts")
    return TypeChoice("mxfp4", "file type mxfp4")


def _fitting(choice: TypeChoice, columns: int) -> TypeChoice:
    """The choice, or what llama.cpp takes instead where a row is no whole number of its blocks."""
    length = BLOCK_LENGTHS[choice.type]
    if columns % length == 0:
        return choice
    instead = FALLBACKS.get(choice.type, "f16")
    if columns % BLOCK_LENGTHS[instead]:
        instead, length = "f16", BLOCK_LENGTHS[instead]
    note = f"a row of {columns} is no multiple of {length}: {instead} instead of {choice.type}"
    return TypeChoice(instead, f"{choice.reason}; {note}")


def _need_importance(row: FileType, roles: Sequence[TensorRole], choices: Sequence[TypeChoice]) -> None:
    for role, choice in zip(roles, choices, strict=True):
        if role.block is not None and choice.type == row.type:
            raise refuse(
                f"file type {row.name} needs an importance matrix for {role.name} and there is none",
                "calibrate the model, or take q2_k",
            )
