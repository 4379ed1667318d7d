"""Which grid each matrix of a model gets: one grid for all linears, or llama.cpp's mix of types under a file type.

A scheme names either. Uniform schemes (`w4g32`) leave embedding and head alone unless an override names them. A file
type (`q4_k_m`) or preset (`laptop`) gives every matrix its type as llama-quantize would, embedding and head included.
Both may be overridden matrix by matrix: a uniform scheme by any grid and by either name of a matrix, a file type by
llama.cpp's types and names. Some names are both a grid and a file type (`q4_0`): `mixes` decides, which the pipeline
sets where all wanted formats read file types. Pure functions; refuses, never guesses.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from signround.architecture import EMBEDDING, HEAD, Architecture
from signround.errors import Refusal, RefusedError, refuse
from signround.file_types import ModelShape, Overrides, TensorRole, TypeChoice, resolve, tensor_types
from signround.formats import GRID_NAMES, grid_for, scheme_names
from signround.gguf_names import ARCHITECTURES, gguf_name, part_of
from signround.grid import Grid
from signround.mixes import FILE_TYPES, PRESETS

FLOATS = ("f16", "bf16", "f32")
FLOAT = "float"  # the same without a width: what is kept is kept in its own precision, whichever is named
KEPT = "kept in its own precision"


@dataclass(frozen=True)
class Assignment:
    """`grids`: weight name -> (grid, reason) of every matrix that is quantised; `floats`: weight name -> reason of
    those that the scheme or an override leaves as they are. `file_type`: the row of `mixes.FILE_TYPES` that was
    meant, "" for a scheme that is one grid."""

    grids: Mapping[str, tuple[Grid, str]]
    floats: Mapping[str, str]
    file_type: str = ""


def is_file_type(scheme: str, *, mixes: bool) -> bool:
    """Whether `scheme` is taken for a file type of llama.cpp (or a preset) rather than for one grid."""
    name = scheme.lower()
    return (name in FILE_TYPES or name in PRESETS) and (mixes or name not in scheme_names())


def assigned(
    scheme: str,
    architecture: Architecture,
    zero_floor: int = 0,
    *,
    mixes: bool = False,
    overrides: Overrides = (),
    importance: bool = True,
) -> Assignment:
    """The grids of every matrix. Upper case is as good as lower. `overrides` are (pattern, type), the first that
    matches wins; `importance`: column importances will be at hand (some mixes depend on it).

    Raises RefusedError for an unknown scheme, and for overrides of an unknown type or that match no matrix.
    """
    if is_file_type(scheme, mixes=mixes):
        return _mixed(scheme, architecture, overrides, importance)
    name = scheme.lower()
    if name not in scheme_names():
        raise _unknown(scheme)
    return _uniform(name, architecture, zero_floor, overrides)


@dataclass(frozen=True)
class _Override:
    """`type` is a grid's name, or one of FLOATS and FLOAT; `subject` is what the user typed."""

    pattern: re.Pattern[str]
    type: str
    subject: str

    def names(self, names: Iterable[str]) -> bool:
        return any(self.pattern.search(name) for name in names)


def _uniform(scheme: str, architecture: Architecture, zero_floor: int, overrides: Overrides) -> Assignment:
    """One grid for all linears, but for those matrices (embedding and head among them) that an override names."""
    linears = [linear for index in range(architecture.layers) for linear in architecture.block_linears(index)]
    outer = [name for name in architecture.outer() if name in (EMBEDDING, HEAD)]
    known = {name: names_of(name, architecture) for name in [*outer, *linears]}
    wanted = _compiled(overrides, known)
    grids: dict[str, tuple[Grid, str]] = {}
    floats: dict[str, str] = {}
    for name, names in known.items():
        override = next((each for each in wanted if each.names(names)), None)
        if override is None and name in outer:
            continue
        if override is not None and override.type in (*FLOATS, FLOAT):
            floats[name] = f"{override.subject}; {KEPT}"
            continue
        grid = grid_for(override.type if override else scheme, zero_floor)
        reason = f"{override.type} ({override.subject})" if override else f"scheme {scheme}"
        reason += f", zero point >= {zero_floor} for GPTQ" if grid.zero_floor else ""
        reason += "; tied: one table for embedding and head" if name in outer and architecture.tied else ""
        grids[name] = (grid, reason)
    if not grids:
        raise refuse("every matrix is kept in its own precision", "leave one for the scheme", "--tensor-type")
    return Assignment(grids, floats)


def names_of(name: str, architecture: Architecture) -> tuple[str, ...]:
    """The checkpoint's and llama.cpp's name of matrix `name`; those of the head too where the embedding is the head."""
    own = (name, gguf_name(name))
    return (*own, HEAD, gguf_name(HEAD)) if name == EMBEDDING and architecture.tied else own


def _compiled(overrides: Overrides, known: Mapping[str, Sequence[str]]) -> list[_Override]:
    """The overrides ready for use; `known` gives the names of each matrix. Raises RefusedError with everything that is
    wrong with them."""
    types = (*scheme_names(), *FLOATS, FLOAT)
    compiled, refusals = [], []
    for text, given in overrides:
        subject, kind = f"--tensor-type {text}={given}", given.lower()
        if kind not in types:
            near = difflib.get_close_matches(kind, types, n=2) or ["w8g32", FLOAT]
            problem = f"type {given!r} is not known; allowed are {GRID_NAMES}, and {FLOAT}"
            refusals.append(Refusal(problem, f"take {' or '.join(near)}", subject))
            continue
        try:
            override = _Override(re.compile(text, re.IGNORECASE), kind, subject)
        except re.error as error:
            refusals.append(Refusal(f"the pattern is no regular expression: {error}", "correct it", subject))
            continue
        if not any(override.names(names) for names in known.values()):
            refusals.append(Refusal("the pattern matches no matrix of this model", _parts(known), subject))
        compiled.append(override)
    if refusals:
        raise RefusedError(refusals)
    return compiled


def _parts(known: Mapping[str, Sequence[str]]) -> str:
    """What the matrices are called: the last words of both names, in order of appearance."""
    theirs = dict.fromkeys(part_of(name)[1] for name in known)
    ours = dict.fromkeys(name.removesuffix(".weight").rpartition(".")[2] for name in known)
    return f"it has {', '.join(theirs)}, or {', '.join(ours)} in the words of its checkpoint"


def _unknown(scheme: str) -> RefusedError:
    names = [*FILE_TYPES, *PRESETS, *scheme_names()]
    near = difflib.get_close_matches(scheme.lower(), dict.fromkeys(names), n=3) or ["w4g32", "q4_k_m", "laptop"]
    return refuse(
        f"scheme {scheme!r} is not known; allowed are the grids {GRID_NAMES}, llama.cpp's file types "
        f"{', '.join(FILE_TYPES)}, and the presets {', '.join(PRESETS)}",
        f"did you mean {' or '.join(near)}? `signround schemes` lists them all",
        "--scheme",
    )


def roles_of(architecture: Architecture) -> dict[str, TensorRole]:
    """Weight name -> the matrix that llama.cpp sees; the experts of a block share theirs."""
    shapes = {name: shape for name, shape in architecture.outer().items() if name in (EMBEDDING, HEAD)}
    found: dict[str, tuple[int, int]] = {name: (shape[0], shape[1]) for name, shape in shapes.items()}
    for index in range(architecture.layers):
        found |= architecture.block_linears(index)
    roles = {}
    for name, (rows, columns) in found.items():
        block, part = part_of(name)
        roles[name] = TensorRole(part, block, rows, columns)
    return roles


def model_shape(architecture: Architecture) -> ModelShape:
    """What the rules of file types look at."""
    return ModelShape(
        ARCHITECTURES[architecture.family.model_type],
        architecture.layers,
        architecture.heads,
        architecture.kv_heads,
        experts=architecture.mixture.experts if architecture.mixture else 0,
        tied=architecture.tied,
    )


def _mixed(scheme: str, architecture: Architecture, overrides: Overrides, importance: bool) -> Assignment:
    roles = roles_of(architecture)
    distinct = list(dict.fromkeys(roles.values()))  # a stack of experts is one matrix to the rules
    choices = dict(
        zip(distinct, tensor_types(scheme, model_shape(architecture), distinct, overrides, importance), strict=True)
    )
    grids, floats = {}, {}
    for name, role in roles.items():
        choice: TypeChoice = choices[role]
        if choice.type in FLOATS:
            floats[name] = f"{choice.reason}; {KEPT}"
        else:
            grids[name] = (grid_for(choice.type), f"{choice.type} ({choice.reason})")
    return Assignment(grids, floats, resolve(scheme, distinct)[0].name)
