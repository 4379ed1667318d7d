"""Which grid each matrix of a model gets: one grid for all linears, or llama.cpp's mix of types under a file type.

A scheme names either. Uniform schemes (`w4g32`) leave embedding and head alone. A file type (`q4_k_m`) or preset
(`laptop`) gives every matrix its type as llama-quantize would, embedding and head included, and may be overridden
matrix by matrix. Some names are both a grid and a file type (`q4_0`): `mixes` decides, which the pipeline sets where
all wanted formats read file types. Pure functions; refuses, never guesses.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from signround.architecture import EMBEDDING, HEAD, Architecture
from signround.errors import RefusedError, refuse
from signround.file_types import ModelShape, Overrides, TensorRole, TypeChoice, resolve, tensor_types
from signround.formats import GRID_NAMES, grid_for, scheme_names
from signround.gguf_names import ARCHITECTURES, part_of
from signround.grid import Grid
from signround.mixes import FILE_TYPES, PRESETS

FLOATS = ("f16", "bf16", "f32")


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
    """The grids of every matrix. Upper case is as good as lower. `importance`: column importances will be at hand
    (some mixes depend on it).

    Raises RefusedError for an unknown scheme, and for overrides of a scheme that is one grid.
    """
    if is_file_type(scheme, mixes=mixes):
        return _mixed(scheme, architecture, overrides, importance)
    name = scheme.lower()
    if name not in scheme_names():
        raise _unknown(scheme)
    if overrides:
        raise refuse(
            f"--tensor-type does not apply to {scheme}, which is one grid for all linears",
            "choose a file type of llama.cpp, such as q4_k_m, with --to gguf alone",
            "--tensor-type",
        )
    grid = grid_for(name, zero_floor)
    reason = f"scheme {name}" + (f", zero point >= {zero_floor} for GPTQ" if grid.zero_floor else "")
    linears = [linear for index in range(architecture.layers) for linear in architecture.block_linears(index)]
    return Assignment(dict.fromkeys(linears, (grid, reason)), {})


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
            floats[name] = f"{choice.reason}; kept in its own precision"
        else:
            grids[name] = (grid_for(choice.type), f"{choice.type} ({choice.reason})")
    return Assignment(grids, floats, resolve(scheme, distinct)[0].name)
