"""ggml's own C code as an oracle: blocks to floats and floats to blocks, through the symbols that xllamacpp exports.

Types are named as in our table, in lower case. Nothing here knows how a block is laid out.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]

IDS = {
    "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14,
    "iq4_nl": 20, "iq4_xs": 23, "mxfp4": 39, "q2_0": 42,
}  # fmt: skip


def available() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


class InitParameters(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h, as far as we read it."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


@cache
def library() -> ctypes.CDLL:
    found = importlib.util.find_spec("xllamacpp")
    assert found is not None
    assert found.origin is not None
    (path,) = Path(found.origin).parent.glob("xllamacpp*.so")
    library = ctypes.CDLL(str(path))
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    ]  # fmt: skip
    library.ggml_init.restype = ctypes.c_void_p
    library.ggml_init.argtypes = [InitParameters]
    library.ggml_free.argtypes = [ctypes.c_void_p]
    library.ggml_free(library.ggml_init(InitParameters(1024, None, True)))  # fills ggml's table of fp16 values
    return library


def _traits(kind: str) -> _TypeTraits:
    traits: _TypeTraits = library().ggml_get_type_traits(ctypes.c_int(IDS[kind])).contents
    return traits


def block_size(kind: str) -> tuple[int, int]:
    """(elements, bytes) of one block."""
    traits = _traits(kind)
    return traits.blck_size, traits.type_size


def type_name(kind: str) -> str:
    """ggml's own name of the type id that we use for `kind`."""
    return str(_traits(kind).type_name.decode())


def dequantize(kind: str, raw: Bytes, columns: int) -> Floats:
    """Blocks uint8 [rows, bytes a row] -> float32 [rows, columns]."""
    raw = np.ascontiguousarray(raw)
    elements, size = block_size(kind)
    assert raw.shape[1] == columns // elements * size
    values = np.empty((len(raw), columns), dtype=np.float32)
    _traits(kind).to_float(raw.ctypes.data, values.ctypes.data, values.size)
    return values


def quantize_chunk(kind: str, weight: Floats, importance: Floats | None = None) -> Bytes:
    """float32 [rows, columns] -> blocks, as llama-quantize makes them; `importance` float32 [columns]."""
    rows, columns = weight.shape
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    elements, size = block_size(kind)
    raw = np.zeros((rows, columns // elements * size), dtype=np.uint8)
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        assert importance.shape == (columns,)
    pointer = None if importance is None else importance.ctypes.data
    written = library().ggml_quantize_chunk(IDS[kind], weight.ctypes.data, raw.ctypes.data, 0, rows, columns, pointer)
    assert written == raw.size
    return raw
