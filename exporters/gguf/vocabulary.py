"""What GGUF says of a tokenizer: tokens by id with their types, merges or scores, special ids, chat template.

Token types follow llama.cpp's own converter (`get_vocab_base` and `_create_vocab_sentencepiece` in conversion/base.py).
Refuses vocabularies that llama.cpp cannot load: two ids with one text, tokens beyond the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exporters.gguf.container import KeyValue
from exporters.gguf.specials import Specials
from signround.errors import refuse

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>", re.DOTALL)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id with their GGUF types; `scores` for SentencePiece, `merges` for byte-level BPE."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    merges: tuple[str, ...] | None = None


@dataclass(frozen=True)
class CarriedTokenizer:
    """Everything that a GGUF file says of its tokenizer. `notes` is what llama.cpp will do otherwise; `strips_right`:
    special tokens swallow the spaces after them in the one way that llama.cpp knows (`stripping.py`)."""

    model: str
    pre: str
    vocabulary: Vocabulary
    specials: Specials
    templates: Mapping[str, str]
    add_space_prefix: bool | None = None
    notes: tuple[str, ...] = ()
    strips_right: bool = False

    def noting(self, notes: Sequence[str]) -> CarriedTokenizer:
        """The same with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def entries(self) -> list[KeyValue]:
        """The `tokenizer.*` key-values, in a fixed order."""
        prefix = "tokenizer.ggml."
        found = [
            KeyValue(f"{prefix}model", "string", self.model),
            KeyValue(f"{prefix}pre", "string", self.pre),
            KeyValue(f"{prefix}tokens", "string", list(self.vocabulary.tokens)),
            KeyValue(f"{prefix}token_type", "i32", list(self.vocabulary.types)),
        ]
        if self.vocabulary.scores is not None:
            found.append(KeyValue(f"{prefix}scores", "f32", list(self.vocabulary.scores)))
        if self.vocabulary.merges is not None:
            found.append(KeyValue(f"{prefix}merges", "string", list(self.vocabulary.merges)))
        specials = self.specials
        ids = {"bos": specials.bos, "eos": specials.eos, "unknown": specials.unk, "padding": specials.pad}
        ids |= {"eot": specials.eot, "eom": specials.eom}
        named = [(name, index) for name, index in ids.items() if index is not None]
        found += [KeyValue(f"{prefix}{name}_token_id", "u32", index) for name, index in named]
        found.append(KeyValue(f"{prefix}add_bos_token", "bool", specials.add_bos))
        found.append(KeyValue(f"{prefix}add_eos_token", "bool", specials.add_eos))
        if self.add_space_prefix is not None:
            found.append(KeyValue(f"{prefix}add_space_prefix", "bool", self.add_space_prefix))
        return found + self._template_entries()

    def _template_entries(self) -> list[KeyValue]:
        named = {name: text for name, text in self.templates.items() if name != "default"}
        found = []
        if "default" in self.templates:
            found.append(KeyValue("tokenizer.chat_template", "string", self.templates["default"]))
        if named:
            found.append(KeyValue("tokenizer.chat_templates", "string", list(named)))
        found += [KeyValue(f"tokenizer.chat_template.{name}", "string", text) for name, text in named.items()]
        return found


def component_types(component: Mapping[str, Any] | None) -> set[str]:
    """Types of a pipeline component of tokenizer.json, sequences opened."""
    if not component:
        return set()
    lists = ("pretokenizers", "normalizers", "decoders", "processors")
    inner = [entry for key in lists for entry in component.get(key, [])]
    return {str(component.get("type"))}.union(*(component_types(entry) for entry in inner))


def token_table(
    vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]], vocabulary: int, *, sentencepiece: str | None = None
) -> tuple[list[str], list[int], list[str]]:
    """Tokens and types by id, `[PADi]` where an embedding row has no token; and notes on dropped tokens.

    `sentencepiece` is the unknown token ("" for none) of a SentencePiece vocabulary, whose `<0x0A>` tokens are bytes
    even where they are listed as added tokens: only so does llama.cpp print them.

    Raises RefusedError when a regular token has no embedding row, or when two ids share a text.
    """
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [UNUSED] * vocabulary
    beyond = [text for text, index in vocab.items() if index >= vocabulary]
    special_texts = {entry["content"] for entry in added}
    if set(beyond) - special_texts:
        raise refuse(
            f"token {max(vocab.values())} has no row in the embedding, which has {vocabulary}",
            "take tokenizer and weights of the same model",
            "tokenizer.json",
        )
    for text, index in vocab.items():
        if index < vocabulary:
            tokens[index] = text
            byte = sentencepiece is not None and _BYTE_TOKEN.fullmatch(text)
            types[index] = BYTE if byte else UNKNOWN if text == sentencepiece else NORMAL
    dropped = []
    for entry in added:
        index, text = entry["id"], entry["content"]
        if index >= vocabulary:
            dropped.append(text)
        elif entry["special"] or _LOOKS_SPECIAL.fullmatch(text):
            tokens[index] = text
            types[index] = types[index] if types[index] in (BYTE, UNKNOWN) else CONTROL
        else:
            tokens[index], types[index] = text.replace(SPACE, " "), USER_DEFINED
    _refuse_doubles(tokens)
    if not dropped:
        return tokens, types, []
    return tokens, types, [f"added tokens such as {dropped[0]!r} have no embedding row and are left out"]


def _refuse_doubles(tokens: list[str]) -> None:
    if len(set(tokens)) == len(tokens) and "" not in tokens:
        return
    seen: set[str] = {""}
    double = next(text for text in tokens if text in seen or seen.add(text))  # type: ignore[func-returns-value]
    raise refuse(
        f"token {double!r} is empty or stands for two ids, which llama.cpp cannot load",
        "remove one of them from the tokenizer",
        "tokenizer.json",
    )


def merge_strings(merges: list[Any]) -> list[str]:
    """Merges as GGUF stores them: "left right", a space inside a part written as GPT-2's Ġ."""
    pairs = [entry.split(" ", 1) if isinstance(entry, str) else entry for entry in merges]
    return [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs]
