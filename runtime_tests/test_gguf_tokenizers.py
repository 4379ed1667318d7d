"""Token for token: tokenizer.json, llama.cpp loading our file, and our simulation of llama.cpp, for all that we claim.

Where llama.cpp really cuts a text otherwise, the plan says so, and the simulation still agrees with llama.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from exporters.gguf.pre_tokenizer import rules
from exporters.gguf.simulation import Simulation
from exporters.gguf.specials import ENDS
from exporters.gguf.tokenizer import read_tokenizer
from exporters.gguf.vocabulary import CarriedTokenizer
from runtime_tests.llama_vocabulary import library_path, opened, write_vocabulary_file
from tests.tokenizer_families import PUBLISHED, SPECIAL_TEXTS, TEXTS, write_byte_level
from tests.tokenizer_sentencepiece import FORMS, SENTENCEPIECE_TEXTS, write_sentencepiece

if library_path() is None:
    pytest.skip("needs llama-cpp-python or xllamacpp", allow_module_level=True)

VOCABULARY = 2048
SAME_CUTS = {"bailingmoe": "qwen2"}  # rules that are written otherwise and mean the same
DIFFERENT = {  # what a text has in common with others that llama.cpp cuts otherwise, as the notes say
    "qwen2": ("decomposed",),
    "qwen35": ("decomposed",),
    "tekken": ("decomposed", "ÜBER", "កាន់តែ", "हिन्दी"),
    "gpt-4o": ("decomposed", "ÜBER", "កាន់តែ", "हिन्दी"),
    "granite-embed-multi-97m": ("ÜBER",),
}


def compared(folder: Path, carried: CarriedTokenizer, texts: list[str], tmp_path: Path) -> set[str]:
    """The texts that llama.cpp tokenises otherwise than tokenizer.json, whatever it is asked to add and to read; the
    simulation must always agree with llama.cpp, and pieces must print the text again."""
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    simulation = Simulation(carried)
    before = [carried.specials.bos] if carried.specials.add_bos else []
    different = set()
    with opened(write_vocabulary_file(carried, tmp_path / "vocabulary.gguf")) as vocabulary:
        for parse_special in (False, True):
            reference.encode_special_tokens = not parse_special
            for text in texts:
                found = vocabulary.tokenize(text, parse_special=parse_special)
                assert found == simulation.encode(text, parse_special=parse_special), repr(text)
                assert vocabulary.tokenize(text, add_special=True, parse_special=parse_special) == before + found
                if found != reference.encode(text, add_special_tokens=False).ids:
                    different.add(text)
                else:
                    assert reference.encode(text).ids == before + found
                    printed = vocabulary.pieces(found).decode()
                    assert printed.replace(" ", "") == text.replace(" ", "").replace("▁", ""), repr(text)
    return different


@pytest.mark.parametrize("name", PUBLISHED)
def test_byte_level(name: str, tmp_path: Path) -> None:
    write_byte_level(tmp_path, PUBLISHED[name], VOCABULARY)
    carried = read_tokenizer(tmp_path, {}, VOCABULARY)
    assert carried.pre == SAME_CUTS.get(name, name)
    different = compared(tmp_path, carried, TEXTS + SPECIAL_TEXTS, tmp_path)
    marks = DIFFERENT.get(name, ())
    assert different == {text for text in TEXTS if any(mark in text for mark in marks)}
    assert bool(different) <= bool(carried.notes)


def test_every_rule_that_is_claimed_is_tested() -> None:
    assert {rule.names[0] for rule in rules()} == set(PUBLISHED)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.names[0])
def test_every_name_loads(rule: Any, tmp_path: Path) -> None:
    """Names of one rule mean the same to llama.cpp; a name that it does not know is an error there."""
    write_byte_level(tmp_path, PUBLISHED[rule.names[0]], VOCABULARY)
    wanted = None
    for name in rule.names:
        carried = read_tokenizer(tmp_path, {}, VOCABULARY, pre=name)
        if "jina-v2" in name:
            continue  # llama.cpp wants a <mask> token there
        with opened(write_vocabulary_file(carried, tmp_path / "vocabulary.gguf")) as vocabulary:
            found = [vocabulary.tokenize(text) for text in TEXTS]
        assert wanted in (None, found), name
        wanted = found


@pytest.mark.parametrize("name", FORMS)
def test_sentencepiece(name: str, tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, FORMS[name], VOCABULARY)
    carried = read_tokenizer(tmp_path, {}, VOCABULARY)
    different = compared(tmp_path, carried, SENTENCEPIECE_TEXTS, tmp_path)
    notes = " ".join(carried.notes)
    assert carried.add_space_prefix is (FORMS[name].prefix not in ("never", "replace"))
    if FORMS[name].prefix in ("first", "always"):
        assert "begin with a space" in notes
        assert "puts a space before what follows" in notes
        assert all(text.startswith(" ") or "<" in text for text in different)
        assert len(different) > 4
    else:
        assert not carried.notes
        assert different <= {text for text in SENTENCEPIECE_TEXTS if "▁" in text}


@pytest.mark.parametrize("prefix", [True, False])
def test_a_bare_tokenizer_model(prefix: bool, tmp_path: Path) -> None:
    """tokenizer.model alone, against the library that trained it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [line for text in TEXTS for line in text.splitlines()]
    (tmp_path / "text").write_text("\n".join(lines * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        character_coverage=0.98,
        user_defined_symbols=[] if prefix else ["▁▁", "▁▁▁", "<h1>"],
        minloglevel=2,
    )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    carried = read_tokenizer(tmp_path, {}, 1000)
    assert not carried.notes
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    with opened(write_vocabulary_file(carried, tmp_path / "vocabulary.gguf")) as vocabulary:
        for text in [*TEXTS, "a <h1>b</h1>", "x  y   z"]:
            if "\0" not in text and text:
                assert vocabulary.tokenize(text, parse_special=False) == theirs.encode(text), repr(text)


def test_special_ids_ends_and_templates(tmp_path: Path) -> None:
    """What llama.cpp finds by text, what we write because it would not see it, and templates by name."""
    special = ["<|begin|>", "<|im_end|>", "<|chat|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    special += ["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|my_end|>", "<|pad|>"]
    write_byte_level(tmp_path, PUBLISHED["qwen2"], VOCABULARY, special)
    ids = {text: Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id(text) for text in special}
    ends = {"eos_token_id": [ids["<|im_end|>"], ids["<|my_end|>"]]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"pad_token": "<|pad|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text("default {{ x }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag {{ x }}")
    carried = read_tokenizer(tmp_path, {}, VOCABULARY)
    with opened(write_vocabulary_file(carried, tmp_path / "vocabulary.gguf")) as vocabulary:
        names = {"bos": "<|begin|>", "eos": "<|im_end|>", "eot": "<|im_end|>", "pad": "<|pad|>"}
        names |= {"fim_pre": "<|fim_prefix|>", "fim_suf": "<|fim_suffix|>", "fim_mid": "<|fim_middle|>"}
        names |= {"fim_pad": "<|fim_pad|>", "fim_rep": "<|repo_name|>", "fim_sep": "<|file_sep|>"}
        assert {name: vocabulary.id_of(name) for name in names} == {name: ids[text] for name, text in names.items()}
        assert vocabulary.ends(ids["<|my_end|>"])
        assert not vocabulary.ends(ids["<|chat|>"])
        assert vocabulary.adds == (True, False)
        assert (vocabulary.template(), vocabulary.template("rag")) == ("default {{ x }}", "rag {{ x }}")


def test_ends_that_llama_cpp_knows_by_text(tmp_path: Path) -> None:
    special = ["<|begin|>", "<|stop|>", *sorted(ENDS - {"<|tool_response>", "<|call|>", "<|calls|>"})]
    write_byte_level(tmp_path, PUBLISHED["gpt-2"], VOCABULARY, special)
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    carried = read_tokenizer(tmp_path, {}, VOCABULARY)
    with opened(write_vocabulary_file(carried, tmp_path / "vocabulary.gguf")) as vocabulary:
        assert not [text for text in special[1:] if not vocabulary.ends(reference.token_to_id(text))]


def test_added_tokens_that_strip_spaces_differ_as_the_note_says(tmp_path: Path) -> None:
    write_byte_level(tmp_path, PUBLISHED["gpt-2"], VOCABULARY)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|greedy|>", lstrip=True, rstrip=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    carried = read_tokenizer(tmp_path, {}, VOCABULARY + 1)
    assert any("'<|greedy|>' strip spaces" in note for note in carried.notes)
    assert compared(tmp_path, carried, ["a<|greedy|>b", "a <|greedy|> b"], tmp_path) == {"a <|greedy|> b"}


def test_a_name_that_llama_cpp_takes_for_phi_3(tmp_path: Path) -> None:
    """Why `stripping.py` changes such names: without Phi-3's tokens llama.cpp does not load the file."""
    write_byte_level(tmp_path, PUBLISHED["gpt-2"], VOCABULARY)
    carried = read_tokenizer(tmp_path, {}, VOCABULARY)
    for name, loads in (("My Phi 3 Chat", True), ("My Phi3 Chat", False)):
        path = write_vocabulary_file(carried, tmp_path / "vocabulary.gguf", name)
        if loads:
            with opened(path):
                pass
        else:
            with pytest.raises(OSError, match="cannot load"), opened(path):
                pass
