"""Names through which llama.cpp learns that special tokens swallow the spaces after them."""

from __future__ import annotations

from typing import Any

import pytest

from exporters.gguf.stripping import name_for_llama_cpp, strips_like_phi3
from exporters.gguf.vocabulary import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary

TOKENS = ("<unk>", "<s>", "</s>", "a", "<|endoftext|>", "<|user|>")
TYPES = (UNKNOWN, CONTROL, USER_DEFINED, NORMAL, CONTROL, CONTROL)


def added(**changes: Any) -> list[dict[str, Any]]:
    """As in Phi-3's tokenizer.json; `changes` concern <|user|>."""
    entries: list[dict[str, Any]] = [
        {"id": 0, "rstrip": False}, {"id": 1, "rstrip": False}, {"id": 2, "rstrip": True}, {"id": 4, "rstrip": False},
    ]  # fmt: skip
    return [*entries, {"id": 5, "rstrip": True} | changes]


def test_phi3_is_known_by_its_flags() -> None:
    assert strips_like_phi3(Vocabulary(TOKENS, TYPES), added())
    assert not strips_like_phi3(Vocabulary(TOKENS, TYPES), added(rstrip=False))
    assert not strips_like_phi3(Vocabulary(TOKENS, TYPES), added(lstrip=True))
    assert not strips_like_phi3(Vocabulary(TOKENS, TYPES), added()[:-1])  # a control token without flags
    assert not strips_like_phi3(Vocabulary(TOKENS[:4], TYPES[:4]), added()[:3])  # llama.cpp would not load it


@pytest.mark.parametrize(
    ("name", "stripping", "plain"),
    [
        ("Phi-3-mini-4k-instruct", "Phi-3-mini-4k-instruct", "Phi 3-mini-4k-instruct"),
        ("Phi 3.5 Mini Instruct", "Phi-3.5 Mini Instruct", "Phi 3.5 Mini Instruct"),
        ("my-phi3-tune", "my-Phi-3-tune", "my-phi 3-tune"),
        ("phi-4", "phi-4 (Phi-3 tokens)", "phi-4"),
        ("Llama 3", "Llama 3 (Phi-3 tokens)", "Llama 3"),
    ],
)
def test_the_name_says_it_or_does_not(name: str, stripping: str, plain: str) -> None:
    """llama.cpp looks for "phi-3" and "phi3" in the name in lower case."""
    assert name_for_llama_cpp(name, strips=True) == stripping
    assert name_for_llama_cpp(name, strips=False) == plain
    assert "phi-3" in stripping.lower()
    assert not any(mark in plain.lower() for mark in ("phi-3", "phi3"))
