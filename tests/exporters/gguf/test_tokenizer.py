"""Tokenizers: the splitting rule is found whatever the vocabulary; ids, types, templates; what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from exporters.gguf.pre_tokenizer import PROBES, byte_of_character, find_rule, known_names, rules, split
from exporters.gguf.tokenizer import read_tokenizer
from exporters.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from signround.errors import RefusedError
from tests.small_models import LLAMA3_SPLIT, write_tokenizer
from tests.tokenizer_families import PUBLISHED, write_byte_level
from tests.tokenizer_sentencepiece import FORMS, write_sentencepiece

EQUIVALENT = {"llama-bpe": ("dbrx",), "qwen2": ("bailingmoe",)}  # the same cuts, written otherwise
LLAMA_4M = Path(__file__).parents[3] / "examples" / "llama-4m"


def edited(folder: Path, **changes: Any) -> Path:
    """Change top-level fields of tokenizer.json; a key `model.x` changes the model's field x."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    for key, value in changes.items():
        if key.startswith("model_"):
            data["model"][key.removeprefix("model_")] = value
        else:
            data[key] = value
    path.write_text(json.dumps(data))
    return folder


def configured(folder: Path, **changes: Any) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("kind", "model", "pre"),
    [("llama3", "gpt2", "dbrx"), ("qwen2", "gpt2", "qwen2"), ("gpt2", "gpt2", "gpt-2"), ("llama2", "llama", "default")],
)
@pytest.mark.parametrize("vocabulary", [512, 700])
def test_every_small_tokenizer_is_carried(kind: str, model: str, pre: str, vocabulary: int, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, kind, vocabulary)
    carried = read_tokenizer(tmp_path, {}, vocabulary)
    assert (carried.model, carried.pre) == (model, pre)
    assert len(carried.vocabulary.tokens) == len(carried.vocabulary.types) == vocabulary
    assert (carried.specials.bos, carried.specials.eos, carried.specials.pad) == (0, 1, 1)
    assert carried.specials.add_bos == (kind in ("llama3", "llama2"))
    assert not carried.specials.add_eos
    assert "<|chat|>" in carried.templates["default"]
    assert any("NFC" in note for note in carried.notes) == (kind == "qwen2")


def test_whole_words_before_merges_is_another_rule(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama3", 512)
    assert read_tokenizer(edited(tmp_path, model_ignore_merges=True), {}, 512).pre == "llama-bpe"


def test_the_example_model() -> None:
    carried = read_tokenizer(LLAMA_4M, {}, 4096)
    assert (carried.pre, carried.specials.bos, carried.specials.add_bos) == ("dbrx", 4094, True)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.names[0])
def test_each_rule_is_found_from_its_own_behaviour(rule: Any) -> None:
    """A tokenizer that cuts the probes as the rule says; rules with the same cuts come back under the first's name."""
    alphabet = {byte: character for character, byte in byte_of_character().items()}

    class Cutter:
        normalizer = None

        @property
        def pre_tokenizer(self) -> Cutter:
            return self

        def pre_tokenize_str(self, text: str) -> list[tuple[str, tuple[int, int]]]:
            pieces = split(text, rule.regexes)
            return [("".join(alphabet[byte] for byte in piece.encode()), (0, 0)) for piece in pieces]

    other = find_rule(Cutter(), ignore_merges=rule.ignore_merges, moot=lambda: False)  # type: ignore[arg-type]
    assert [split(probe, other.regexes) for probe in PROBES] == [split(probe, rule.regexes) for probe in PROBES]
    assert other.ignore_merges == rule.ignore_merges


def test_common_rules_are_told_apart() -> None:
    cuts = {rule.names[0]: tuple(tuple(split(probe, rule.regexes)) for probe in PROBES) for rule in rules()}
    for one in ("gpt-2", "llama-bpe", "qwen2", "smollm", "tekken", "gpt-4o", "deepseek-v3", "falcon", "default"):
        same = [name for name, cut in cuts.items() if cut == cuts[one]]
        assert set(same) <= {one, *EQUIVALENT.get(one, ())}, one


def test_no_name_twice() -> None:
    assert len(set(known_names())) == len(known_names()) > 80


def test_a_rule_of_its_own_is_refused_with_the_nearest(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama3", 512)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    cut = pre_tokenizers.Split(Regex(LLAMA3_SPLIT.replace("{1,3}", "{1,2}")), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RefusedError, match=r"no splitting rule .* nearest are dbrx|llama-bpe .*--set gguf\.pre="):
        read_tokenizer(tmp_path, {}, 512)
    carried = read_tokenizer(tmp_path, {}, 512, pre="kimi-k2")
    assert carried.pre == "kimi-k2"
    assert any("was given" in note for note in carried.notes)
    assert any("kimi-k2 was not compared" in note for note in carried.notes)
    near = read_tokenizer(tmp_path, {}, 512, pre="llama-bpe")
    assert any("probe texts are tokenised otherwise" in note for note in near.notes)
    with pytest.raises(RefusedError, match=r"no splitting rule 'llama-bp'; did you mean llama-bpe"):
        read_tokenizer(tmp_path, {}, 512, pre="llama-bp")


@pytest.mark.parametrize("normalizer", [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
def test_normalizers_that_llama_cpp_lacks_are_refused(normalizer: Any, tmp_path: Path) -> None:
    for kind in ("llama3", "llama2"):
        write_tokenizer(tmp_path, kind, 512)
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        known = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([*known, normalizer])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(RefusedError, match=r"tokenizer\.json"):
            read_tokenizer(tmp_path, {}, 512)


def test_prefix_space_of_a_byte_level_tokenizer_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "gpt2", 512)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RefusedError, match="no splitting rule"):
        read_tokenizer(tmp_path, {}, 512)


def test_types_padding_and_added_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama3", 512)
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    extra = [
        {"id": 512, "content": "user▁token", "special": False, **plain},
        {"id": 513, "content": "<|looks_special|>", "special": False, **plain},
        {"id": 514, "content": "<far>", "special": True, **plain, "rstrip": True},
    ]
    carried = read_tokenizer(edited(tmp_path, added_tokens=added + extra), {}, 520)
    tokens, types = carried.vocabulary.tokens, carried.vocabulary.types
    assert (tokens[0], types[0]) == ("<|begin|>", CONTROL)
    assert types[5] == NORMAL
    assert (tokens[512], types[512]) == ("user token", USER_DEFINED)
    assert types[513] == CONTROL
    assert (tokens[515], types[515]) == ("[PAD515]", UNUSED)
    fewer = read_tokenizer(tmp_path, {}, 514)
    assert any("<far>" in note and "left out" in note for note in fewer.notes)
    assert any("strip spaces" in note for note in carried.notes)


def test_sentencepiece_types_scores_and_prefix(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama2", 600)
    carried = read_tokenizer(tmp_path, {}, 600)
    data = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    scores = dict(zip(carried.vocabulary.tokens, carried.vocabulary.scores or (), strict=True))
    merged = ["".join(pair) for pair in data["merges"]]
    assert [scores[piece] for piece in merged] == sorted((scores[piece] for piece in merged), reverse=True)
    assert carried.vocabulary.types[2] == UNKNOWN
    assert carried.vocabulary.types[data["vocab"]["<0x0A>"]] == BYTE
    assert carried.add_space_prefix is True
    assert carried.specials.unk == 2


@pytest.mark.parametrize(("scheme", "prefix"), [("first", True), ("always", True), ("never", False)])
def test_metaspace_tokenizers(scheme: str, prefix: bool, tmp_path: Path) -> None:
    """What transformers 5 writes for Llama 2 and Mistral: no normalizer, Metaspace without splitting."""
    write_tokenizer(tmp_path, "llama2", 512)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    data = json.loads(tokenizer.to_str())
    data["normalizer"] = None
    data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    carried = read_tokenizer(tmp_path, {}, 512)
    assert carried.add_space_prefix is prefix
    assert any("begin with a space" in note for note in carried.notes) is prefix


def test_merges_that_scores_cannot_order_are_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama2", 600)
    data = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    with pytest.raises(RefusedError, match="no order of scores"):
        read_tokenizer(edited(tmp_path, model_merges=data["merges"][::2]), {}, 600)


def test_sentencepiece_model_file(tmp_path: Path) -> None:
    """A real SentencePiece BPE model, read without the library and compared with it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(f"word {i} and {i * 77} more words of text" for i in range(500)))
    options = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), **options
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    carried = read_tokenizer(tmp_path, {}, 410)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for index in range(400):
        assert carried.vocabulary.tokens[index] == theirs.id_to_piece(index)
        assert carried.vocabulary.scores is not None
        assert carried.vocabulary.scores[index] == pytest.approx(theirs.get_score(index))
        assert (carried.vocabulary.types[index] == BYTE) == theirs.is_byte(index)
        assert (carried.vocabulary.types[index] == CONTROL) == theirs.is_control(index)
    assert (carried.specials.bos, carried.specials.eos, carried.specials.unk) == (1, 2, 0)
    assert carried.vocabulary.types[405] == UNUSED
    assert carried.specials.add_bos


def test_special_ids_from_config_and_flags(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "qwen2", 512)
    configured(tmp_path, bos_token=None, eos_token={"content": "<|chat|>"}, add_eos_token=True)
    carried = read_tokenizer(tmp_path, {"bos_token_id": 7}, 512)
    assert (carried.specials.bos, carried.specials.eos) == (7, 2)
    assert (carried.specials.add_bos, carried.specials.add_eos) == (False, True)
    configured(tmp_path, eos_token=None)
    assert read_tokenizer(tmp_path, {"eos_token_id": [9, 10]}, 512).specials.eos == 9
    with pytest.raises(RefusedError, match="no end-of-sequence token"):
        read_tokenizer(tmp_path, {}, 512)


def test_looking_whole_words_up_first_may_be_moot(tmp_path: Path) -> None:
    """No rule has Qwen's cuts and `ignore_merges`; where merging reaches every token anyway, none is needed."""
    write_byte_level(tmp_path, replace(PUBLISHED["qwen2"], ignore_merges=True), 1024)
    assert read_tokenizer(tmp_path, {}, 1024).pre == "qwen2"
    data = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    with pytest.raises(RefusedError, match=r"as tokenizer\.json does with ignore_merges"):
        read_tokenizer(edited(tmp_path, model_merges=data["merges"][:-40]), {}, 1024)


def test_a_rule_that_only_comes_near_says_in_what(tmp_path: Path) -> None:
    write_byte_level(tmp_path, PUBLISHED["tekken"], 1024)
    carried = read_tokenizer(tmp_path, {}, 1024)
    assert carried.pre == "tekken"
    assert any("combining marks" in note for note in carried.notes)
    assert any(re.fullmatch(r"[1-9] of 14 probe texts are tokenised otherwise", note) for note in carried.notes)


def test_an_unknown_token_that_llama_cpp_would_not_give_is_refused(tmp_path: Path) -> None:
    """A vocabulary without a token for every byte, and an unknown token in their place."""
    write_byte_level(tmp_path, PUBLISHED["gpt-2"], 1024)
    data = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    vocab = {("[gone]" if text == "ï" else text): index for text, index in data["vocab"].items()}
    merges = [pair for pair in data["merges"] if "ï" not in "".join(pair)]
    edited(tmp_path, model_vocab=vocab, model_merges=merges, model_unk_token="!")
    with pytest.raises(RefusedError, match=r"otherwise although it cuts it alike \(an unknown"):
        read_tokenizer(tmp_path, {}, 1024)


def test_gemma_is_carried_with_its_runs_of_spaces(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, FORMS["gemma"], 1024)
    carried = read_tokenizer(tmp_path, {}, 1024)
    assert (carried.add_space_prefix, carried.notes) == (False, ())
    assert dict(zip(carried.vocabulary.tokens, carried.vocabulary.types, strict=True))["   "] == USER_DEFINED


def test_ends_of_generation_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "gpt2", 512)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, 7, 9, 600]}))
    specials = read_tokenizer(tmp_path, {"eos_token_id": 2}, 512).specials
    assert (specials.eos, specials.eot, specials.eom) == (1, None, 2)  # <|end|> is llama.cpp's own EOT
    assert [re.search(r"token (\d+)", note)[1] for note in specials.notes] == ["7", "9"]  # type: ignore[index]
    entries = {entry.key: entry.value for entry in read_tokenizer(tmp_path, {}, 512).entries()}
    assert entries["tokenizer.ggml.eom_token_id"] == 2
    assert "tokenizer.ggml.eot_token_id" not in entries


def test_what_a_tokenizer_model_does_to_texts_is_noted(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(f"word {i} and {i * 77} more words of text" for i in range(500)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))

    def train(**options: Any) -> None:
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, minloglevel=2,
            byte_fallback=True, **options,
        )  # fmt: skip

    train(model_type="bpe", user_defined_symbols=["<h1>"])
    notes = " ".join(read_tokenizer(tmp_path, {}, 410).notes)
    assert "Unicode normalisation" in notes
    assert "keeps repeated spaces" in notes
    assert "puts a space before what follows one" in notes
    train(model_type="bpe", treat_whitespace_as_suffix=True)
    with pytest.raises(RefusedError, match="puts spaces at the end of words"):
        read_tokenizer(tmp_path, {}, 410)
    train(model_type="unigram")
    with pytest.raises(RefusedError, match="has type 1"):
        read_tokenizer(tmp_path, {}, 410)


def test_templates_default_named_and_file(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "gpt2", 512)
    configured(tmp_path, chat_template=[{"name": "default", "template": "A"}, {"name": "tool", "template": "B"}])
    entries = {entry.key: entry.value for entry in read_tokenizer(tmp_path, {}, 512).entries()}
    assert entries["tokenizer.chat_template"] == "A"
    assert entries["tokenizer.chat_templates"] == ["tool"]
    assert entries["tokenizer.chat_template.tool"] == "B"
    (tmp_path / "chat_template.jinja").write_text("C")
    assert read_tokenizer(tmp_path, {}, 512).templates == {"default": "C"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("D")
    assert read_tokenizer(tmp_path, {}, 512).templates == {"default": "C", "rag": "D"}


def test_what_cannot_be_carried_says_why(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        read_tokenizer(tmp_path, {}, 512)
    write_tokenizer(tmp_path, "gpt2", 512)
    with pytest.raises(RefusedError, match=r"has no row in the embedding, which has 300"):
        read_tokenizer(tmp_path, {}, 300)
    unigram = Tokenizer(models.Unigram([("a", 0.0)]))
    unigram.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RefusedError, match="type 'Unigram'"):
        read_tokenizer(tmp_path, {}, 512)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(RefusedError, match="not valid JSON"):
        read_tokenizer(tmp_path, {}, 512)


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where to damage a JSON value: the first entries of everything, at any depth."""
    found: list[tuple[Any, ...]] = [place] if place else []
    keys = list(value)[:8] if isinstance(value, dict) else range(min(1, len(value))) if isinstance(value, list) else ()
    return found + [deeper for key in keys for deeper in places(value[key], (*place, key))]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_one_sentence(file: str, tmp_path: Path) -> None:
    """Any field missing, or of another type: carried all the same, or a RefusedError. (The tokenizers library itself
    ends the process for some post-processors, so those stay as they are.)"""
    write_byte_level(tmp_path, PUBLISHED["llama-bpe"], 600)
    whole = (tmp_path / file).read_text()
    refused = 0
    for place in places(json.loads(whole)):
        if "post_processor" in place:
            continue
        for damage in (None, 7, "x", []):
            data = json.loads(whole)
            inner = data
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = damage
            (tmp_path / file).write_text(json.dumps(data))
            try:
                read_tokenizer(tmp_path, {}, 600)
            except RefusedError:
                refused += 1
    assert refused > 3
