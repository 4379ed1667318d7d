"""SentencePiece BPE with byte fallback (Llama 2, Mistral): GGUF's "llama" tokenizer, which merges by score.

Refuses tokenizers that prepare texts in ways llama.cpp lacks, and those whose merges no order of scores reproduces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.gguf.pre_tokenizer import PROBES
from exporters.gguf.probing import Json, around, encoder, ids_by_text, loaded, special_notes, stripping_notes
from exporters.gguf.sentencepiece_model import read_sentencepiece
from exporters.gguf.simulation import Simulation, differing
from exporters.gguf.specials import chat_templates, read_specials
from exporters.gguf.stripping import strips_like_phi3
from exporters.gguf.vocabulary import (
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    CarriedTokenizer,
    Vocabulary,
    token_table,
)
from signround.errors import refuse

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE_AFTER = ", which puts a space before what follows one"
ADDED_SCORE, PADDING_SCORE = -1000.0, -10000.0  # as in llama.cpp's converter; these tokens are never merged into


def carry_sentencepiece(folder: Path, data: Json, config: Json, vocabulary: int) -> CarriedTokenizer:
    """`data` is tokenizer.json; scores come from tokenizer.model when it lies beside and agrees, else from the order
    of merges. Raises RefusedError when llama.cpp would tokenise a probe text otherwise."""
    model, added = data["model"], data["added_tokens"]
    vocab: dict[str, int] = model["vocab"]
    missing = [code for code in map("<0x{:02X}>".format, range(256)) if code not in vocab]
    if missing:
        raise refuse(
            f"the tokenizer is neither byte-level nor has it a token for every byte ({missing[0]} is missing)",
            "export to another format",
            "tokenizer.json",
        )
    unknown = model.get("unk_token")
    tokens, types, notes = token_table(vocab, added, vocabulary, sentencepiece=unknown or "")
    scores = _score_table(tokens, types, _ranked(folder, model), added)
    tokenizer = loaded(folder)
    prefix, prefix_notes = _space_prefix(tokenizer)
    table = Vocabulary(tuple(tokens), tuple(types), scores=tuple(scores))
    strips = strips_like_phi3(table, added)
    carried = CarriedTokenizer(
        model="llama",
        pre="default",
        vocabulary=table,
        specials=read_specials(
            folder, ids_by_text(data), config, vocabulary, around=around(tokenizer), unknown=unknown
        ),
        templates=chat_templates(folder),
        add_space_prefix=prefix,
        notes=tuple(notes + prefix_notes + ([] if strips else stripping_notes(added))),
        strips_right=strips,
    )
    simulation = Simulation(carried)
    _compare_merging(simulation, tokenizer, [text for text in PROBES if not (prefix_notes and text.startswith(" "))])
    return carried.noting(
        [*carried.specials.notes, *special_notes(simulation, tokenizer, added, SPACE_AFTER if prefix else "")]
    )


def carry_sentencepiece_model(folder: Path, settings: Json, config: Json, vocabulary: int) -> CarriedTokenizer:
    """A folder with tokenizer.model alone; added tokens from `added_tokens_decoder` of tokenizer_config.json."""
    model = read_sentencepiece(folder / "tokenizer.model")
    vocab = {piece.text: index for index, piece in enumerate(model.pieces)}
    decoder: Json = settings.get("added_tokens_decoder") or {}
    added = [{"id": int(index), "special": False, **entry} for index, entry in decoder.items()]
    unknown = next((piece.text for piece in model.pieces if piece.type == UNKNOWN), None)
    tokens, types, notes = token_table(vocab, added, vocabulary, sentencepiece=unknown or "")
    for index, piece in enumerate(model.pieces[:vocabulary]):
        if types[index] == NORMAL:
            types[index] = piece.type
        if piece.type == USER_DEFINED:
            tokens[index] = tokens[index].replace(SPACE, " ")
    scores = _score_table(tokens, types, {piece.text: piece.score for piece in model.pieces}, added)
    ids = vocab | {entry["content"]: entry["id"] for entry in added}
    carried = CarriedTokenizer(
        model="llama",
        pre="default",
        vocabulary=Vocabulary(tuple(tokens), tuple(types), scores=tuple(scores)),
        specials=read_specials(folder, ids, config, vocabulary, around=None, unknown=unknown),
        templates=chat_templates(folder),
        add_space_prefix=model.add_space_prefix,
        notes=tuple(notes + list(model.notes) + stripping_notes(added)),
    )
    spaced = model.add_space_prefix and USER_DEFINED in types
    told = [f"user-defined pieces inside a text are read otherwise by llama.cpp{SPACE_AFTER}"] if spaced else []
    return carried.noting([*carried.specials.notes, *told])


def _ranked(folder: Path, model: Json) -> dict[str, float]:
    """Piece -> score: the higher, the earlier it is merged."""
    file = folder / "tokenizer.model"
    if file.is_file():
        pieces = read_sentencepiece(file).pieces
        if all(model["vocab"].get(piece.text) == index for index, piece in enumerate(pieces)):
            return {piece.text: piece.score for piece in pieces}
    scores: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        scores.setdefault("".join(pair), -float(rank + 1))
    return scores


def _score_table(
    tokens: Sequence[str], types: Sequence[int], ranked: Mapping[str, float], added: Sequence[Json]
) -> list[float]:
    scores = [
        PADDING_SCORE if kind == UNUSED else ranked.get(text, 0.0) for text, kind in zip(tokens, types, strict=True)
    ]
    for entry in added:
        if entry["id"] < len(scores):
            scores[entry["id"]] = ADDED_SCORE
    return scores


def _prepared(tokenizer: Tokenizer, text: str) -> list[str]:
    """What the tokenizer merges: the text after normalizer and pre-tokenizer."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def _space_prefix(tokenizer: Tokenizer) -> tuple[bool, list[str]]:
    """Whether a space is put before a text, and notes. Raises RefusedError when texts are changed in another way."""
    notes: list[str] = []
    prefixed = _prepared(tokenizer, "a") == [SPACE + "a"]
    for probe in PROBES:
        pieces = _prepared(tokenizer, probe)
        escaped = probe.replace(" ", SPACE)
        if pieces == [SPACE + escaped if prefixed else escaped]:
            continue
        if pieces == [escaped] and escaped.startswith(SPACE):
            notes = ["texts that begin with a space get one space more in llama.cpp than in tokenizer.json"]
            continue
        raise refuse(
            f"the tokenizer prepares {probe[:20]!r} in a way that llama.cpp cannot follow "
            "(its only changes are spaces to ▁ and a space in front)",
            "export to another format",
            "tokenizer.json",
        )
    return prefixed, notes


def _compare_merging(simulation: Simulation, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Raise RefusedError when merging by score gives other pieces than tokenizer.json on a probe text."""
    found = differing(simulation, encoder(tokenizer), texts)
    if found:
        raise refuse(
            f"llama.cpp would tokenise {next(iter(found))[:20]!r} otherwise: no order of scores reproduces the merges",
            "export to another format",
            "tokenizer.json",
        )
