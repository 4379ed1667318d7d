"""Read pieces, scores and types from a SentencePiece `tokenizer.model`, and merge as llama.cpp merges them.

The file is a protocol buffer (sentencepiece_model.proto: ModelProto.pieces = 1 {piece 1, score 2, type 3},
trainer_spec = 2 {model_type 3}, normalizer_spec = 3 {add_dummy_prefix 3}); these five fields are all that is read.
Refuses models that are not BPE: llama.cpp's "llama" tokenizer merges by score, a unigram model needs a lattice.
"""

from __future__ import annotations

import heapq
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
    pieces: tuple[Piece, ...]
    add_space_prefix: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Raises RefusedError for a damaged file and for a model that is not BPE."""
    try:
        pieces: list[Piece] = []
        model_type, prefix = 1, True
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                pieces.append(_piece(value))
            elif number == 2:
                model_type = next((_varint(entry) for field, entry in _fields(value) if field == 3), model_type)
            elif number == 3:
                prefix = next((bool(_varint(entry)) for field, entry in _fields(value) if field == 3), prefix)
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise refuse("it is not a SentencePiece model", "download the file again", str(path)) from error
    if model_type != BPE or not pieces:
        raise refuse(
            f"the SentencePiece model has type {model_type}, llama.cpp carries only type {BPE} (BPE)",
            "export to another format",
            path.name,
        )
    return SentencePieceModel(tuple(pieces), prefix)


def _piece(raw: bytes) -> Piece:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(raw):
        if number == 1:
            text = value.decode()
        elif number == 2:
            score = struct.unpack("<f", value)[0]
        elif number == 3:
            kind = _varint(value)
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


def _varint(raw: bytes) -> int:
    return _read_varint(raw, 0)[0]


def merged_by_score(text: str, scores: Mapping[str, float]) -> list[str]:
    """llama.cpp's `llm_tokenizer_spm_session`: join the neighbours whose union is the piece of best score, leftmost
    first, until no union is a piece."""
    symbols: list[str] = list(text)
    following = [*range(1, len(symbols)), -1]
    previous = [*range(-1, len(symbols) - 1)]
    queue: list[tuple[float, int, str]] = []

    def offer(left: int) -> None:
        if left >= 0 and following[left] >= 0:
            union = symbols[left] + symbols[following[left]]
            if union in scores:
                heapq.heappush(queue, (-scores[union], left, union))

    for index in range(len(symbols) - 1):
        offer(index)
    while queue:
        _, left, union = heapq.heappop(queue)
        right = following[left]
        if not symbols[left] or right < 0 or symbols[left] + symbols[right] != union:
            continue
        symbols[left], symbols[right] = union, ""
        following[left] = following[right]
        if following[right] >= 0:
            previous[following[right]] = left
        offer(previous[left])
        offer(left)
    return [symbol for symbol in symbols if symbol]
