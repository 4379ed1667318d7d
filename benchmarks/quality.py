"""Float, rounded and tuned perplexity of one model, for schemes, methods and calibrations: one table.

    python benchmarks/quality.py MODEL --calibration calibration.txt --text eval.txt --text wikitext2-valid.txt \\
        --scheme w2g64 --scheme w4g32 --samples 128 --seqlen 512 --iters 200 --device cuda

"gap closed" is the part of the perplexity gap between rounding (to nearest, same grid) and float that tuning closes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from signround.evaluate import score, text_windows
from signround.pipeline import prepare, tune
from signround.runtimes.torch_blocks import float_model, rounded_model, tuned_model


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--scheme", action="append", required=True)
    parser.add_argument("--method", action="append", default=None, help="default: signround")
    parser.add_argument("--calibration", action="append", default=None, help="default: self; may be repeated")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--iters", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    texts = {text.name: text_windows(args.model, text, args.context) for text in args.text}
    rows: list[dict[str, object]] = []
    baselines: dict[str, dict[str, float]] = {}
    float_perplexity: dict[str, float] = {}
    print(f"{'scheme':14} {'method':14} {'calibration':18} {'s':>6}", *(f"{name:>34}" for name in texts))
    for scheme in args.scheme:
        for method in args.method or ["signround"]:
            for calibration in args.calibration or ["self"]:
                row = one(args, scheme, method, calibration, texts, float_perplexity, baselines)
                rows.append(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def one(args, scheme, method, calibration, texts, floats, baselines) -> dict[str, object]:  # type: ignore[no-untyped-def]
    tuned_how = {} if method != "signround" else {"iters": args.iters}
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(
            args.model, scheme, Path(folder) / "out", method=method, calibration=calibration, samples=args.samples,
            seqlen=args.seqlen, seed=args.seed, device=args.device, **tuned_how,
        )  # fmt: skip
        started = time.monotonic()
        artifact = tune(job)
        seconds = time.monotonic() - started
        tuned = {name: score(tuned_model(artifact, args.device), windows).perplexity for name, windows in texts.items()}
    if not floats:
        floats |= {name: score(float_model(job.checkpoint, args.device), w).perplexity for name, w in texts.items()}
        print("float", floats, flush=True)
    if scheme not in baselines:
        model = rounded_model(job.checkpoint, job.plan, args.device)
        baselines[scheme] = {name: score(model, windows).perplexity for name, windows in texts.items()}
    cells = []
    closed = {}
    for name in texts:
        rounded = baselines[scheme][name]
        closed[name] = (rounded - tuned[name]) / (rounded - floats[name])
        cells.append(f"{rounded:10.3f} -> {tuned[name]:8.3f} ({closed[name]:6.1%})")
    label = Path(calibration).name
    print(f"{scheme:14} {method:14} {label:18} {seconds:6.0f}", *(f"{cell:>34}" for cell in cells), flush=True)
    return {
        "scheme": scheme, "method": method, "calibration": label, "seconds": seconds,
        "float": floats, "rounded": baselines[scheme], "tuned": tuned, "gap_closed": closed,
    }  # fmt: skip


if __name__ == "__main__":
    main()
