"""The report: schema 1 with its figures in the right places, and the same for a reader."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from signround.artifact import QuantizedCheckpoint
from signround.evaluate import Score
from signround.exporting import ExportedModel
from signround.files import sha256_of
from signround.parity import Gate, LogitParity, Parity, WeightParity
from signround.report import (
    COLUMNS,
    REPORT_FILES,
    ExportResult,
    Perplexities,
    build_report,
    markdown,
    parity_lines,
    passed,
    summary_lines,
    table_rows,
    web_page,
    write_report,
)
from signround.runtimes.protocol import Speed
from tests.small_artifacts import write_rounded_artifact


def verdict(*, good: bool = True) -> Parity:
    figures = Score(12.5, 99, 100, 2.5e-4, 0.991, 0.25, 1e-3, 12.25)
    run = LogitParity("some runtime <1.0>", 100, figures, 12.25, Gate(mean_kl=1e-3), good, Speed(500.0, 40.0, 128, 16))
    weights = WeightParity("independent", 20, 20 if good else 19, 0.0, (), () if good else ("a.b.weight",))
    return Parity(weights, run, None)


@pytest.fixture(scope="module")
def artifact(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """Its own: the manifest gets a calibration, as every finished job's has."""
    found = write_rounded_artifact(llama_folder, tmp_path_factory.mktemp("artifact") / "w4g32", "w4g32")
    found.manifest["calibration"] = {"source": "text.txt", "tokens": 64, "sha256": "ab"}
    return found


def report_of(
    artifact: QuantizedCheckpoint, out: Path, *, good: bool = True, parity: Parity | None = None
) -> dict[str, Any]:
    target = out / "gguf" / "model.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(bytes(1000))
    exported = ExportedModel("gguf", target, (target,))
    results = [ExportResult(exported, parity or verdict(good=good), 1.5, 12345)]
    return build_report(artifact, "job", "/models/small", Perplexities("t", 99, 10.0, 20.0, 12.0), results, out)


def test_figures_are_where_the_schema_says(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    report = report_of(artifact, tmp_path)
    assert report["schema_version"] == 1
    assert report["model"]["architecture"] == "LlamaForCausalLM"
    assert report["model"]["parameters"] == artifact.plan.parameters
    assert report["calibration"] == {"source": "text.txt", "tokens": 64, "sha256": "ab"}
    assert [block["index"] for block in report["tuning"]["blocks"]] == [0, 1]
    assert {key: report["perplexity"][key] for key in ("float", "rounded", "tuned", "tokens")} == {
        "float": 10.0, "rounded": 20.0, "tuned": 12.0, "tokens": 99,
    }  # fmt: skip
    assert report["perplexity"]["gap_closed"] == pytest.approx(0.8)
    export = report["exports"]["gguf"]
    assert export["files"] == [
        {"path": "gguf/model.gguf", "bytes": 1000, "sha256": sha256_of(tmp_path / "gguf/model.gguf")}
    ]
    assert export["bits_per_weight"] == pytest.approx(8000 / artifact.plan.parameters)
    assert export["weights"]["exact"] == export["weights"]["tensors"] == 20
    assert export["logits"]["mean_kl"] == 2.5e-4
    assert export["logits"]["gate"] == {"mean_kl": 1e-3}
    assert export["speed"]["decode_tokens_per_second"] == 40.0
    assert export["perplexity"] == 12.5
    assert report["versions"].keys() >= {"torch", "transformers"}
    assert passed(report)
    assert json.loads(json.dumps(report)) == report


def test_a_failed_gate_is_failed_everywhere(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    report = report_of(artifact, tmp_path, good=False)
    assert not passed(report)
    assert table_rows(report)[0][-1] == "FAILED"
    assert "FAILED" in markdown(report)
    assert "FAILED" in web_page(report)
    lines = parity_lines(verdict(good=False))
    assert lines[-1] == "FAILED"
    assert any("a.b.weight differs" in line for line in lines)
    assert parity_lines(verdict())[-1] == "passed"


def test_a_missed_aim_is_told_everywhere(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    """Passed by a wider gate than others: whoever reads the report sees it, and what was aimed at."""
    passing = verdict()
    assert passing.logits is not None
    wide = replace(passing.logits, aim=Gate(mean_kl=1e-4), gate=Gate(mean_kl=2e-3))
    report = report_of(artifact, tmp_path, parity=replace(passing, logits=wide))
    logits = report["exports"]["gguf"]["logits"]
    assert (logits["gate"], logits["aim"], logits["reached_aim"]) == ({"mean_kl": 2e-3}, {"mean_kl": 1e-4}, False)
    assert passed(report)
    told = "passed, mean_kl 0.0001 was aimed at"
    assert table_rows(report)[0][-1] == told
    assert told in markdown(report)
    assert told in web_page(report)
    assert any(line.endswith(told) for line in parity_lines(replace(passing, logits=wide)))
    reached = replace(passing, logits=replace(wide, aim=Gate(mean_kl=1e-3)))
    assert not any("aimed" in line for line in parity_lines(reached))


@pytest.mark.parametrize(("lookahead", "words"), [(0, "mean squared errors"), (1, "behind the next block")])
def test_the_report_says_which_losses_it_shows(
    artifact: QuantizedCheckpoint, tmp_path: Path, lookahead: int, words: str
) -> None:
    report = report_of(artifact, tmp_path)
    report["recipe"] |= {"method": "signround", "lookahead": lookahead}
    assert words in markdown(report)


def test_a_gap_that_is_none_is_not_closed() -> None:
    assert Perplexities("t", 9, 10.0, 10.0, 9.9).gap_closed == 0.0
    assert Perplexities("t", 9, 10.0, 12.0, 13.0).gap_closed == pytest.approx(-0.5)


class Tables(HTMLParser):
    """Cells by row, and a complaint about tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_all_views_show_the_same(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    report = report_of(artifact, tmp_path)
    report["recipe"]["method"] = "signround"
    report["exports"]["<odd> & name"] = report["exports"]["gguf"]  # names are escaped
    (row, _) = table_rows(report)
    assert len(row) == len(COLUMNS)
    assert "| " + " | ".join(row) + " |" in markdown(report)
    page = Tables()
    page.feed(web_page(report))
    assert page.open == []
    assert page.rows[0] == [*COLUMNS]
    assert page.rows[1] == [*row]
    assert page.rows[2][0] == "<odd> & name"
    for line in summary_lines(report):
        assert line in markdown(report)
    assert any(
        "float 10.000, rounded 20.000, tuned 12.000 (80% of the gap closed)" in line for line in summary_lines(report)
    )


def test_what_is_not_the_default_form_is_told(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    report = report_of(artifact, tmp_path)
    assert report["exports"]["gguf"]["options"] == ""
    assert "was written with" not in markdown(report)
    report["exports"]["gguf"]["options"] = "gguf.pre=<x>"
    assert "gguf was written with gguf.pre=<x>" in markdown(report)
    assert "gguf was written with gguf.pre=&lt;x&gt;" in web_page(report)
    del report["exports"]["gguf"]["options"]  # a report of an earlier version
    assert markdown(report)


def test_figures_that_are_not_finite(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    """A damaged file has them, JSON does not; the report is shown from memory, and from its file when run again."""
    report = report_of(artifact, tmp_path)
    report["exports"]["gguf"]["logits"] |= {"mean_kl": float("nan"), "perplexity": float("inf")}
    write_report(report, tmp_path)

    def strict(name: str) -> None:
        raise AssertionError(name)

    again = json.loads((tmp_path / "report.json").read_text(), parse_constant=strict)
    assert again["exports"]["gguf"]["logits"]["mean_kl"] is None
    assert table_rows(report) == table_rows(again)
    assert table_rows(again)[0].count("not finite") == 2


def test_rounding_is_not_called_tuning(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    report = report_of(artifact, tmp_path)
    for method, tuned in (("signround", True), ("rtn", False)):
        report["recipe"]["method"] = method
        lines = "\n".join(summary_lines(report))
        assert ("tuned with" in lines, "tuned 12.000" in lines) == (tuned, tuned)
        assert ("nothing tuned" in lines) is not tuned
        assert ("## Blocks" in markdown(report)) is tuned  # rounding measures no losses
        assert ("Loss of each block" in web_page(report)) is tuned


def test_without_exports_or_runtime(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    report = build_report(artifact, "job", "m", None, [], tmp_path)
    assert report["perplexity"] is None
    assert passed(report)
    assert markdown(report)
    assert web_page(report)
    report = report_of(artifact, tmp_path)
    report["exports"]["gguf"] |= {"logits": None, "speed": None}
    assert "not run" in table_rows(report)[0]


def test_three_files_are_written(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    report = report_of(artifact, tmp_path)
    write_report(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == set(REPORT_FILES)
    assert json.loads((tmp_path / "report.json").read_text()) == report
