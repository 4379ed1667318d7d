"""llama.cpp's tokenizer through its C functions, which both bindings export: loads a file in milliseconds.

The public route (a server, one request a text) is tested in test_gguf.py; here hundreds of texts meet dozens of files.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from exporters.gguf.container import KeyValue, TensorEntry, write
from exporters.gguf.vocabulary import CarriedTokenizer

ROOM = 4096  # more than sizeof(llama_model_params) in any version: passed by value, in memory, so a longer one is safe
Parameters = type("Parameters", (ctypes.Structure,), {"_fields_": [("opaque", ctypes.c_char * ROOM)]})
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_silent = LOG(lambda level, text, data: None)
IDS = ("bos", "eos", "eot", "pad", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep")


def library_path() -> Path | None:
    """The shared library of llama-cpp-python or of xllamacpp, None without either."""
    for module, pattern in (("llama_cpp", "lib/libllama.so"), ("xllamacpp", "xllamacpp*.so")):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            return next(Path(spec.origin).parent.glob(pattern), None)
    return None


@cache
def library() -> Any:
    """The functions that are used, typed; the log goes nowhere."""
    path = library_path()
    assert path is not None
    lib = ctypes.CDLL(str(path))
    pointer, text, number, flag = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_bool
    ids = ctypes.POINTER(ctypes.c_int32)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_log_set": (None, [LOG, pointer]),
        "llama_backend_init": (None, []),
        "llama_model_default_params": (Parameters, []),
        "llama_model_load_from_file": (pointer, [text, Parameters]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_model_free": (None, [pointer]),
        "llama_model_chat_template": (text, [pointer, text]),
        "llama_tokenize": (number, [pointer, text, number, ids, number, flag, flag]),
        "llama_token_to_piece": (number, [pointer, number, text, number, number, flag]),
        "llama_vocab_get_attr": (number, [pointer, number]),
        "llama_vocab_is_eog": (flag, [pointer, number]),
        "llama_vocab_get_add_bos": (flag, [pointer]),
        "llama_vocab_get_add_eos": (flag, [pointer]),
    }
    signatures |= {f"llama_vocab_{name}": (number, [pointer]) for name in IDS}
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_silent, None)
    lib.llama_backend_init()
    return lib


class LlamaVocabulary:
    """The tokenizer of one loaded .gguf file."""

    def __init__(self, model: int) -> None:
        self._model, self._vocab = model, library().llama_model_get_vocab(model)

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        raw = text.encode()
        room = 2 * len(raw) + 8
        found = (ctypes.c_int32 * room)()
        count = library().llama_tokenize(self._vocab, raw, len(raw), found, room, add_special, parse_special)
        assert count >= 0
        return list(found[:count])

    def pieces(self, ids: list[int], special: bool = True) -> bytes:
        """What llama-server prints for these tokens."""
        buffer = ctypes.create_string_buffer(1024)
        printed = b""
        for index in ids:
            count = library().llama_token_to_piece(self._vocab, index, buffer, 1024, 0, special)
            assert count >= 0
            printed += buffer.raw[:count]
        return printed

    def id_of(self, name: str) -> int | None:
        """A special token by name (IDS), None where llama.cpp knows none."""
        index: int = getattr(library(), f"llama_vocab_{name}")(self._vocab)
        return None if index == -1 else index

    def ends(self, index: int) -> bool:
        """Whether generation stops at this token."""
        return bool(library().llama_vocab_is_eog(self._vocab, index))

    @property
    def adds(self) -> tuple[bool, bool]:
        """Whether a BOS and an EOS are put around a text."""
        return library().llama_vocab_get_add_bos(self._vocab), library().llama_vocab_get_add_eos(self._vocab)

    def template(self, name: str | None = None) -> str | None:
        raw = library().llama_model_chat_template(self._model, name.encode() if name else None)
        return raw.decode() if raw is not None else None


def write_vocabulary_file(carried: CarriedTokenizer, target: Path, name: str = "vocabulary") -> Path:
    """A .gguf of `carried` and a model of one narrow block of zeros, the least that llama.cpp loads."""
    tokens, width = len(carried.vocabulary.tokens), 32
    sizes = {"vocab_size": tokens, "context_length": 64, "embedding_length": width, "block_count": 1}
    sizes |= {"feed_forward_length": width, "attention.head_count": 1, "rope.dimension_count": width}
    entries = [
        KeyValue("general.architecture", "string", "llama"),
        KeyValue("general.name", "string", name),
        *(KeyValue(f"llama.{key}", "u32", value) for key, value in sizes.items()),
        KeyValue("llama.attention.layer_norm_rms_epsilon", "f32", 1e-5),
        *carried.entries(),
    ]
    linears = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (tokens, width), "output_norm.weight": (width,)}
    shapes |= {f"blk.0.{name}.weight": (width, width) for name in linears}
    shapes |= {f"blk.0.{name}.weight": (width,) for name in ("attn_norm", "ffn_norm")}
    tensors = [TensorEntry(name, shape, 0, 4 * math.prod(shape)) for name, shape in shapes.items()]
    with open(target, "wb") as stream:
        assert list(write(stream, entries, tensors, lambda entry: [lambda: np.zeros(entry.shape, np.float32)]))
    return target


@contextmanager
def opened(path: Path) -> Iterator[LlamaVocabulary]:
    """Raises OSError when llama.cpp cannot load the file."""
    lib = library()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    if not model:
        raise OSError(f"llama.cpp cannot load {path}")
    try:
        yield LlamaVocabulary(model)
    finally:
        lib.llama_model_free(model)
