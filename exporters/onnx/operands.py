"""What attention is fed in every flavour: q, k and v one by one, and the rotary tables as constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from exporters.onnx.builder import GraphBuilder
from exporters.onnx.rope import RotaryTable
from signround.architecture import Architecture

if TYPE_CHECKING:
    import onnx_ir as ir


def apart(
    builder: GraphBuilder, architecture: Architecture, name: str, projections: Sequence[ir.Value | None]
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """q, k, v of [q, k, v], or of the three side by side in [qkv, None, None]."""
    query, key, value = projections
    assert query is not None
    if key is not None and value is not None:
        return query, key, value
    widths = [architecture.width(part) for part in ("queries", "keys", "keys")]
    sizes = builder.constant("constant.qkv_widths", np.array(widths, np.int64))
    query, key, value = builder.op("Split", f"{name}.apart", [query, sizes], outputs=3, attributes={"axis": -1})
    return query, key, value


def rotary_caches(builder: GraphBuilder, table: RotaryTable) -> list[ir.Value]:
    """The cosines and sines of `table` [rows, width], in the graph's own dtype."""
    return [_cache(builder, table, part) for part in ("cos", "sin")]


def _cache(builder: GraphBuilder, table: RotaryTable, part: str) -> ir.Value:
    name, dtype = f"{table.name}.{part}", builder.float_type
    if name in builder.constants:
        return builder.constants[name]
    return builder.lazy(name, dtype, (table.rows, table.width), lambda: table.array(part).astype(dtype.numpy()))
