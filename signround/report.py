"""The report of a job: report.json (schema 1, a contract), and the same for a reader in report.md and report.html.

Fields may be added to the schema, never renamed. Times and memory are measurements; everything else is determined by
the job.
"""

from __future__ import annotations

import html
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from signround.artifact import QuantizedCheckpoint
from signround.experts import unit_of
from signround.exporting import ExportedModel
from signround.files import sha256_of, write_json, written_whole
from signround.parity import Gate, LogitParity, Parity
from signround.runtimes.protocol import Speed

SCHEMA_VERSION = 1
MANY_NAMES = 12  # more layers than this are counted in a table, not named
REPORT_FILES = ("report.md", "report.html", "report.json")
PACKAGES = (
    "signround", "torch", "transformers", "gguf", "onnx-ir", "onnxruntime", "onnxruntime-genai", "xllamacpp",
    "llama-cpp-python", "gptqmodel", "optimum",
)  # fmt: skip


@dataclass(frozen=True)
class Perplexities:
    """Of the float, rounded and tuned model on one text; `tokens` are the scored ones; `peak_rss_bytes` of the runs."""

    text: str
    tokens: int
    float_model: float
    rounded: float
    tuned: float
    peak_rss_bytes: int = 0

    @property
    def gap_closed(self) -> float:
        """Part of the gap between rounding and float that tuning closed; 0 without a gap."""
        gap = self.rounded - self.float_model
        return (self.rounded - self.tuned) / gap if gap > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "tokens": self.tokens,
            "float": self.float_model,
            "rounded": self.rounded,
            "tuned": self.tuned,
            "gap_closed": self.gap_closed,
            "peak_rss_bytes": self.peak_rss_bytes,
        }


@dataclass(frozen=True)
class ExportResult:
    """One written format with its verdict, and what writing it took. `verify_peak_rss_bytes` is of this process:
    onnxruntime runs in it and holds the whole file, llama.cpp and the GPTQ loader have processes of their own.
    `options`: those that are not the defaults, as `--set` takes them, asked for or fallen back to."""

    exported: ExportedModel
    parity: Parity
    seconds: float
    peak_rss_bytes: int
    verify_peak_rss_bytes: int = 0
    options: str = ""


def build_report(
    artifact: QuantizedCheckpoint,
    job: str,
    model_path: str,
    perplexities: Perplexities | None,
    exports: Sequence[ExportResult],
    out: Path,
) -> dict[str, Any]:
    """report.json as a dict; paths are relative to `out`. `job` is the fingerprint of the whole request."""
    plan = artifact.plan
    records = artifact.records()
    return {
        "schema_version": SCHEMA_VERSION,
        "job": job,
        "model": {
            "path": model_path,
            "sha256": plan.source_sha256,
            "architecture": plan.architecture.family.hf_class,
            "parameters": plan.parameters,
        },
        "scheme": plan.scheme,
        "recipe": plan.tuning.to_json(),
        "calibration": artifact.manifest["calibration"],
        "artifact": {"fingerprint": artifact.fingerprint, "bits_per_weight": plan.bits_per_weight()},
        "tuning": {
            "seconds": sum(record.seconds for record in records),
            "peak_rss_bytes": max(record.peak_rss_bytes for record in records),
            "peak_device_bytes": max(record.peak_device_bytes for record in records),
            "blocks": [
                {
                    "index": record.index,
                    "seconds": record.seconds,
                    "loss_rounded": record.loss_rounded,
                    "loss_tuned": record.loss_tuned,
                    "kept": record.kept,
                    "expert_tokens": record.expert_tokens,
                }
                for record in records
            ],
        },
        "perplexity": perplexities.to_json() if perplexities else None,
        "exports": {result.exported.format: _export_json(artifact, result, out) for result in exports},
        "skipped": dict(plan.skipped),
        "versions": _versions(),
    }


def _export_json(artifact: QuantizedCheckpoint, result: ExportResult, out: Path) -> dict[str, Any]:
    files = [
        {"path": str(path.relative_to(out)), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in result.exported.files
    ]
    size = sum(path.stat().st_size for path in result.exported.files if path.suffix not in (".json", ".jinja", ".txt"))
    return {
        "target": str(result.exported.target.relative_to(out)),
        "options": result.options,
        "files": files,
        "bytes": sum(path.stat().st_size for path in result.exported.files),
        "bits_per_weight": 8 * size / artifact.plan.parameters,
        "seconds": result.seconds,
        "peak_rss_bytes": result.peak_rss_bytes,
        "verify_peak_rss_bytes": result.verify_peak_rss_bytes,
        "perplexity": result.parity.logits.score.perplexity if result.parity.logits else None,
        **parity_json(result.parity),
    }


def parity_json(parity: Parity) -> dict[str, Any]:
    """The verdict on one exported model, as in report.json and as `signround verify --json` prints it."""
    weights = parity.weights
    return {
        "weights": {
            "reader": weights.reader,
            "tensors": weights.tensors,
            "exact": weights.exact,
            # a missing or misshapen tensor differs without bound, and JSON has no infinity
            "worst_abs_difference": worst if math.isfinite(worst := weights.worst_abs_difference) else None,
            "missing": list(weights.missing),
            "different": list(weights.different),
            "passed": weights.passed,
        },
        "logits": _logits_json(parity.logits),
        "exact_logits": _logits_json(parity.exact_logits),
        "problems": list(parity.problems),
        "speed": _speed_json(parity.logits.speed) if parity.logits else None,
        "passed": parity.passed,
    }


def parity_lines(parity: Parity) -> list[str]:
    """The verdict for a person."""
    weights = parity.weights
    lines = [f"weights: {weights.exact} of {weights.tensors} tensors exact ({weights.reader} reader)"]
    lines += [f"  {name} is missing in the file" for name in weights.missing]
    lines += [f"  {name} differs (worst difference {weights.worst_abs_difference:.3g})" for name in weights.different]
    for label, run in (("logits", parity.logits), ("logits without activation rounding", parity.exact_logits)):
        if run is not None:
            lines.append(
                f"{label}: {run.runtime}, {run.tokens:,} positions: mean KL {run.score.mean_kl:.2e}, top-1 "
                f"{run.score.top1_agreement:.2%}, relative error {run.score.relative_error:.2e}: " + _verdict_text(run)
            )
    lines += [f"problem: {problem}" for problem in parity.problems]
    speed = parity.logits.speed if parity.logits else None
    if speed is not None:
        lines.append(
            f"speed: {speed.prefill_tokens_per_second:,.0f} tokens a second of a prompt of {speed.prompt}, "
            f"{speed.decode_tokens_per_second:,.1f} of {speed.new} new ones (one noisy measurement, no gate)"
        )
    return [*lines, "passed" if parity.passed else "FAILED"]


def _verdict_text(run: LogitParity) -> str:
    if not run.passed:
        return f"FAILED, the gate is {_gate_text(_bounds(run.gate))}"
    return "passed" if run.reached_aim or run.aim is None else _missed_aim(_bounds(run.aim))


def _missed_aim(bounds: Mapping[str, float]) -> str:
    """Why a file passed that is farther from the tuned model than others may be: `parity.INT8_PRODUCTS`."""
    return f"passed, {_gate_text(bounds)} was aimed at"


def _gate_text(bounds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {bound:g}" for name, bound in bounds.items())


def _bounds(gate: Gate) -> dict[str, float]:
    return {name: bound for name, bound in vars(gate).items() if bound is not None}


def _logits_json(run: LogitParity | None) -> dict[str, Any] | None:
    if run is None:
        return None
    return {
        "runtime": run.runtime,
        "tokens": run.tokens,
        "mean_kl": run.score.mean_kl,
        "median_kl": run.score.median_kl,
        "top1_agreement": run.score.top1_agreement,
        "max_abs_difference": run.score.max_abs_difference,
        "relative_error": run.score.relative_error,
        "perplexity": run.score.perplexity,
        "tuned_perplexity": run.tuned_perplexity,
        "gate": _bounds(run.gate),
        "passed": run.passed,
        "aim": None if run.aim is None else _bounds(run.aim),
        "reached_aim": run.reached_aim,
    }


def _speed_json(speed: Speed | None) -> dict[str, Any] | None:
    """None where nobody runs the format for speed in the runtime at hand, or it could not be measured."""
    return dict(vars(speed)) if speed is not None else None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def failed(report: Mapping[str, Any]) -> list[str]:
    """The formats that missed a gate."""
    return [name for name, export in report["exports"].items() if not export["passed"]]


def passed(report: Mapping[str, Any]) -> bool:
    """Whether every gate of every export passed."""
    return not failed(report)


COLUMNS = ("format", "size", "bits/weight", "perplexity in the runtime", "tuned, same tokens", "mean KL", "top-1",
           "exact tensors", "prefill / decode tokens/s", "verdict")  # fmt: skip


def table_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a format, in the order of COLUMNS, as text: what the CLI, report.md and report.html show."""
    rows: list[tuple[str, ...]] = []
    for name, export in report["exports"].items():
        run = export["logits"] or export["exact_logits"]
        weights = export["weights"]
        measured = (
            (_figure(run["perplexity"], ".3f"), _figure(run["tuned_perplexity"], ".3f"),
             _figure(run["mean_kl"], ".1e"), _figure(run["top1_agreement"], ".1%"))
            if run
            else ("not run",) * 4
        )  # fmt: skip
        rows.append(
            (
                name,
                f"{export['bytes'] / 1e6:.1f} MB",
                f"{export['bits_per_weight']:.2f}",
                *measured,
                f"{weights['exact']}/{weights['tensors']}",
                _speed_cell(export.get("speed")),  # reports from before this field are shown too
                _verdict_cell(export),
            )
        )
    return rows


def _figure(value: float | None, form: str) -> str:
    """None: what was no number, or an infinite one, as report.json holds it."""
    return "not finite" if value is None or not math.isfinite(value) else format(value, form)


def _verdict_cell(export: Mapping[str, Any]) -> str:
    if not export["passed"]:
        return "FAILED"
    run = export["logits"]
    if run is None or run.get("reached_aim", True):  # reports from before this field are shown too
        return "passed"
    return _missed_aim(run["aim"])


def _speed_cell(speed: Mapping[str, float] | None) -> str:
    if speed is None:
        return "not timed"
    return f"{_rate(speed['prefill_tokens_per_second'])} / {_rate(speed['decode_tokens_per_second'])}"


def _rate(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 10 else f"{tokens:.1f}"


def _only_rounded(report: Mapping[str, Any]) -> bool:
    return bool(report["recipe"]["method"] == "rtn")


def form_lines(report: Mapping[str, Any]) -> list[str]:
    """What stands below the table: the formats whose form is not the default one (reports of before have no word)."""
    exports = report["exports"].items()
    return [f"{name} was written with {options}" for name, export in exports if (options := export.get("options"))]


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """What stands above the table: model, scheme, perplexities, tuning."""
    model, tuning = report["model"], report["tuning"]
    did = "rounded to nearest, nothing tuned; calibrated" if _only_rounded(report) else "tuned with {method}"
    lines = [
        f"{model['architecture']}, {model['parameters'] / 1e6:.1f} M parameters, scheme {report['scheme']} "
        f"({report['artifact']['bits_per_weight']:.2f} bits a weight in the tuned linears)",
        f"{did.format(method=report['recipe']['method'])} on {report['calibration']['tokens']:,} tokens "
        f"({report['calibration']['source']}) in {tuning['seconds']:.0f} s, peak memory "
        f"{tuning['peak_rss_bytes'] / 1e9:.2f} GB",
    ]
    perplexity = report["perplexity"]
    if perplexity:
        tuned = f", tuned {perplexity['tuned']:.3f} ({perplexity['gap_closed']:.0%} of the gap closed)"
        lines.append(
            f"perplexity on {perplexity['tokens']:,} tokens of {perplexity['text']}: float {perplexity['float']:.3f}, "
            f"rounded {perplexity['rounded']:.3f}" + ("" if _only_rounded(report) else tuned)
        )
    return lines


BLOCKS = "\n## Blocks\n\nLosses on the held-out samples: {}.\n\n| block | rounded | tuned | kept | seconds |\n"
RULE = "| --- | --- | --- | --- | --- |\n"


def markdown(report: Mapping[str, Any]) -> str:
    """report.md."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *table_rows(report)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    blocks = "\n".join(
        f"| {block['index']} | {block['loss_rounded']:.3e} | {block['loss_tuned']:.3e} | {_kept_text(block['kept'])} |"
        f" {block['seconds']:.1f} |"
        for block in report["tuning"]["blocks"]
    )
    files = "\n".join(
        f"| {file['path']} | {file['bytes']:,} | `{file['sha256'][:16]}` |"
        for export in report["exports"].values()
        for file in export["files"]
    )
    return (
        "# signround report\n\n"
        + "\n".join(f"- {line}" for line in summary_lines(report))
        + f"\n\n## Files against the tuned model\n\n{table}\n"
        + "".join(f"\n{line}\n" for line in form_lines(report))
        + ("" if _only_rounded(report) else BLOCKS.format(_loss_text(report["recipe"])) + RULE + blocks + "\n")
        + _experts_section(report["tuning"]["blocks"])
        + f"\n## Written\n\n| file | bytes | sha256 |\n| --- | --- | --- |\n{files}\n"
    )


def _loss_text(recipe: Mapping[str, Any]) -> str:
    if not recipe.get("lookahead"):
        return "mean squared errors of the block's output"
    return (
        "relative squared errors of the block's output, plus those behind the next block (behind the last one: the "
        "mean KL divergence of the next-token distributions)"
    )


def _kept_text(kept: Mapping[str, str]) -> str:
    """What was not tuned: by name, an expert once for its three linears; only counted where the names would be many."""
    others = {unit_of(name).removesuffix(".weight"): choice for name, choice in kept.items() if choice != "tuned"}
    if len(others) > MANY_NAMES:
        units = len({unit_of(name) for name in kept})
        words = Counter(choice.partition(" ")[0] for choice in others.values())
        return ", ".join(f"{count} of {units} {word}" for word, count in words.items())
    return ", ".join(f"{name}: {choice}" for name, choice in others.items()) or "all tuned"


def _experts_section(blocks: Sequence[Mapping[str, Any]]) -> str:
    """How many calibration tokens the router gave to the experts of each block; nothing for other models."""
    rows = []
    for block in blocks:
        tokens = list(block.get("expert_tokens", {}).values())
        if tokens:
            short = len({unit_of(name) for name, choice in block["kept"].items() if choice.endswith("tokens)")})
            rows.append(
                f"| {block['index']} | {len(tokens)} | {min(tokens)} | {statistics.median(tokens):.0f} | {short} |"
            )
    if not rows:
        return ""
    head = (
        "| block | experts | fewest tokens | median | rounded for want of tokens |\n| --- | --- | --- | --- | --- |\n"
    )
    return "\n## Experts\n\nCalibration tokens that the router sent to each expert.\n\n" + head + "\n".join(rows) + "\n"


def web_page(report: Mapping[str, Any]) -> str:
    """report.html: the same, self-contained, with a bar a block (tuned loss over rounded loss)."""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in summary_lines(report))
    head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table_rows(report)
    )
    forms = "".join(f"<p>{html.escape(line)}</p>" for line in form_lines(report))
    rows = "".join(_bar(block) for block in report["tuning"]["blocks"])
    bars = "" if _only_rounded(report) else f"<h2>Loss of each block, tuned over rounded</h2><table>{rows}</table>"
    style = (
        "body{font:15px/1.5 system-ui;margin:2em auto;max-width:70em;padding:0 1em}"
        "table{border-collapse:collapse}td,th{border-bottom:1px solid #ccc;padding:.3em .8em;text-align:left}"
        ".bar{background:#e4e7ee;width:24em;display:inline-block}.bar span{background:#3b6fb6;display:block;height:1em}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>signround report</title><style>{style}</style>'
        f"<h1>signround report</h1><ul>{items}</ul><h2>Files against the tuned model</h2>"
        f"<table><tr>{head}</tr>{body}</table>{forms}{bars}</html>\n"
    )


def _bar(block: Mapping[str, Any]) -> str:
    ratio = block["loss_tuned"] / block["loss_rounded"] if block["loss_rounded"] else 1.0
    return (
        f"<tr><td>block {block['index']}</td>"
        f'<td><div class="bar"><span style="width:{min(ratio, 1.0):.1%}"></span></div></td><td>{ratio:.2f}</td></tr>'
    )


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """report.json, report.md and report.html in `out`, each whole or absent; the JSON last: it marks completion."""
    for name, text in (("report.md", markdown(report)), ("report.html", web_page(report))):
        with written_whole(out / name) as temporary:
            temporary.write_text(text)
    write_json(out / "report.json", report)
