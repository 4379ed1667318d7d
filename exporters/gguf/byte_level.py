"""Byte-level BPE (Llama 3, Qwen, SmolLM): GGUF's "gpt2" tokenizer, its splitting rule found on probe texts or given."""

from __future__ import annotations

from pathlib import Path

from exporters.gguf.pre_tokenizer import AUTO, checked_name, find_rule
from exporters.gguf.probing import Json, around, ids_by_text, loaded, stripping_notes
from exporters.gguf.specials import chat_templates, read_specials
from exporters.gguf.vocabulary import CarriedTokenizer, Vocabulary, component_types, merge_strings, token_table


def carry_byte_level(folder: Path, data: Json, config: Json, vocabulary: int, pre: str) -> CarriedTokenizer:
    """`data` is tokenizer.json. Raises RefusedError when no splitting rule fits and `pre` names none."""
    model, added = data["model"], data["added_tokens"]
    tokens, types, notes = token_table(model["vocab"], added, vocabulary)
    tokenizer = loaded(folder)
    if pre == AUTO:
        name = find_rule(tokenizer, ignore_merges=bool(model.get("ignore_merges")))
    else:
        name = checked_name(pre)
        notes.append(f"the splitting rule {name} was given, it was not compared with tokenizer.json")
    if "NFC" in component_types(data.get("normalizer")):
        notes.append("llama.cpp does not apply the tokenizer's NFC normalisation; texts already in NFC are unaffected")
    return CarriedTokenizer(
        model="gpt2",
        pre=name,
        vocabulary=Vocabulary(tuple(tokens), tuple(types), merges=tuple(merge_strings(model["merges"]))),
        specials=read_specials(folder, ids_by_text(data), config, vocabulary, around=around(tokenizer)),
        templates=chat_templates(folder),
        notes=tuple(notes + stripping_notes(added)),
    )
