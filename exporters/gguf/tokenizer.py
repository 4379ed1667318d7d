"""Carry a Hugging Face tokenizer into GGUF: told from tokenizer.json, compared with it on probe texts.

Two kinds exist in our families: byte-level BPE becomes `tokenizer.ggml.model` "gpt2" with a splitting rule
(`byte_level.py`); SentencePiece BPE with byte fallback (Llama 2, Mistral) becomes "llama" with scores
(`sentencepiece.py`). What llama.cpp would tokenise otherwise is refused when a probe text shows it, and noted when it
only concerns rare texts. Nothing is guessed from model names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from exporters.gguf.byte_level import carry_byte_level
from exporters.gguf.pre_tokenizer import AUTO
from exporters.gguf.probing import loaded
from exporters.gguf.sentencepiece import carry_sentencepiece, carry_sentencepiece_model
from exporters.gguf.vocabulary import CarriedTokenizer, component_types
from signround.errors import refuse
from signround.files import canonical_json, read_json


def read_tokenizer(folder: Path, config: Mapping[str, Any], vocabulary: int, pre: str = AUTO) -> CarriedTokenizer:
    """The tokenizer of a model folder for an embedding of `vocabulary` rows; `pre` overrides the splitting rule.

    Raises RefusedError when llama.cpp has no tokenizer that behaves like it.
    """
    files = sorted([*folder.glob("*.json"), *folder.glob("*.model"), *folder.rglob("*.jinja")])
    stamps = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files)
    return _read_once(folder, canonical_json(config), vocabulary, pre, stamps)


@lru_cache(maxsize=4)
def _read_once(
    folder: Path, config_text: str, vocabulary: int, pre: str, stamps: tuple[tuple[str, int, int], ...]
) -> CarriedTokenizer:
    """A plan asks for its tokenizer several times, and 128 thousand tokens take three seconds to compare. `stamps` tell
    that the files are the same."""
    config = json.loads(config_text)
    settings = read_json(folder / "tokenizer_config.json")
    if not (folder / "tokenizer.json").is_file():
        if (folder / "tokenizer.model").is_file():
            return carry_sentencepiece_model(folder, settings, config, vocabulary)
        raise refuse(
            "the model has neither tokenizer.json nor tokenizer.model",
            "save it with AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers",
            str(folder),
        )
    model = read_json(folder / "tokenizer.json").get("model")
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or any(model.get(key) for key in affixes):
        kind = model.get("type") if isinstance(model, dict) else None
        raise refuse(
            f"a tokenizer of type {kind!r} (or one with subword affixes) cannot be carried; "
            "byte-level BPE and SentencePiece BPE can",
            "export to another format",
            "tokenizer.json",
        )
    tokenizer = json.loads(loaded(folder).to_str())  # as the library understands it: every field is there
    kinds = component_types(tokenizer["pre_tokenizer"]) | component_types(tokenizer["decoder"])
    if "ByteLevel" in kinds:
        return carry_byte_level(folder, tokenizer, config, vocabulary, pre)
    return carry_sentencepiece(folder, tokenizer, config, vocabulary)
