"""What the publisher says of a model: the front matter of README.md (a Hugging Face model card) as `general.*` keys.

Licence, base models, tags and languages, under the keys that llama.cpp's converter writes (gguf-py `metadata.py`). A
value is read as the text that stands there (no dates, no `no` that becomes False), and what is not text or a list of
texts is left out. A card that cannot be read stops nothing; it says so in `problem`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.gguf.container import KeyValue
from signround.checkpoint import CARD

MOST_BYTES = 1 << 18  # front matter is short; what follows it is prose
HUB = "https://huggingface.co/"
_LICENSE = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
}


@dataclass(frozen=True)
class ModelCard:
    """`license` maps the card's words (license, license_name, license_link) to what it says of them."""

    license: Mapping[str, str]
    base_models: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    problem: str = ""

    def entries(self) -> list[KeyValue]:
        """Key-values, only of what is known."""
        found = [KeyValue(_LICENSE[key], "string", text) for key, text in self.license.items()]
        if self.base_models:
            found.append(KeyValue("general.base_model.count", "u32", len(self.base_models)))
        for index, base in enumerate(self.base_models):
            prefix = f"general.base_model.{index}"
            found += [KeyValue(f"{prefix}.{key}", "string", text) for key, text in _base_model(base).items()]
        for key, texts in (("general.tags", self.tags), ("general.languages", self.languages)):
            if texts:
                found.append(KeyValue(key, "string", list(texts)))
        return found


def read_card(folder: Path) -> ModelCard:
    """The card of the model in `folder`; an empty one where there is none."""
    path = folder / CARD
    if not path.is_file():
        return ModelCard({})
    with open(path, "rb") as stream:
        raw = stream.read(MOST_BYTES)
    try:
        values = _front_matter(raw.decode("utf-8-sig", errors="replace"))
    except ValueError as error:
        return ModelCard(
            {}, problem=f"the front matter of {CARD} cannot be read ({error}), so the file names no licence"
        )
    licenses = {key: ",".join(_texts(values, key)) for key in _LICENSE}
    return ModelCard(
        {key: text for key, text in licenses.items() if text},
        _texts(values, "base_model", "base_models"),
        _texts(values, "tags", "pipeline_tag"),
        _texts(values, "language", "languages"),
    )


def _front_matter(text: str) -> dict[str, Any]:
    """The YAML between the first line `---` and the next one; every scalar stays text. Raises ValueError."""
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    ends = [index for index, line in enumerate(lines) if index and line.rstrip() == "---"]
    if not ends:
        raise ValueError("it has no end")
    import yaml

    try:  # tabs stand in cards of the hub, though YAML forbids them; gguf-py reads them as spaces too
        values = yaml.load("\n".join(lines[1 : ends[0]]).replace("\t", "  "), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return values if isinstance(values, dict) else {}


def _texts(values: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """All texts under these keys, each a text or a list of texts; in order, each once."""
    found: list[Any] = []
    for key in keys:
        value = values.get(key, [])
        found += value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(text.strip() for text in found if isinstance(text, str) and text.strip()))


def _base_model(text: str) -> dict[str, str]:
    """`Qwen/Qwen3-0.6B` or its address on the hub -> name, organization, repo_url; another address as it is."""
    if "://" in text and not text.startswith(HUB):
        return {"repo_url": text}
    organization, slash, name = text.removeprefix(HUB).strip("/").partition("/")
    if not slash:
        return {"name": text}
    words = re.sub(r"[-\s]+", " ", name).split()
    return {
        "name": " ".join(word[0].upper() + word[1:] for word in words),
        "organization": organization,
        "repo_url": f"{HUB}{organization}/{name}",
    }
