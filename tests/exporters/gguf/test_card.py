"""Model cards of every temper become metadata, or a note, and never an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporters.gguf.card import read_card

CARD = """---
license: apache-2.0
license_link: https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/LICENSE
pipeline_tag: text-generation
base_model:
- Qwen/Qwen3-0.6B-Base
- https://huggingface.co/HuggingFaceTB/SmolLM2-135M
- https://example.org/models/x
- plain
language: [en, no, 2024-01-01]
tags:
- chat
- text-generation
datasets: {a: b}
---
# Qwen3
license: mit
"""


def values(folder: Path, text: str) -> dict[str, Any]:
    (folder / "README.md").write_text(text, encoding="utf-8")
    card = read_card(folder)
    assert card.problem == ""
    return {entry.key: entry.value for entry in card.entries()}


def test_a_card_of_the_hub(tmp_path: Path) -> None:
    found = values(tmp_path, CARD)
    assert found == {
        "general.license": "apache-2.0",
        "general.license.link": "https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/LICENSE",
        "general.base_model.count": 4,
        "general.base_model.0.name": "Qwen3 0.6B Base",
        "general.base_model.0.organization": "Qwen",
        "general.base_model.0.repo_url": "https://huggingface.co/Qwen/Qwen3-0.6B-Base",
        "general.base_model.1.name": "SmolLM2 135M",
        "general.base_model.1.organization": "HuggingFaceTB",
        "general.base_model.1.repo_url": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M",
        "general.base_model.2.repo_url": "https://example.org/models/x",
        "general.base_model.3.name": "plain",
        "general.tags": ["chat", "text-generation"],
        "general.languages": ["en", "no", "2024-01-01"],
    }


def test_the_keys_are_those_of_gguf_py(tmp_path: Path) -> None:
    """gguf-py, which llama.cpp's converter asks, finds the same in the same card."""
    from gguf.constants import Keys
    from gguf.metadata import Metadata

    found = values(tmp_path, CARD.replace(", 2024-01-01", "").replace(", no", ""))
    theirs = Metadata.load(None, tmp_path, None, 600_000_000)
    assert found[Keys.General.LICENSE] == theirs.license
    assert found[Keys.General.LICENSE_LINK] == theirs.license_link
    assert found[Keys.General.LANGUAGES] == theirs.languages
    assert found[Keys.General.TAGS] == list(dict.fromkeys(theirs.tags))  # it gives a pipeline_tag twice
    for index, base in enumerate(theirs.base_models[:3]):
        for key in ("name", "organization", "repo_url"):
            wanted = getattr(Keys.General, f"BASE_MODEL_{key.upper()}").format(id=index)
            assert found.get(wanted) == base.get(key)


@pytest.mark.parametrize(
    "text",
    ["", "# No front matter\nlicense: mit\n", "---\n---\n", "---\n- a\n- b\n---\n", "---\njust text\n---\n"],
)
def test_cards_that_say_nothing(text: str, tmp_path: Path) -> None:
    assert read_card(tmp_path).entries() == []
    assert values(tmp_path, text) == {}


def test_odd_values_are_left_out(tmp_path: Path) -> None:
    lines = [
        "license:",
        "- mit",
        "- other",
        "license_name: ''",
        "base_model: {a: b}",
        "tags: [x, [y], {z: 1}]",
        "language:",
    ]
    assert values(tmp_path, "\n".join(["---", *lines, "---", ""])) == {
        "general.license": "mit,other",
        "general.tags": ["x"],
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("---\nlicense: mit\n", "it has no end"),
        ("---\nlicense: [mit\n---\n", "while parsing a flow sequence"),
        ("---\na: &a [x]\nb: *c\n---\n", "undefined alias"),
        ("---\n" + "[" * 20000 + "\n---\n", "nested too deeply"),
        ("---\na: !!python/object/apply:os.system ['true']\nb: [\n---\n", "while parsing"),
    ],
)
def test_broken_cards_are_a_note(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    card = read_card(tmp_path)
    assert card.entries() == []
    assert problem in card.problem


def test_nothing_in_a_card_is_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    text = f"---\nlicense: !!python/object/apply:os.system ['touch {marker}']\ntags: [a]\n---\n"
    found = values(tmp_path, text)
    assert found["general.tags"] == ["a"]
    assert not marker.exists()


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\ntags: [\xff\xfe]\n---\n" + bytes(range(256)))
    assert read_card(tmp_path).license == {"license": "mit"}
