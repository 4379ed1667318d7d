"""Find `tokenizer.ggml.pre` by how a tokenizer splits text, whatever its vocabulary.

llama.cpp knows byte-level BPE tokenizers by the name of their splitting rule. Its own converter recognises a name by a
hash over token ids, which any other vocabulary breaks; here the rules of `pre_tokenizers.json` are run on probe texts
and compared with what tokenizer.json does. Some rules of llama.cpp only come near the tokenizer that they are named
after: those are recognised by its published expression, and the difference is told. A rule also says whether whole
words are looked up before merging (`ignore_merges`), which must agree unless the vocabulary makes it moot. Whether a
BOS is added is always written to the file, so a rule's default is moot.
Refuses a tokenizer that fits no rule: a near miss tokenises some texts wrongly, and the user alone can accept that.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from signround.errors import refuse

if TYPE_CHECKING:
    from tokenizers import Tokenizer

AUTO = "auto"
PROBES = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ ✅ 🦙🦙 3 33 333 3333 33333 333333",
    "3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български",
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure",
    "I'll make it, 'D you like some tea? We'Ve a'lL 3333333 33333333",
    " HelloWorldFooBAR camelCaseXYZ don'T WE'RE it's  (foo) .bar /baz/\n//x\n\n",
    "a\r\nb\r\n\r\n c\t\td \u00a0e\u3000f",
    "हिन्दी में वाक्य 1234567890 ١٢٣ ½ ²",
    "한국어 テスト ひらがな 漢字，。！",
    "x_y__z 1,234.5e-10 $100 50% a+b=c <|x|> @user #tag",
    "   leading",
    "trailing   ",
    "Istanbul'da I’m naïve café Ünïcödé ﬁ ① ﾃ",
    "ÜBER ÉCOLE ΑΘΗΝΑ МОСКВА Größe éÉcole HTTPServer2Go iPhone",
    "a    12   345  6 \t7  b     c",
)


@dataclass(frozen=True)
class Rule:
    """One splitting rule of llama.cpp: `names[0]` is written, the others mean the same. `regexes` run one after the
    other, each inside the pieces of the one before. `published` is what tokenizer.json of the family says where
    llama.cpp only comes near it, `differs` in what."""

    names: tuple[str, ...]
    regexes: tuple[str, ...]
    ignore_merges: bool
    published: tuple[str, ...] = ()
    differs: str = ""


@cache
def rules() -> tuple[Rule, ...]:
    """The table, most common names first."""
    return tuple(
        Rule(
            tuple(row["names"]),
            tuple(row["regexes"]),
            row["ignore_merges"],
            tuple(row.get("published", ())),
            row.get("differs", ""),
        )
        for row in _table()["rules"]
    )


@cache
def known_names() -> tuple[str, ...]:
    """Every name that llama.cpp takes, those of rules that cannot be probed included."""
    return tuple(name for rule in rules() for name in rule.names) + tuple(_table()["unprobed"])


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((files("exporters.gguf") / "pre_tokenizers.json").read_text(encoding="utf-8"))
    return table


def split(text: str, regexes: Sequence[str]) -> list[str]:
    """llama.cpp's `unicode_regex_split`: every regex cuts the pieces of the one before, gaps are pieces too."""
    import regex

    pieces = [text]
    for expression in regexes:
        compiled = regex.compile(expression)
        finer: list[str] = []
        for piece in pieces:
            position = 0
            for match in compiled.finditer(piece):
                finer += [part for part in (piece[position : match.start()], match.group()) if part]
                position = match.end()
            finer += [piece[position:]] if position < len(piece) else []
        pieces = finer
    return pieces


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: the printable character that stands for each byte, inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def byte_level_pieces(tokenizer: Tokenizer, text: str) -> list[bytes]:
    """How tokenizer.json cuts `text` before merging, as bytes; its normalizer is applied first. A piece that is not in
    GPT-2's alphabet is given as it is, which no rule does."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text.encode()]
    alphabet = byte_of_character()
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    return [
        bytes(map(alphabet.__getitem__, piece)) if alphabet.keys() >= set(piece) else piece.encode() for piece in pieces
    ]


def find_rule(tokenizer: Tokenizer, *, ignore_merges: bool, moot: Callable[[], bool]) -> Rule:
    """The rule that cuts every probe as `tokenizer` does, else the one whose published expression does. `moot` tells
    whether `ignore_merges` changes nothing for this vocabulary. Raises RefusedError naming the nearest rules."""
    wanted = [byte_level_pieces(tokenizer, probe) for probe in PROBES]
    fitting = [rule for rule in rules() if _cuts(rule.regexes) == wanted]
    fitting += [rule for rule in rules() if rule.published and _cuts(rule.published) == wanted]
    agreeing = [rule for rule in fitting if rule.ignore_merges == ignore_merges] or (
        fitting if fitting and moot() else []
    )
    if agreeing:
        return agreeing[0]
    scores = {
        rule.names[0]: sum(ours == theirs for ours, theirs in zip(_cuts(rule.regexes), wanted, strict=True))
        for rule in rules()
    }
    best = sorted(scores, key=lambda name: -scores[name])[:3]
    nearest = ", ".join(f"{name} ({scores[name]} of {len(PROBES)} probe texts)" for name in best)
    flag = " with ignore_merges" if ignore_merges else ""
    raise refuse(
        f"no splitting rule of llama.cpp cuts text as tokenizer.json does{flag}; the nearest are {nearest}",
        f"accept one with --set gguf.pre={best[0]}, or export to another format",
        "tokenizer.json",
    )


@cache
def _cuts(regexes: tuple[str, ...]) -> list[list[bytes]]:
    return [[piece.encode() for piece in split(probe, regexes)] for probe in PROBES]


def checked_name(name: str) -> str:
    """`name` as the user gave it. Raises RefusedError when llama.cpp knows no such rule."""
    if name not in known_names():
        near = difflib.get_close_matches(name, known_names(), n=3) or ["llama-bpe", "qwen2", "gpt-2"]
        raise refuse(
            f"llama.cpp knows no splitting rule {name!r}", f"did you mean {' or '.join(near)}, or auto?", "gguf.pre"
        )
    return name
