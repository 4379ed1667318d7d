"""Read pieces, scores and types from a SentencePiece `tokenizer.model`.

The file is a protocol buffer (sentencepiece_model.proto: ModelProto.pieces = 1 {piece 1, score 2, type 3},
trainer_spec = 2 {model_type 3, treat_whitespace_as_suffix 24}, normalizer_spec = 3 {precompiled_charsmap 2,
add_dummy_prefix 3, remove_extra_whitespaces 4}); these fields are all that is read.
Refuses models that are not BPE (llama.cpp's "llama" tokenizer merges by score, a unigram model needs a lattice, and
its "t5" tokenizer has no byte fallback), and those that put spaces at the end of words.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from signround.errors import refuse

BPE = 2


@dataclass(frozen=True)
class Piece:
    """`type` as in the proto and in GGUF alike: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """`notes`: what it does to a text before merging and llama.cpp does not."""

    pieces: tuple[Piece, ...]
    add_space_prefix: bool
    notes: tuple[str, ...] = ()


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Raises RefusedError for a damaged file, for a model that is not BPE, and for spaces at the end of words."""
    try:
        top = list(_fields(path.read_bytes()))
        pieces = tuple(_piece(value) for number, value in top if number == 1)
        trainer = dict(entry for number, value in top if number == 2 for entry in _fields(value))
        normalizer = dict(entry for number, value in top if number == 3 for entry in _fields(value))
        model_type = _number(trainer, 3, 1)
        suffix = bool(_number(trainer, 24, 0))
        prefix, squeezed = (bool(_number(normalizer, field, 1)) for field in (3, 4))
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise refuse("it is not a SentencePiece model", "download the file again", str(path)) from error
    if model_type != BPE or suffix or not pieces:
        found = "puts spaces at the end of words" if suffix else f"has type {model_type}"
        raise refuse(
            f"the SentencePiece model {found}, llama.cpp carries only type {BPE} (BPE) with spaces in front",
            "export to another format",
            path.name,
        )
    notes = []
    if normalizer.get(2):
        notes.append("llama.cpp does not apply the Unicode normalisation that tokenizer.model holds")
    if squeezed:
        notes.append("llama.cpp keeps repeated spaces, which tokenizer.model says to remove")
    return SentencePieceModel(pieces, prefix, tuple(notes))


def _number(fields: Mapping[int, bytes], field: int, default: int) -> int:
    return _read_varint(fields[field], 0)[0] if field in fields else default


def _piece(raw: bytes) -> Piece:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(raw):
        if number == 1:
            text = value.decode()
        elif number == 2:
            score = struct.unpack("<f", value)[0]
        elif number == 3:
            kind = _read_varint(value, 0)[0]
    return Piece(text, score, kind)


def _fields(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """(field number, payload) of one message: wire types 0 (varint, raw), 1 (8 bytes), 2 (length), 5 (4 bytes)."""
    position = 0
    while position < len(raw):
        key, position = _read_varint(raw, position)
        wire = key & 7
        if wire == 0:
            start = position
            _, position = _read_varint(raw, position)
        else:
            if wire == 2:
                size, position = _read_varint(raw, position)
            else:
                size = {1: 8, 5: 4}.get(wire, 0)
            if size == 0 and wire != 2:
                raise ValueError(f"wire type {wire}")
            start, position = position, position + size
            if position > len(raw):
                raise ValueError("cut short")
        yield key >> 3, raw[start:position]


def _read_varint(raw: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
