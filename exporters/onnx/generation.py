"""How the model's publisher wants its text to end and to be sampled, in the words of genai_config.json.

From generation_config.json, config.json and the tokenizer's files. Refuses damaged files and values that mean nothing;
what transformers takes and onnxruntime-genai does not (0.18) is written so that both do the same, with a note.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from signround.errors import Refusal, RefusedError
from signround.files import read_json
from signround.plan import ModelPlan

GENERATION, CONFIG = "generation_config.json", "config.json"
NAMING = ("tokenizer_config.json", "special_tokens_map.json")  # which token ends a text, by its text
TOKENIZER = "tokenizer.json"
KINDS = ("bos", "eos", "pad")


@dataclass(frozen=True)
class Setting:
    """What a key of `search` may hold: numbers from `least` to `most`, whole ones where `kind` is int."""

    kind: type[bool] | type[int] | type[float]
    least: float = 0.0
    most: float = math.inf

    @property
    def needed(self) -> str:
        """In words."""
        if self.kind is bool:
            return "true or false"
        words = "a whole number" if self.kind is int else "a number"
        if math.isfinite(self.most):
            return f"{words} from {self.least:g} to {self.most:g}"
        return f"{words} from {self.least:g} on" if math.isfinite(self.least) else words

    def holds(self, value: object) -> bool:
        """Whether `value` is one of these."""
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return self.least <= value <= self.most and (self.kind is float or value == int(value))


# Keys of generation_config.json that onnxruntime-genai knows under `search`.
SAMPLING = {
    "do_sample": Setting(bool), "temperature": Setting(float), "top_k": Setting(int, least=-math.inf),
    "top_p": Setting(float, most=1.0), "repetition_penalty": Setting(float), "no_repeat_ngram_size": Setting(int),
    "min_length": Setting(int),
}  # fmt: skip
# where generation_config.json says do_sample only
TRANSFORMERS_SAMPLING: Mapping[str, bool | int | float] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
ALL = 0  # top_k of onnxruntime-genai for every token; without a top_k it takes 50


@dataclass(frozen=True)
class Generation:
    """Special ids as `model` of genai_config.json holds them, sampling as `search` does, and what to say of both."""

    tokens: dict[str, int | list[int]]
    search: dict[str, bool | int | float]
    notes: tuple[str, ...]


def generation_refusals(plan: ModelPlan) -> list[Refusal]:
    """What is wrong in the files that are read here and in those that name the tokenizer's tokens."""
    found: list[Refusal] = []
    for name in NAMING:
        try:
            read_json(plan.files / name)
        except RefusedError as error:
            found += error.refusals
    try:
        read_generation(plan)
    except RefusedError as error:
        found += error.refusals
    return list(dict.fromkeys(found))


def read_generation(plan: ModelPlan) -> Generation:
    """Raises RefusedError for damaged files."""
    given = {key: value for key, value in read_json(plan.files / GENERATION).items() if value is not None}
    refusals = [*_sampling_refusals(given, plan.files), *_token_refusals(given, plan)]
    if refusals:
        raise RefusedError(refusals)
    search, sampling_notes = _search(given, plan.architecture.vocabulary)
    tokens, token_notes = _tokens(given, plan)
    return Generation(tokens, search, (*sampling_notes, *token_notes))


def _sampling_refusals(given: Mapping[str, Any], files: Path) -> Iterator[Refusal]:
    for key, setting in SAMPLING.items():
        if key in given and not setting.holds(given[key]):
            yield _refusal(f"{key} is {given[key]!r}, {setting.needed} is needed", files / GENERATION)


def _token_refusals(given: Mapping[str, Any], plan: ModelPlan) -> Iterator[Refusal]:
    for name, source in ((GENERATION, given), (CONFIG, plan.config)):
        for kind in KINDS:
            value = source.get(f"{kind}_token_id")
            listed = value if isinstance(value, list) and kind == "eos" else [value]
            if value is not None and any(type(entry) is not int for entry in listed):
                lists = " or a list of them" if kind == "eos" else ""
                yield _refusal(f"{kind}_token_id is {value!r}, a whole number{lists} is needed", plan.files / name)


def _refusal(problem: str, path: Path) -> Refusal:
    return Refusal(problem, "correct the file, or download it again", str(path))


def _search(given: Mapping[str, Any], vocabulary: int) -> tuple[dict[str, bool | int | float], list[str]]:
    """How the model's publisher wants it sampled; greedy where nothing is said, as in transformers."""
    found = dict(TRANSFORMERS_SAMPLING) if given.get("do_sample") else {"do_sample": False}
    found |= {key: setting.kind(given[key]) for key, setting in SAMPLING.items() if key in given}
    if 0 <= found.get("top_k", ALL) <= vocabulary:
        return found, []
    found["top_k"] = ALL  # as transformers, which cuts it to the vocabulary; onnxruntime-genai builds no generator
    if "top_k" not in given:
        return found, []
    return found, [
        f"onnx: top_k {given['top_k']} of {GENERATION} is not within the vocabulary of {vocabulary} and is left out; "
        f"{ALL} is written, for every token."
    ]


def _tokens(given: Mapping[str, Any], plan: ModelPlan) -> tuple[dict[str, int | list[int]], list[str]]:
    """bos, eos and pad ids: generation_config.json first, as transformers does, then config.json, for eos then the
    tokenizer; pad falls back to the first eos. Ids beyond the vocabulary, which onnxruntime-genai stops at, are left
    out."""
    found: dict[str, int | list[int]] = {}
    notes = []
    for kind in KINDS:
        key = f"{kind}_token_id"
        value = given.get(key, plan.config.get(key))
        listed = value if isinstance(value, list) else [] if value is None else [value]
        known = [entry for entry in listed if 0 <= entry < plan.architecture.vocabulary]
        if kind == "eos" and known != listed:
            notes.append(f"onnx: {key} {value} is not within the vocabulary; ids beyond it are left out.")
        if known:
            found[key] = known if isinstance(value, list) else known[0]
    if "eos_token_id" not in found:
        notes += _end_of_tokenizer(plan, found)
    if "eos_token_id" in found and "pad_token_id" not in found:
        ends = found["eos_token_id"]
        found["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    return found, notes


def _end_of_tokenizer(plan: ModelPlan, found: dict[str, int | list[int]]) -> list[str]:
    """Put the tokenizer's end of text into `found`; what to say of it."""
    end = tokenizer_end(plan.files, plan.architecture.vocabulary)
    if end is None:
        return [
            f"onnx: neither {GENERATION}, {CONFIG} nor the tokenizer names an end of text; onnxruntime-genai ends only "
            "at search.max_length."
        ]
    found["eos_token_id"] = end[0]
    return [f"onnx: no end of text in {GENERATION} or {CONFIG}; the tokenizer's is written, {end[0]} ({end[1]!r})."]


def tokenizer_end(files: Path, vocabulary: int) -> tuple[int, str] | None:
    """Id and text of the token that the tokenizer's files call the end of a text. Raises RefusedError for damaged
    files."""
    for name in NAMING:
        token = read_json(files / name).get("eos_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str):
            index = _ids(files).get(text)
            if isinstance(index, int) and 0 <= index < vocabulary:
                return index, text
    return None


def _ids(files: Path) -> dict[str, Any]:
    """Text -> id of every token in tokenizer.json."""
    tokenizer = read_json(files / TOKENIZER)
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, list):  # Unigram: [text, score] in the order of their ids
        vocab = {str(row[0]): index for index, row in enumerate(vocab) if isinstance(row, list) and row}
    ids = dict(vocab) if isinstance(vocab, Mapping) else {}
    added = tokenizer.get("added_tokens")
    rows = [row for row in added if isinstance(row, Mapping)] if isinstance(added, list) else []
    return ids | {str(row.get("content")): row.get("id") for row in rows}
