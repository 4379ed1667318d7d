"""What tokenizer.json does, asked of the `tokenizers` library, and what it says of its ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from exporters.gguf.pre_tokenizer import PROBES
from exporters.gguf.simulation import Simulation, differing
from signround.errors import refuse

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Json = Mapping[str, Any]
MOST_SPECIALS = 24


class _Refusing:
    """The library's errors are `Exception` itself and nothing narrower: exactly those become refusals."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is Exception:
            raise refuse(
                f"the tokenizers library cannot use it ({str(error).splitlines()[0]})",
                "restore the file from the model's publisher",
                "tokenizer.json",
            ) from error


def loaded(folder: Path) -> Tokenizer:
    """Raises RefusedError when the library cannot read tokenizer.json."""
    from tokenizers import Tokenizer

    with _Refusing():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))


def encoder(tokenizer: Tokenizer, *, add_special_tokens: bool = False) -> Callable[[str], list[int]]:
    """Token ids of a text, as a rule without what is put around it. Raises RefusedError when the library cannot."""

    def encode(text: str) -> list[int]:
        with _Refusing():
            ids = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return list(ids)

    return encode


def around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text."""
    plain, full = (encoder(tokenizer, add_special_tokens=special)("a") for special in (False, True))
    starts = [at for at in range(len(full) - len(plain) + 1) if full[at : at + len(plain)] == plain]
    start = starts[0] if starts else 0
    return full[:start], full[start + len(plain) :]


def ids_by_text(data: Json) -> dict[str, int]:
    """Text -> id of every token in tokenizer.json, added ones included."""
    return dict(data["model"]["vocab"]) | {entry["content"]: entry["id"] for entry in data["added_tokens"]}


def stripping_notes(added: Sequence[Json]) -> list[str]:
    """A note when added tokens swallow neighbouring spaces or match whole words only, which llama.cpp does not do."""
    special = [entry["content"] for entry in added if _strips(entry)]
    if not special:
        return []
    return [f"llama.cpp ignores that added tokens such as {special[0]!r} strip spaces or match whole words only"]


def special_notes(simulation: Simulation, tokenizer: Tokenizer, added: Sequence[Json], why: str = "") -> list[str]:
    """A note when llama.cpp reads added tokens inside a text otherwise (those of `stripping_notes` apart)."""
    told = [entry["content"] for entry in added if not _strips(entry) and simulation.holds(entry["id"])]
    told = [text for text in told if text.strip("▁")]  # runs of spaces are met as spaces
    some = told[:: len(told) // MOST_SPECIALS + 1]
    texts = [text for special in some for text in (f"a{special}b", f"a {special} b", f"{special}{special}\n")]
    found = differing(simulation, encoder(tokenizer), texts)
    if not found:
        return []
    return [f"special tokens inside a text, as in {next(iter(found))!r}, are read otherwise by llama.cpp{why}"]


def transformers_notes(folder: Path) -> list[str]:
    """A note when transformers tokenises otherwise than tokenizer.json, which llama.cpp follows: transformers 5 builds
    some classes (GPT2Tokenizer, LlamaTokenizer) from vocabulary and merges, and ignores how tokenizer.json cuts."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        return []
    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError):  # the pipeline refuses it
        return []
    encode = encoder(loaded(folder))
    texts = (*PROBES, f"a{theirs.eos_token} b")
    other = [text for text in texts if theirs(text, add_special_tokens=False)["input_ids"] != encode(text)]
    if not other:
        return []
    name = type(theirs).__name__
    return [
        f"{name} of transformers tokenises {len(other)} of {len(texts)} probe texts otherwise than tokenizer.json,"
        " which llama.cpp follows; calibration and perplexity use transformers"
    ]


def _strips(entry: Json) -> bool:
    return any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word"))
