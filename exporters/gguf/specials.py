"""Special token ids, whether BOS and EOS are added, and chat templates: read from what a Hugging Face folder says.

llama.cpp ends an answer at EOS, at its EOT and EOM, and at every token whose text it knows as an end (ENDS); the other
tokens at which generation_config.json ends are written as EOT and EOM. Fill-in-the-middle tokens it finds by text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from signround.checkpoint import additional_templates
from signround.errors import refuse
from signround.files import read_json

# What llama_vocab::impl::load recognises by text (llama.cpp, src/llama-vocab.cpp).
EOT = frozenset(["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>"])
EOT |= {"_<EOT>", "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>"}
EOM = frozenset(["<|eom_id|>"])
_OTHER_ENDS = ("<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "[EOS]", "<eos>", "<turn|>", "[e~[")
ENDS = EOT | EOM | frozenset(_OTHER_ENDS) | {"<|tool_response>"}


@dataclass(frozen=True)
class Specials:
    """Ids that GGUF names, and what llama.cpp adds around a text."""

    bos: int | None
    eos: int
    unk: int | None
    pad: int | None
    add_bos: bool
    add_eos: bool
    eot: int | None = None
    eom: int | None = None
    notes: tuple[str, ...] = ()


def read_specials(
    folder: Path,
    ids: Mapping[str, int],
    config: Mapping[str, Any],
    vocabulary: int,
    *,
    around: tuple[Sequence[int], Sequence[int]] | None,
    unknown: str | None = None,
) -> Specials:
    """`ids` maps token text to id; `around` is what tokenizer.json puts before and after a text (None: no such file);
    `unknown` is the unknown token of the tokenizer's model.

    Order of trust: tokenizer_config.json, special_tokens_map.json, config.json; an explicit add_bos_token or
    add_eos_token of tokenizer_config.json wins over the template (as in llama.cpp's converter). Raises RefusedError
    when a text is wrapped in something that is not BOS and EOS, or when there is no EOS.
    """
    settings = read_json(folder / "tokenizer_config.json")
    sources = (settings, read_json(folder / "special_tokens_map.json"))
    bos, eos, unk, pad = (_special_id(kind, sources, ids, config, vocabulary) for kind in ("bos", "eos", "unk", "pad"))
    before, after = around if around is not None else ((() if bos is None else (bos,)), ())
    if bos is None and len(before) == 1:
        bos = before[0]
    if eos is None and len(after) == 1:
        eos = after[0]
    if (before and list(before) != [bos]) or (after and list(after) != [eos]):
        raise refuse(
            f"the tokenizer puts tokens {list(before)} before and {list(after)} after a text; llama.cpp can only add "
            f"BOS ({bos}) and EOS ({eos})",
            "correct bos_token and eos_token in tokenizer_config.json",
            "tokenizer.json",
        )
    if eos is None:
        raise refuse(
            "the tokenizer names no end-of-sequence token, and llama.cpp would take token 11 for it",
            "set eos_token in tokenizer_config.json",
            "tokenizer_config.json",
        )
    eot, eom, notes = _further_ends(folder, ids, config, vocabulary, eos)
    return Specials(
        bos=eos if bos is None else bos,  # never added; unwritten, llama.cpp would take token 11
        eos=eos,
        unk=ids.get(unknown) if unk is None and unknown is not None else unk,
        pad=pad,
        add_bos=_flag(settings, "add_bos_token", bool(before)) and bos is not None,
        add_eos=_flag(settings, "add_eos_token", bool(after)),
        eot=eot,
        eom=eom,
        notes=notes,
    )


def _further_ends(
    folder: Path, ids: Mapping[str, int], config: Mapping[str, Any], vocabulary: int, eos: int
) -> tuple[int | None, int | None, tuple[str, ...]]:
    """EOT and EOM for the ends of generation_config.json and config.json that llama.cpp would not see, and a note on
    those that find no room."""
    texts = {index: text for text, index in ids.items()}
    listed = [source.get("eos_token_id") for source in (read_json(folder / "generation_config.json"), config)]
    ends = [end for entry in listed for end in (entry if isinstance(entry, list) else [entry]) if isinstance(end, int)]
    unseen = [end for end in dict.fromkeys(ends) if 0 <= end < vocabulary and end != eos and texts.get(end) not in ENDS]
    found: dict[str, int] = {}
    for name, known in (("eot", EOT), ("eom", EOM)):
        if unseen and not known & ids.keys():
            found[name] = unseen.pop(0)
    notes = [f"llama.cpp does not end an answer at token {end} ({texts.get(end)!r})" for end in unseen]
    return found.get("eot"), found.get("eom"), tuple(notes)


def _flag(settings: Mapping[str, Any], name: str, default: bool) -> bool:
    value = settings.get(name)
    return value if isinstance(value, bool) else default


def _special_id(
    kind: str, sources: Sequence[Mapping[str, Any]], ids: Mapping[str, int], config: Mapping[str, Any], vocabulary: int
) -> int | None:
    for source in sources:
        token = source.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str) and ids.get(text, vocabulary) < vocabulary:
            return ids[text]
    index = config.get(f"{kind}_token_id")
    if isinstance(index, list):
        index = index[0] if index else None
    return index if isinstance(index, int) and 0 <= index < vocabulary else None


def chat_templates(folder: Path) -> dict[str, str]:
    """Name -> template, "default" first: chat_template.jinja and additional_chat_templates/NAME.jinja, else
    `chat_template` of tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    named = {path.stem: path.read_text(encoding="utf-8") for path in additional_templates(folder)}
    if file.is_file():
        return {"default": file.read_text(encoding="utf-8"), **named}
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, str):
        return {"default": template, **named}
    if isinstance(template, list):
        return {str(entry["name"]): str(entry["template"]) for entry in template} | named
    return named
