"""What tokenizer.json does, asked of the `tokenizers` library, and what it says of its ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Json = Mapping[str, Any]


def loaded(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    starts = [at for at in range(len(full) - len(plain) + 1) if full[at : at + len(plain)] == plain]
    start = starts[0] if starts else 0
    return full[:start], full[start + len(plain) :]


def ids_by_text(data: Json) -> dict[str, int]:
    """Text -> id of every token in tokenizer.json, added ones included."""
    return dict(data["model"]["vocab"]) | {entry["content"]: entry["id"] for entry in data["added_tokens"]}


def stripping_notes(added: Sequence[Json]) -> list[str]:
    """A note when added tokens swallow neighbouring spaces or match whole words only, which llama.cpp does not do."""
    flags = ("lstrip", "rstrip", "single_word")
    special = [entry["content"] for entry in added if any(entry.get(flag) for flag in flags)]
    if not special:
        return []
    return [f"llama.cpp ignores that added tokens such as {special[0]!r} strip spaces or match whole words only"]
