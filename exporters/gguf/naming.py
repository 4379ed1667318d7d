"""File names by GGUF's convention, `<BaseName>-<SizeLabel>-<FineTune>-<Version>-<Encoding>.gguf`, and their words.

The parts are read from the name of the model's folder (`Qwen3-0.6B-Base`, `Mistral-7B-Instruct-v0.3`, `qwen3-26m`); a
size that it does not hold is counted (`tiny-llama` -> `tiny-llama-1.3M`). Source: ggml's docs/gguf.md, "GGUF Naming
Convention"; gguf-py reads names by the same words, but gives up on a name without a size. Knows only the name: no
metadata of the publisher (`card.py`), no shards (`signround.runtimes.gguf_files`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_SIZE = re.compile(r"(?:\d+x)?\d+(?:[._]\d+)?[KMBT]", re.IGNORECASE | re.ASCII)
_ACTIVE = re.compile(r"A\d+(?:\.\d+)?[KMBT]", re.IGNORECASE)  # Qwen3-30B-A3B: parameters in use at a token
_VERSION = re.compile(r"v\d+(?:\.\d+)*", re.IGNORECASE)
_TUNED = {"base", "chat", "dpo", "hf", "instruct", "it", "rl", "sft", "vision"}  # words after which a name goes on
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
LIKELY = 8  # a label further than this factor from the true size is a context length: Phi-3-mini-128k-instruct


@dataclass(frozen=True)
class ModelName:
    """The parts of a name; `fine_tune` and `version` may be empty."""

    base: str
    size: str
    fine_tune: str
    version: str

    @property
    def title(self) -> str:
        """For people: `qwen3-26m` -> `Qwen3 26M`."""
        words = " ".join(filter(None, (self.base, self.size, self.fine_tune, self.version))).replace("-", " ").split()
        return " ".join(word if _VERSION.fullmatch(word) else word[0].upper() + word[1:] for word in words)


def size_label(parameters: int) -> str:
    """The size in the spelling of GGUF's naming convention: 4.1M, 26M, 7.2B."""
    for letter, unit in reversed(_UNITS.items()):
        if parameters >= unit:
            value = parameters / unit
            return f"{value:.1f}{letter}" if value < 10 else f"{value:.0f}{letter}"
    return str(parameters)


def model_name(folder: str, parameters: int) -> ModelName:
    """Read the name of a model's folder. Characters that a file name should not have become dashes."""
    words = [word for word in re.sub(r"[^\w.+]+", "-", folder).strip("-.").split("-") if word] or ["model"]
    sizes = [index for index, word in enumerate(words) if index and _is_size(word, parameters)]
    if sizes:
        first = sizes[0]
        last = first + 1 if words[first + 1 : first + 2] and _ACTIVE.fullmatch(words[first + 1]) else first
        size = "-".join(word.replace("_", ".").upper().replace("X", "x") for word in words[first : last + 1])
        base, rest = words[:first], words[last + 1 :]
    else:
        tails = [index for index, word in enumerate(words) if index and _is_tail(word)]
        cut = tails[0] if tails else len(words)
        base, size, rest = words[:cut], size_label(parameters), words[cut:]
    versions = [word for word in rest if _VERSION.fullmatch(word)]
    tuned = [word for word in rest if not _VERSION.fullmatch(word)]
    return ModelName("-".join(base), size, "-".join(tuned), "-".join(versions))


def file_stem(folder: str, parameters: int, scheme: str) -> str:
    """The file name without its ending: `qwen3-26m`, `q4_k_m` -> `qwen3-26M-Q4_K_M`."""
    name = model_name(folder, parameters)
    encoding = re.sub(r"[^\w.]+", "-", scheme.upper()).strip("-.")
    return "-".join(filter(None, (name.base, name.size, name.fine_tune, name.version, encoding)))


def _is_tail(word: str) -> bool:
    return word.lower() in _TUNED or _VERSION.fullmatch(word) is not None


def _is_size(word: str, parameters: int) -> bool:
    if _SIZE.fullmatch(word) is None:
        return False
    numbers = word[:-1].replace("_", ".").lower().split("x")
    value = _UNITS[word[-1].upper()]
    for number in numbers:
        value *= float(number)
    return parameters / LIKELY <= value <= parameters * LIKELY
