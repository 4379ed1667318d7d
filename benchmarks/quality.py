"""Float, rounded and tuned perplexity of one model, for schemes, methods and calibrations: one table.

    python benchmarks/quality.py MODEL --calibration calibration.txt --calibration self --text eval.txt \\
        --text wikitext2-valid.txt --scheme w2g64 --scheme w4g32 --method signround --method signround-400 \\
        --method rtn --samples 128 --seqlen 512 --iters 200 --device cuda

"gap closed" is the part of the perplexity gap between rounding (to nearest, same grid) and float that tuning closes.
Texts are cut into windows of `--context` tokens, the whole files; the first token of each window is not scored.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from signround.artifact import TOKENS
from signround.calibration import CalibrationTokens, read_tokens
from signround.evaluate import score, text_windows
from signround.pipeline import Job, prepare, tune
from signround.runtimes.protocol import Runtime
from signround.runtimes.torch_blocks import float_model, rounded_model, tuned_model


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, action="append", help="default: calibration text that no tuning sees")
    parser.add_argument("--scheme", action="append", required=True)
    parser.add_argument("--method", action="append", help="default: signround")
    parser.add_argument("--calibration", action="append", help="a text file or self (the default); may be repeated")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--iters", type=int, help="for --method signround; default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lookahead", type=int, choices=(0, 1), help="0: the paper's loss; default: the recipe's")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser.parse_args()


class Table:
    """Runs the rows and remembers what they share: texts, baselines, calibration windows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.texts = {text.name: text_windows(options.model, text, options.context) for text in options.text or []}
        self.float: dict[str, float] = {}
        self.rounded: dict[str, dict[str, float]] = {}
        self.tokens: dict[str, CalibrationTokens] = {}

    def row(self, scheme: str, method: str, calibration: str) -> dict[str, Any]:
        """Tune and measure once."""
        with tempfile.TemporaryDirectory() as folder:
            job = self._job(scheme, method, calibration, Path(folder))
            started = time.monotonic()
            artifact = tune(job)
            seconds = time.monotonic() - started
            self.tokens[calibration] = read_tokens(artifact.folder / TOKENS) or self.tokens[calibration]
            if not self.texts:
                self.texts = {"unseen calibration text": self.tokens[calibration].evaluation}
            tuned = self._perplexities(tuned_model(artifact, self.options.device))
        self._baselines(job)
        rounded = self.rounded[scheme]
        closed = {name: (rounded[name] - tuned[name]) / (rounded[name] - self.float[name]) for name in tuned}
        return {
            "scheme": scheme,
            "method": method,
            "calibration": Path(calibration).name,
            "seconds": seconds,
            "float": self.float,
            "rounded": rounded,
            "tuned": tuned,
            "gap_closed": closed,
        }

    def _job(self, scheme: str, method: str, calibration: str, folder: Path) -> Job:
        options = self.options
        job = prepare(
            options.model,
            scheme,
            folder / "out",
            method=method,
            calibration=calibration,
            samples=options.samples,
            seqlen=options.seqlen,
            seed=options.seed,
            device=options.device,
            iters=options.iters if method == "signround" else None,
        )
        tuning = job.plan.tuning
        if method == "signround" and options.lookahead is not None:
            tuning = dataclasses.replace(tuning, lookahead=options.lookahead)
        plan = dataclasses.replace(job.plan, tuning=tuning)
        return dataclasses.replace(job, plan=plan, tokens=self.tokens.get(calibration) or job.tokens)

    def _baselines(self, job: Job) -> None:
        scheme = job.plan.scheme
        if not self.float:
            self.float = self._perplexities(float_model(job.checkpoint, self.options.device))
        if scheme not in self.rounded:
            self.rounded[scheme] = self._perplexities(rounded_model(job.checkpoint, job.plan, self.options.device))

    def _perplexities(self, model: Runtime) -> dict[str, float]:
        return {name: score(model, windows).perplexity for name, windows in self.texts.items()}


def cells(row: dict[str, Any]) -> list[str]:
    """The row as text."""
    texts = [
        f"{row['float'][name]:.3f} | {row['rounded'][name]:.3f} | {row['tuned'][name]:.3f} | {closed:.1%}"
        for name, closed in row["gap_closed"].items()
    ]
    return [row["scheme"], row["method"], row["calibration"], f"{row['seconds']:.0f}", *texts]


def main() -> None:
    options = arguments()
    table = Table(options)
    rows: list[dict[str, Any]] = []
    calibrations = options.calibration or ["self"]
    for scheme in options.scheme:
        for method in options.method or ["signround"]:
            # rounding does not look at the text
            for calibration in calibrations[:1] if method == "rtn" else calibrations:
                rows.append(table.row(scheme, method, calibration))
                if len(rows) == 1:
                    headings = [f"{name}: float | rounded | tuned | gap closed" for name in table.texts]
                    print("| " + " | ".join(["scheme", "method", "calibration", "seconds", *headings]) + " |")
                    print("| " + " | ".join(["---"] * (4 + 4 * len(table.texts))) + " |")
                print("| " + " | ".join(cells(rows[-1])) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
