"""make_exporters: names, options and their types. The plug-ins here are made up; the real ones have their own tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from signround import exporting
from signround.errors import RefusedError
from signround.exporting import Exporter, available_exporters, make_exporters


@dataclass(frozen=True)
class PlainExporter:
    """As much of an exporter as option parsing needs."""

    flavour: str = "vanilla"
    level: int = 4
    share: float = 0.5
    tidy: bool = False


@dataclass(frozen=True)
class BareExporter:
    """No options."""


class FakeEntryPoint:
    def __init__(self, kind: type[Any]) -> None:
        self.kind = kind
        self.loaded = 0

    def load(self) -> type[Any]:
        self.loaded += 1
        return self.kind


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeEntryPoint]:
    entries = {"bare": FakeEntryPoint(BareExporter), "plain": FakeEntryPoint(PlainExporter)}
    monkeypatch.setattr(exporting, "available_exporters", lambda: entries)
    return entries


@pytest.mark.usefixtures("entries")
def test_defaults_order_and_repeats() -> None:
    assert make_exporters(["plain", "bare", "plain"]) == [PlainExporter(), BareExporter()]
    assert make_exporters([]) == []


def test_only_what_is_asked_for_is_loaded(entries: dict[str, FakeEntryPoint]) -> None:
    make_exporters(["bare"])
    assert (entries["bare"].loaded, entries["plain"].loaded) == (1, 0)


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({"flavour": "mint"}, PlainExporter(flavour="mint")),
        ({"level": "0"}, PlainExporter(level=0)),
        ({"share": "1e-3"}, PlainExporter(share=1e-3)),
        ({"tidy": "true"}, PlainExporter(tidy=True)),
        ({"tidy": "False"}, PlainExporter()),
        ({"level": "-1", "flavour": ""}, PlainExporter(flavour="", level=-1)),
    ],
)
def test_options_take_the_type_of_their_default(text: dict[str, str], expected: PlainExporter) -> None:
    assert make_exporters(["plain"], {"plain": text}) == [expected]


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize(
    ("names", "options", "fragment"),
    [
        (["pdf"], {}, "format 'pdf' is not known; installed are bare, plain"),
        (["bare"], {"pdf": {}}, "format 'pdf' is not known"),
        (["bare"], {"plain": {"level": "1"}}, "plain is not exported"),
        (["plain"], {"plain": {"colour": "red"}}, "no option 'colour'; its options are: flavour, level, share, tidy"),
        (["bare"], {"bare": {"level": "1"}}, "its options are: none"),
        (["plain"], {"plain": {"level": "many"}}, "plain.level needs a whole number, got 'many'"),
        (["plain"], {"plain": {"level": "1.5"}}, "plain.level needs a whole number"),
        (["plain"], {"plain": {"share": "half"}}, "plain.share needs a number"),
        (["plain"], {"plain": {"tidy": "1"}}, "plain.tidy needs true or false"),
        (["plain"], {"plain": {"tidy": ""}}, "plain.tidy needs true or false"),
    ],
)
def test_refusals(names: list[str], options: dict[str, dict[str, str]], fragment: str) -> None:
    with pytest.raises(RefusedError, match=fragment) as caught:
        make_exporters(names, options)
    assert caught.value.refusals[0].subject in ("--to", "--set")


def test_the_installed_exporters_are_listed_in_order_without_being_loaded() -> None:
    assert [name for name in available_exporters() if name in ("gguf", "gptq", "onnx")] == ["gguf", "gptq", "onnx"]


@pytest.mark.parametrize("name", ["gguf", "gptq", "onnx"])
def test_the_exporters_of_this_repository_fit_the_contract(name: str) -> None:
    (exporter,) = make_exporters([name])
    assert isinstance(exporter, Exporter)
    assert exporter.name == name
    assert exporter.zero_floor in (0, 1)
