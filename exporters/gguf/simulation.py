"""What llama.cpp makes of a text, told from nothing but what we write into the file; and where tokenizer.json differs.

Follows llama-vocab.cpp: special tokens are cut out first, the longest first; between them byte-level BPE merges by rank
inside the pieces of a splitting rule, SentencePiece by score over everything. `runtime_tests/test_gguf_tokenizers.py`
holds this to llama.cpp itself, so that a plan can compare the two tokenizers before any work and without a runtime.
Knows nothing of the rules of `unprobed` in pre_tokenizers.json.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

from exporters.gguf.pre_tokenizer import byte_of_character, rules, split
from exporters.gguf.vocabulary import CONTROL, SPACE, UNKNOWN, USER_DEFINED, CarriedTokenizer


class Simulation:
    """llama.cpp's tokenizer for `carried`. Raises KeyError for a splitting rule whose expressions are not known."""

    def __init__(self, carried: CarriedTokenizer) -> None:
        self._carried = carried
        self._ids = {text: index for index, text in enumerate(carried.vocabulary.tokens)}
        self._regexes: tuple[str, ...] = ()
        self._ignore_merges = False
        if carried.model == "gpt2":
            rule = {name: rule for rule in rules() for name in rule.names}[carried.pre]
            self._regexes, self._ignore_merges = rule.regexes, rule.ignore_merges

    def holds(self, index: int) -> bool:
        """Whether the file has a token `index`."""
        return index < len(self._carried.vocabulary.tokens)

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Token ids, without BOS and EOS."""
        found: list[int] = []
        after_special = True
        for fragment in self._partition(text, parse_special):
            if isinstance(fragment, int):
                found.append(fragment)
                after_special = True
            elif self._carried.model == "gpt2":
                found += self._byte_level(fragment)
            else:
                prefix = " " if self._carried.add_space_prefix and after_special else ""
                found += self._sentencepiece((prefix + fragment).replace(" ", SPACE))
                after_special = False
        return found

    @cached_property
    def _specials(self) -> list[tuple[str, int, bool]]:
        """(text, id, whether it is found in any case), longest first."""
        vocabulary = self._carried.vocabulary
        kinds = (CONTROL, UNKNOWN, USER_DEFINED)
        found = [
            (text, index, kind == USER_DEFINED)
            for index, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
            if kind in kinds
        ]
        return sorted(found, key=lambda special: -len(special[0].encode()))

    def _partition(self, text: str, parse_special: bool) -> list[str | int]:
        fragments: list[str | int] = [text] if text else []
        for special, index, always in self._specials:
            if (always or parse_special) and special in text:
                fragments = [part for fragment in fragments for part in _cut(fragment, special, index)]
        return fragments

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        ranks: dict[tuple[str, str], int] = {}
        for rank, merge in enumerate(self._carried.vocabulary.merges or ()):
            left, _, right = merge.partition(" ")
            ranks.setdefault((left, right), rank)
        return ranks

    def _byte_level(self, text: str) -> list[int]:
        alphabet = {byte: character for character, byte in byte_of_character().items()}
        found = []
        for piece in split(text, self._regexes):
            word = "".join(alphabet[byte] for byte in piece.encode())
            if self._ignore_merges and word in self._ids:
                found.append(self._ids[word])
                continue
            for symbol in merged(word, lambda left, right: self._ranks.get((left, right))):
                known = [symbol] if symbol in self._ids else symbol
                found += [self._ids[part] for part in known if part in self._ids]
        return found

    def _sentencepiece(self, text: str) -> list[int]:
        scores = self._carried.vocabulary.scores
        assert scores is not None

        def order(left: str, right: str) -> float | None:
            index = self._ids.get(left + right)
            return None if index is None else -scores[index]

        found = []
        for symbol in merged(text, order):
            codes = [symbol] if symbol in self._ids else [f"<0x{byte:02X}>" for byte in symbol.encode()]
            found += [self._ids[code] for code in codes]
        return found


def _cut(fragment: str | int, special: str, index: int) -> Iterator[str | int]:
    if isinstance(fragment, int):
        yield fragment
        return
    for position, part in enumerate(fragment.split(special)):
        if position:
            yield index
        if part:
            yield part


def merged(text: str, order: Callable[[str, str], float | None]) -> list[str]:
    """Join neighbours, the lowest `order` first and the leftmost of equals, until no pair has one."""
    symbols: list[str] = list(text)
    following = [*range(1, len(symbols)), -1]
    previous = [*range(-1, len(symbols) - 1)]
    queue: list[tuple[float, int, str]] = []

    def offer(left: int) -> None:
        if left >= 0 and following[left] >= 0:
            rank = order(symbols[left], symbols[following[left]])
            if rank is not None:
                heapq.heappush(queue, (rank, left, symbols[left] + symbols[following[left]]))

    for index in range(len(symbols) - 1):
        offer(index)
    while queue:
        _, left, union = heapq.heappop(queue)
        right = following[left]
        if not symbols[left] or right < 0 or symbols[left] + symbols[right] != union:
            continue
        symbols[left], symbols[right] = union, ""
        following[left] = following[right]
        if following[right] >= 0:
            previous[following[right]] = left
        offer(previous[left])
        offer(left)
    return [symbol for symbol in symbols if symbol]


def differing(
    simulation: Simulation, encode: Callable[[str], Sequence[int]], texts: Sequence[str]
) -> Mapping[str, tuple[list[int], list[int]]]:
    """Text -> (ids of tokenizer.json, ids of llama.cpp), for the texts where they differ."""
    pairs = {text: (list(encode(text)), simulation.encode(text)) for text in texts}
    return {text: pair for text, pair in pairs.items() if pair[0] != pair[1]}
