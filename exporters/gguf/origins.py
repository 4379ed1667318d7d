"""Where the tensors of a file made from a template come from: written into the file, and read back from it alone.

    signround.origins         JSON: GGUF name -> {"names": [[checkpoint name, shape], ...], "added": 1.0}
    signround.rows.<name>     u32 array, where rows are not in order: `Origin.rows`

A file that was laid out from the plan has no such keys; its names are told by `names.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exporters.gguf.container import GgufFile, KeyValue
from exporters.gguf.independent import IndependentTensor
from exporters.gguf.layout import FLOAT_TYPES
from exporters.gguf.matching import Origin, Rows, parts, row_count
from exporters.gguf.metadata import grids_of
from exporters.gguf.packing import unpack
from signround.errors import FailedError
from signround.files import canonical_json
from signround.qtensor import QuantizedTensor

ORIGINS, ROWS = "signround.origins", "signround.rows."


def origin_entries(origins: Mapping[str, Origin]) -> list[KeyValue]:
    """The key-values that `origins_of` reads."""
    table = {
        name: {"names": [list(pair) for pair in zip(origin.names, origin.shapes, strict=True)]}
        | ({"added": origin.added} if origin.added else {})
        for name, origin in origins.items()
    }
    entries = [KeyValue(ORIGINS, "string", canonical_json(table))]
    return entries + [
        KeyValue(f"{ROWS}{name}", "u32", origin.rows.tolist())
        for name, origin in origins.items()
        if origin.rows is not None
    ]


def origins_of(values: Mapping[str, Any]) -> dict[str, Origin]:
    """GGUF name -> origin, from the key-values of a file of ours."""
    return {
        name: Origin(
            tuple(checkpoint for checkpoint, _ in row["names"]),
            tuple(tuple(shape) for _, shape in row["names"]),
            np.array(values[ROWS + name], np.int64) if ROWS + name in values else None,
            row.get("added", 0.0),
        )
        for name, row in json.loads(values[ORIGINS]).items()
    }


def added_values(origins: Mapping[str, Origin]) -> dict[str, float]:
    """`ExportedModel.added`."""
    return {name: origin.added for origin in origins.values() if origin.added for name in origin.names}


def in_float32(files: Sequence[GgufFile], origins: Mapping[str, Origin]) -> frozenset[str]:
    """Kept matrices that the files hold in float32, and therefore as they were."""
    full = FLOAT_TYPES["f32"].code
    held = [
        origins[name] for file in files for name in file.tensors if file.tensors[name].type == full and name in origins
    ]
    return frozenset(
        name for origin in held for name, shape in zip(origin.names, origin.shapes, strict=True) if len(shape) > 1
    )


def gathered(
    origins: Mapping[str, Origin], rows_of: Callable[[str, int, int], npt.NDArray[Any]]
) -> Iterator[tuple[str, str, npt.NDArray[Any]]]:
    """(checkpoint name, one GGUF name it lies in, its rows in the checkpoint's order). `rows_of` gives some rows of a
    GGUF tensor, from the first to before the last. Each tensor of the checkpoint comes once, though a tied head may lie
    in two places; of a stack of experts, one is in memory at a time."""
    places: dict[str, dict[str, tuple[Rows, Rows]]] = {}
    counts: dict[str, int] = {}
    for gguf, origin in origins.items():
        counts |= {name: row_count(shape) for name, shape in zip(origin.names, origin.shapes, strict=True)}
        for name, here, there in parts(origin):
            places.setdefault(name, {})[gguf] = here, there
    for name, pieces in places.items():
        found: npt.NDArray[Any] | None = None
        for gguf, (here, there) in pieces.items():
            first = int(here.min())
            rows = rows_of(gguf, first, int(here.max()) + 1)
            if found is None:
                found = np.empty((counts[name], *rows.shape[1:]), rows.dtype)
            found[there] = rows[here - first]
        assert found is not None
        yield name, next(iter(pieces)), found


def read_back(files: Sequence[GgufFile]) -> Iterator[tuple[str, QuantizedTensor]]:
    """See `Exporter.read_back`; `files` are the parts of one model."""
    grids = grids_of(files[0].values)
    origins = {name: origin for name, origin in origins_of(files[0].values).items() if name in grids}
    holders = {name: file for file in files for name in file.tensors}
    for name, gguf, raw in gathered(origins, lambda name, first, last: holders[name].rows(name, first, last)):
        file = holders[gguf]
        try:
            yield name, unpack(raw, grids[gguf], file.tensors[gguf].shape[-1])
        except ValueError as error:
            raise FailedError(f"{file.path}: {gguf} is damaged ({error}); export it again.") from error


def decoded(values: Mapping[str, Any], tensors: Mapping[str, IndependentTensor]) -> Iterator[tuple[str, Tensor]]:
    """See `Exporter.decode_independently`; `tensors` by GGUF name."""
    origins = origins_of(values)
    shapes = {
        name: shape for origin in origins.values() for name, shape in zip(origin.names, origin.shapes, strict=True)
    }
    for name, _, rows in gathered(origins, lambda name, first, last: tensors[name].read(first, last)):
        yield name, torch.from_numpy(rows.reshape(shapes[name]))
