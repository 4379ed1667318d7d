"""The README against the program: its table of schemes, its commands, its options and its files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from signround.cli.main import app
from signround.formats import scheme_names
from signround.inspection import scheme_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FORMATS = ("gguf", "gptq", "onnx")


def expanded(cell: str) -> list[str]:
    """`w2g{16,c}` and `-asym` -> w2g16, w2gc, w2g16-asym, w2gc-asym."""
    names: list[str] = []
    for pattern in re.findall(r"`([^`]+)`", cell):
        if pattern == "-asym":
            names += [name + pattern for name in names]
            continue
        head, _, rest = pattern.partition("{")
        inner, _, tail = rest.partition("}")
        names += [head + choice + tail for choice in inner.split(",")] if rest else [pattern]
    return names


def rows() -> list[list[str]]:
    table = README.split("| scheme | bits a weight |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_scheme_stands_in_the_table_once() -> None:
    assert sorted(name for row in rows() for name in expanded(row[0])) == sorted(scheme_names())


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_the_row_is_what_signround_schemes_prints(row: list[str]) -> None:
    printed = {entry["scheme"]: entry for entry in scheme_table() if entry["kind"] == "grid"}
    entries = [printed[name] for name in expanded(row[0])]
    held = [name for name, cell in zip(FORMATS, row[2:], strict=True) if cell]
    assert all(entry["formats"] == held for entry in entries)
    bits = [entry["bits_per_weight"] for entry in entries]
    numbers = [float(number) for number in re.findall(r"[\d.]+", row[1])]
    assert (min(numbers), max(numbers)) == pytest.approx((min(bits), max(bits)), abs=0.0051)


def test_commands_are_those_of_the_program() -> None:
    known = {command.callback.__name__ for command in app.registered_commands if command.callback}
    named = set(re.findall(r"signround ([a-z]+) [A-Z.]", README)) | {"schemes"}
    assert named == known


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").iterdir()))])
def test_files_that_texts_point_to_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    paths = re.findall(r"`((?:docs|examples|benchmarks|tests|runtime_tests|exporters|signround)/[\w./-]+)`", text)
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing
