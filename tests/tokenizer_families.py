"""Tokenizers as their families publish them, trained on the spot: the split expressions are those of tokenizer.json.

The training text holds the test texts, again and again, so that whole pieces become tokens: a piece that llama.cpp cuts
otherwise is another token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.gguf.pre_tokenizer import PROBES, Rule, rules

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ENDING = f"{CONTRACTIONS}?"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")
CASED_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
LLAMA3 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{SIGNS}|{SPACES}"
GPT4O = rf"{CASED[0]}{ENDING}|{CASED[1]}{ENDING}|\p{{N}}{{1,3}}|{CASED_SIGNS}|{SPACES}"
CJK = "[一-龥぀-ゟ゠-ヿ]+"
DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)

TEXTS = [
    "",
    " ",
    "  two leading, two trailing  ",
    "def f(x):\n    return x ** 2  # squares\n\n\n\tprint(f(3))\r\n\r\n",
    'for (int i = 0; i < n; ++i) { a[i] += b->c::d<T>("%s\\n", !x && y || z); }',
    "12345 67,890.12 1e-10 1234567 ½ ² ١٢٣ x2y 3D 0xFF v1.2.3",
    "I'm DON'T we'll they'RE it's 'quoted' \"double\" ``code`` ...!!! -- == o'clock 'twas L'été",
    "emoji 🚀😶‍🌫️🦙 👩‍👩‍👧‍👦 ❤️ flags 🇩🇪 café naïve ÜBER Größe",
    "decomposed cafe\u0301 nai\u0308ve A\u030angstro\u0308m e\u0301\u0302 \u0301alone",
    "日本語のテキスト、漢字。 한국어 중문 中文混合English 「括弧」～！",
    "العربية عربي מילה ไทยคำ កាន់តែ తెలుగు",
    "हिन्दी में क्षेत्र বাংলা தமிழ்",
    "a\u00a0b\u3000c\u2009d\u2028e\u0085f\u200bg\ufeffh\x0bi\x0cj",
    "CamelCaseXYZfooBAR snake_case __init__ /usr/bin//x.py @user #tag <x|y> HTTPServer2Go iPhone éÉcole ǅungla",
    "\n\n\n   \n \t \n",
    "tab\tsep\t\tvalues\t \tmixed \t end",
    "x" * 300 + " " * 40 + "1" * 50 + "-" * 33 + "\n" * 20,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "Привет, мир! Ελληνικά ქართული Հայերեն İstanbul ı ß ſ ﬁ Ⅷ ª",
    "math ∑∫√≠ €£¥ ← → ©®™ § ¶ ° ± × ÷",
]
SPECIAL_TEXTS = [
    "<|begin|>system<|end|>\n<|chat|>hello<|chat|> <|begin|>x<|end|>",
    "a<|chat|>b <|chat|> c<|chat|>\n<|chat|>",
    "<|chat|", "<|chat|><|chat|>", " <|end|> ", "<<|end|>>", "<tool_x>call</tool_x> <tool_x>",
]  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A byte-level tokenizer: `steps` are Split expressions, "digits", or "gpt2" for ByteLevel with its own."""

    steps: tuple[str, ...]
    ignore_merges: bool = False
    nfc: bool = False


def rule_of(name: str) -> Rule:
    return next(rule for rule in rules() if name in rule.names)


GPT2 = Published(("gpt2",))
PUBLISHED: dict[str, Published] = {
    "gpt-2": GPT2,
    "llama-bpe": Published((LLAMA3,), ignore_merges=True),
    "dbrx": Published((LLAMA3,)),
    "qwen2": Published((LLAMA3.replace("{1,3}", ""),), nfc=True),
    "smollm": Published(("digits", "gpt2")),
    "deepseek-llm": Published(
        (
            "[\r\n]",
            rule_of("deepseek-llm").regexes[1],
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            "[一-龥ࠀ-一가-퟿]+",
            "digits",
        )
    ),
    "deepseek-coder": Published(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", "digits")),
    "deepseek-v3": Published((r"\p{N}{1,3}", CJK, DEEPSEEK3)),
    "tekken": Published((rf"{CASED[0]}|{CASED[1]}|\p{{N}}|{CASED_SIGNS}|{SPACES}",), ignore_merges=True),
    "gpt-4o": Published((GPT4O,)),
    "qwen35": Published(
        (
            rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}",
        ),
        nfc=True,
    ),
    "falcon": Published(rule_of("falcon").regexes),
    "default": Published(rule_of("default").regexes),
    "chameleon": Published(rule_of("chameleon").regexes),
    "viking": Published((" ?[^(\\s|[.,!?…。，、।۔،])]+", "digits")),
    "bloom": Published((" ?[^(\\s|[.,!?…。，、।۔،])]+",)),
    "minicpm5": Published((r"\p{N}{1,3}", LLAMA3.replace("{1,3}", "+")), ignore_merges=True),
    "jais-2": Published(
        (
            rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{SIGNS}|\s*[\r\n]+|\s{{512}}(?!\S)|\s{{256}}(?!\S)|\s{{128}}(?!\S)"
            r"|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}",
        )
    ),
    "exaone-moe": Published(
        (
            rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "granite-embed-multi-97m": Published((GPT4O,), ignore_merges=True),
    "youtu": Published(
        (
            "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + CJK,
            GPT4O.replace("{1,3}", ""),
        ),
        ignore_merges=True,
    ),
    "bailingmoe": Published(
        (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)
    ),
    "seed-coder": Published(
        (rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",)
    ),
    "ufakzeka": Published((rf"{WORDS}|\p{{N}}|{SIGNS}|{SPACES}",)),
    "laguna": Published((r"[^\n]+|[\n]+", LLAMA3.replace("{1,3}", ""))),
    "spark2_5": Published(
        (
            r"\p{N}{1,3}",
            CJK,
            DEEPSEEK3.replace("[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|", "[\\p{P}\\p{S}]+|[\r\n]|"),
            r"\p{N}",
        )
    ),
}


def pre_tokenizer(published: Published) -> Any:
    from tokenizers import Regex, pre_tokenizers

    def step(text: str) -> Any:
        if text == "digits":
            return pre_tokenizers.Digits(individual_digits=True)
        if text == "gpt2":
            return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return pre_tokenizers.Split(Regex(text), behavior="isolated")

    steps = [step(text) for text in published.steps]
    if "gpt2" not in published.steps:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def write_byte_level(
    folder: Path, published: Published, vocabulary: int, special: Sequence[str] = ("<|begin|>", "<|end|>", "<|chat|>")
) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE with exactly `vocabulary` ids; adds a BOS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=published.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer(published)
    if published.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    plain = [AddedToken("<tool_x>", special=False, normalized=False)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(plain) - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=24,
    )
    tokenizer.train_from_iterator([*TEXTS, *PROBES] * 4, trainer)
    missing = vocabulary - len(plain) - len(special) - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<extra_{index}>" for index in range(missing)])
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(plain)
    bos = special[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": special[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
