"""Special tokens that swallow the spaces after them: GGUF cannot say it, llama.cpp does it by the model's name.

When `general.name` holds "phi-3" or "phi3", llama.cpp (src/llama-vocab.cpp, "set attributes by model name") strips
spaces after every special token but three, and needs four tokens to exist. So the name must hold it when the tokenizer
is of that kind, and must not when it is not: another tokenizer would be read otherwise, or the file would not load.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from exporters.gguf.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary

KEEPING = ("<unk>", "<s>", "<|endoftext|>")  # spaces after these stay
NEEDED = (*KEEPING, "</s>")
_NAMED = re.compile(r"phi[-_ ]?3", re.IGNORECASE)


def strips_like_phi3(vocabulary: Vocabulary, added: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the `added_tokens` of a tokenizer.json swallow spaces exactly as llama.cpp's rule for Phi-3 does."""
    if not set(NEEDED) <= set(vocabulary.tokens):
        return False
    flags = {entry["id"]: entry for entry in added}
    special = [index for index, kind in enumerate(vocabulary.types) if kind in (CONTROL, UNKNOWN, USER_DEFINED)]
    return all(
        index in flags
        and bool(flags[index].get("rstrip")) == (vocabulary.tokens[index] not in KEEPING)
        and not flags[index].get("lstrip")
        and not flags[index].get("single_word")
        for index in special
    )


def name_for_llama_cpp(name: str, *, strips: bool) -> str:
    """`name` with "Phi-3" in it when special tokens must strip, and with "Phi 3" in its place when they must not."""
    if not strips:
        return re.sub(r"(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)
    return _NAMED.sub("Phi-3", name) if _NAMED.search(name) else f"{name} (Phi-3 tokens)"
