"""GGUF files as ggml's own C functions write them (`tests/ggml.py` has the blocks): an oracle that shares no code with
us or gguf-py."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests import ggml

SHAPE = ctypes.c_int64


class GgufParams(ctypes.Structure):
    """gguf_init_params: no_alloc, ggml context to make."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@cache
def library() -> ctypes.CDLL:
    """The shared library of xllamacpp; the test is skipped where it is not installed."""
    if not ggml.available():
        pytest.skip("needs xllamacpp, whose library exports ggml's C functions")
    c = ggml.library()
    for name in ("ggml_new_tensor_2d", "ggml_get_data_f32", "gguf_init_empty", "gguf_init_from_file"):
        getattr(c, name).restype = ctypes.c_void_p
    c.ggml_new_tensor_2d.argtypes = (ctypes.c_void_p, ctypes.c_int, SHAPE, SHAPE)
    c.ggml_get_data_f32.argtypes = c.gguf_free.argtypes = (ctypes.c_void_p,)
    c.ggml_set_name.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    c.gguf_set_val_str.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
    c.gguf_set_val_u32.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32)
    c.gguf_set_arr_str.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
    c.gguf_add_tensor.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    c.gguf_write_to_file.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_bool)
    c.gguf_write_to_file.restype = ctypes.c_bool
    c.gguf_init_from_file.argtypes = (ctypes.c_char_p, GgufParams)
    c.gguf_get_n_tensors.restype = c.gguf_get_n_kv.restype = ctypes.c_int64
    c.gguf_get_n_tensors.argtypes = c.gguf_get_n_kv.argtypes = (ctypes.c_void_p,)
    return c


def imatrix_by_c(
    path: Path, datasets: Sequence[str], chunks: int, size: int, tensors: Mapping[str, np.ndarray]
) -> None:
    """What `llama-imatrix` does when it saves: the same calls in the same order, tensors float32 [rows, columns]."""
    c = library()
    context = c.ggml_init(ggml.InitParameters(64 << 20, None, False))
    file = c.gguf_init_empty()
    c.gguf_set_val_str(file, b"general.type", b"imatrix")
    names = (ctypes.c_char_p * len(datasets))(*[text.encode() for text in datasets])
    c.gguf_set_arr_str(file, b"imatrix.datasets", names, len(datasets))
    c.gguf_set_val_u32(file, b"imatrix.chunk_count", chunks)
    c.gguf_set_val_u32(file, b"imatrix.chunk_size", size)
    for name, values in tensors.items():
        tensor = c.ggml_new_tensor_2d(context, 0, values.shape[1], values.shape[0])
        c.ggml_set_name(tensor, name.encode())
        source = np.ascontiguousarray(values, np.float32)
        ctypes.memmove(c.ggml_get_data_f32(tensor), source.ctypes.data, source.nbytes)
        c.gguf_add_tensor(file, tensor)
    assert c.gguf_write_to_file(file, str(path).encode(), False)
    c.gguf_free(file)
    c.ggml_free(context)
