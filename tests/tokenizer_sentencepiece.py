"""SentencePiece tokenizers in the forms that models are published in, trained on the spot.

As tokenizer.json (Llama 2 and 3 generations of transformers, Mistral, Gemma) and as a bare tokenizer.model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.gguf.pre_tokenizer import PROBES
from tests.tokenizer_families import SPECIAL_TEXTS, TEXTS

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
NEWLINES, SPACES = ["\n" * count for count in range(2, 6)], ["▁" * count for count in range(2, 9)]


@dataclass(frozen=True)
class Form:
    """How a SentencePiece vocabulary is published as tokenizer.json. `prefix`: "prepend" (normalizer, transformers 4),
    "first", "always" or "never" (Metaspace, transformers 5), "replace" (Gemma: a normalizer without a prefix).
    `user_defined`: Gemma's runs of newlines and spaces and a tag, as added tokens; `normalized` is their flag."""

    prefix: str
    user_defined: bool = False
    normalized: bool = False
    control: tuple[str, ...] = ("<|chat|>", "[INST]", "[/INST]")


FORMS = {
    "llama-2": Form("prepend"),
    "llama-2-metaspace": Form("first"),
    "metaspace-always": Form("always"),
    "mistral-v3": Form("never"),
    "gemma": Form("replace", user_defined=True),
    "gemma-normalized": Form("replace", user_defined=True, normalized=True),
}


def write_sentencepiece(folder: Path, form: Form, vocabulary: int) -> None:
    """tokenizer.json and tokenizer_config.json with exactly `vocabulary` ids; adds a BOS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = normalizers.Replace(" ", "▁")
    if form.prefix == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
    elif form.prefix == "replace":
        tokenizer.normalizer = space
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=form.prefix, split=False)
    strip = [] if form.prefix in ("never", "replace") else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    runs = NEWLINES + SPACES if form.user_defined else []
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(form.control) - 2 * len(runs),
        special_tokens=special + BYTES,
        show_progress=False,
        max_token_length=12,
    )
    words = [f"▁{word}" for text in [*TEXTS, *PROBES] for word in text.split(" ")]
    tokenizer.train_from_iterator(words * 3, trainer)
    tokenizer = _with_runs(tokenizer, runs)
    if runs:
        added = [AddedToken(text, special=False, normalized=form.normalized) for text in [*runs, "<h1>"]]
        tokenizer.add_tokens(added)
    tokenizer.add_special_tokens([*special, *form.control])
    missing = range(vocabulary - tokenizer.get_vocab_size())
    tokenizer.add_tokens([AddedToken(f"<extra_{index}>", special=False, normalized=False) for index in missing])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": "<unk>"}))


def _with_runs(tokenizer: Any, runs: list[str]) -> Any:
    """The same tokenizer with the runs as pieces, merged before all others (user-defined symbols have score 0); bytes
    are pieces and no added tokens."""
    from tokenizers import Tokenizer

    data = json.loads(tokenizer.to_str())
    vocab: dict[str, int] = data["model"]["vocab"]
    data["added_tokens"] = []
    for run in ["\n", *runs]:
        vocab.setdefault(run, len(vocab))
    first = [
        [run[:cut], run[cut:]]
        for run in sorted(runs, key=len)
        for cut in range(1, len(run))
        if run[:cut] in vocab and run[cut:] in vocab
    ]
    others = [pair for pair in data["model"]["merges"] if list(pair) not in first]
    data["model"]["merges"] = first + others
    return Tokenizer.from_str(json.dumps(data))


SENTENCEPIECE_TEXTS = [
    *TEXTS,
    *[text.replace("<|begin|>", "<s>").replace("<|end|>", "</s>") for text in SPECIAL_TEXTS],
    "<s>[INST] hi there [/INST] hello</s>[INST]again[/INST]",
    "\n\n\n\nfour, \n\nand   three      spaces <h1>title</h1>",
    "<unk> x<unk>y <0x41> ▁under▁score",
]
