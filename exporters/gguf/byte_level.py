"""Byte-level BPE (Llama 3, Qwen, SmolLM): GGUF's "gpt2" tokenizer, its splitting rule found on probe texts or given."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.gguf.pre_tokenizer import AUTO, PROBES, byte_of_character, checked_name, find_rule
from exporters.gguf.probing import Json, around, encoder, ids_by_text, loaded, special_notes, stripping_notes
from exporters.gguf.simulation import Simulation, differing
from exporters.gguf.specials import chat_templates, read_specials
from exporters.gguf.vocabulary import CarriedTokenizer, Vocabulary, component_types, merge_strings, token_table
from signround.errors import refuse

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def carry_byte_level(folder: Path, data: Json, config: Json, vocabulary: int, pre: str) -> CarriedTokenizer:
    """`data` is tokenizer.json. Raises RefusedError when no splitting rule fits and `pre` names none."""
    model, added = data["model"], data["added_tokens"]
    tokens, types, notes = token_table(model["vocab"], added, vocabulary)
    tokenizer = loaded(folder)
    differs = ""
    if pre == AUTO:
        whole_words = bool(model.get("ignore_merges"))
        rule = find_rule(tokenizer, ignore_merges=whole_words, moot=lambda: _merging_is_enough(tokenizer, data))
        name, differs = rule.names[0], rule.differs
        if differs:
            notes.append(f"llama.cpp's rule {name} only comes near this tokenizer: {differs}")
    else:
        name = checked_name(pre)
        notes.append(f"the splitting rule {name} was given, not found")
    normalised = "NFC" in component_types(data.get("normalizer"))
    if normalised:
        notes.append("llama.cpp does not apply the tokenizer's NFC normalisation; texts already in NFC are unaffected")
    carried = CarriedTokenizer(
        model="gpt2",
        pre=name,
        vocabulary=Vocabulary(tuple(tokens), tuple(types), merges=tuple(merge_strings(model["merges"]))),
        specials=read_specials(folder, ids_by_text(data), config, vocabulary, around=around(tokenizer)),
        templates=chat_templates(folder),
        notes=tuple(notes + stripping_notes(added)),
    )
    return carried.noting(
        [
            *carried.specials.notes,
            *_differences(tokenizer, carried, added, normalised, exact=pre == AUTO and not differs),
        ]
    )


def _merging_is_enough(tokenizer: Tokenizer, data: Json) -> bool:
    """Whether looking whole words up before merging (`ignore_merges`) changes no token of this vocabulary."""
    from tokenizers import Tokenizer

    model = {**data["model"], "ignore_merges": not data["model"].get("ignore_merges")}
    other = Tokenizer.from_str(json.dumps({**data, "model": model}))
    alphabet = byte_of_character()
    raw = [bytes(map(alphabet.__getitem__, word)) for word in model["vocab"] if alphabet.keys() >= set(word)]
    words = [word.decode(errors="ignore") for word in raw]  # parts of characters never stand alone in a text
    ours, theirs = (each.encode_batch(words, add_special_tokens=False) for each in (tokenizer, other))
    return all(one.ids == two.ids for one, two in zip(ours, theirs, strict=True))


def _differences(
    tokenizer: Tokenizer, carried: CarriedTokenizer, added: list[Json], normalised: bool, *, exact: bool
) -> list[str]:
    """Notes on what llama.cpp tokenises otherwise. Raises RefusedError when a rule that fits (`exact`) still gives
    other tokens on a probe text."""
    try:
        simulation = Simulation(carried)
    except KeyError:
        return [f"the rule {carried.pre} was not compared with tokenizer.json"]
    texts = [unicodedata.normalize("NFC", probe) if normalised else probe for probe in PROBES]
    found = differing(simulation, encoder(tokenizer), texts)
    if found and exact:
        raise refuse(
            f"llama.cpp would tokenise {next(iter(found))[:20]!r} otherwise although it cuts it alike (an unknown "
            "token, bytes without a token, or merges that it lacks)",
            "export to another format",
            "tokenizer.json",
        )
    notes = [f"{len(found)} of {len(texts)} probe texts are tokenised otherwise"] if not exact else []
    return notes + special_notes(simulation, tokenizer, added)
