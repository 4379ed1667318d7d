"""Our tuned ONNX decoders against onnxruntime's own quantisers, at the same bits and block: mean KL to the float model.

    python -m benchmarks.onnx_vs_ort_quantizers MODEL --text eval.txt --artifact ARTIFACT [--artifact ...]
    python -m benchmarks.onnx_vs_ort_quantizers MODEL --text eval.txt --scheme w4g32 --scheme w2g64 \\
        --calibration calibration.txt --samples 128 --seqlen 2048 --iters 200 --device cuda

For each artifact, or each scheme that is tuned here, a table: mean KL to the float graph, perplexity, top-1 agreement,
stored bits per weight of the quantised layers, and our mean KL over theirs.

- Theirs: `ort_quantizers.py` on the float graph that the onnxruntime-genai builder writes of MODEL (-p fp32), every
  method that onnxruntime offers; those that take zero points have them, whether ours has or not. GPTQ reads windows of
  the text that ours was tuned on: the first `--gptq-windows` of `--gptq-tokens` tokens (for each input of a layer it
  runs the whole model).
- Ours: the ONNX export of the artifact.
- The head stays float in all, and so does the embedding. All graphs run in onnxruntime at accuracy_level 0 (float32
  activations) on the same windows: `--context` tokens each, starting afresh, every position but the last of a window
  compared. Whole text, or the first `--windows`.

Ends with code 1 when ours is above TARGETS times the best of theirs at the same bits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.onnx_vs_builder import WORKER, state_head_size
from benchmarks.ort_quantizers import CALIBRATED, METHODS, hide_head
from benchmarks.tally import Tally
from signround.artifact import TOKENS, QuantizedCheckpoint
from signround.calibration import read_tokens
from signround.evaluate import text_windows
from signround.pipeline import export, prepare, tune
from signround.runtimes.ort import open_onnxruntime

OURS = "signround"
TARGETS = {4: 0.5, 2: 0.3}


@dataclass
class Entry:
    """One graph. `bits_per_weight` counts codes, scales and zero points; None where the weights are still floats."""

    maker: str
    folder: Path
    bits_per_weight: float | None
    tally: Tally = field(default_factory=Tally)

    def as_row(self) -> dict[str, Any]:
        return {"made_by": self.maker, "bits_per_weight": self.bits_per_weight, **self.tally.figures()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the float model, a Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--artifact", type=Path, action="append", default=[], help="a tuned artifact of the model")
    parser.add_argument("--scheme", action="append", default=[], help="tune one here, as the next five say")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seqlen", type=int)
    parser.add_argument("--iters", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--method", action="append", choices=METHODS, help="of theirs; default: all")
    parser.add_argument("--gptq-windows", type=int, default=16, help="about 10 s each at 26 M weights and a thread")
    parser.add_argument("--gptq-tokens", type=int, default=512)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, help="the first N of the text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser.parse_args()


def run_child(command: list[str]) -> None:
    """Without what it prints, unless it fails."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")


def float_graph(model: Path, folder: Path) -> Path:
    """The builder's float32 graph, its head out of the quantisers' reach."""
    run_child([str(WORKER), "export", "builder", str(model), str(folder)])
    state_head_size(folder)
    hide_head(folder)
    return folder


def tuned_here(options: argparse.Namespace, scheme: str, folder: Path) -> QuantizedCheckpoint:
    """The job of `signround quantize`, without export."""
    job = prepare(
        options.model,
        scheme,
        folder / scheme,
        ["onnx"],
        calibration=str(options.calibration or "self"),
        samples=options.samples,
        seqlen=options.seqlen,
        iters=options.iters,
        device=options.device,
    )
    return tune(job)


def shape_of(artifact: QuantizedCheckpoint) -> tuple[int, int]:
    """(bits, group) of every layer. Stops when they differ: onnxruntime's quantisers know one for the whole graph."""
    found = {(layer.grid.bits, layer.grid.group) for layer in artifact.plan.layers()}
    if len(found) > 1 or artifact.plan.outer_layers:
        raise SystemExit(f"{artifact.folder}: only artifacts of one grid, with a float head, can be compared")
    ((bits, group),) = found
    if bits not in TARGETS or group is None:
        raise SystemExit(f"{artifact.folder}: {bits} bits in groups of {group} cannot be compared")
    return bits, group


def bits_per_weight(folder: Path) -> float | None:
    """Stored bits of the MatMulNBits constants over the weights they stand for; None when there are none."""
    import onnx

    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    stored = weights = 0
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            weights += sizes["K"] * sizes["N"]
            stored += sum(_bytes(constants[name]) for name in node.input[1:4] if name)
    return 8 * stored / weights if weights else None


def _bytes(tensor: Any) -> int:
    import onnx

    return int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def theirs(artifact: QuantizedCheckpoint, source: Path, folder: Path, options: argparse.Namespace) -> list[Entry]:
    """Every method at the artifact's bits and block."""
    bits, group = shape_of(artifact)
    tokens = read_tokens(artifact.folder / TOKENS)
    assert tokens is not None, f"{artifact.folder} has no calibration tokens"
    pieces = tokens.tuning.reshape(-1, min(options.gptq_tokens, tokens.tuning.shape[1]))
    np.save(folder / "windows.npy", pieces[: options.gptq_windows].numpy())
    entries = []
    for method in options.method or METHODS:
        out = folder / method.replace(" ", "-")
        command = ["-m", "benchmarks.ort_quantizers", method, str(source), str(out)]
        command += ["--bits", str(bits), "--block", str(group)]
        if method in CALIBRATED:
            command += ["--calibration", str(folder / "windows.npy")]
        run_child(command)
        entries.append(Entry(method, out, bits_per_weight(out)))
    return entries


def measure(entries: list[Entry], source: Path, windows: Tensor, threads: int) -> float:
    """Run every window through the float graph and each entry; the float graph's perplexity."""
    reference = Tally()
    with ExitStack() as stack:
        runtimes = [open_onnxruntime(folder, 0, threads) for folder in [source, *(entry.folder for entry in entries)]]
        for runtime in runtimes:
            stack.callback(runtime.close)
        for window in windows:
            expected, *found = (next(runtime.logits(window[None]))[0][:-1] for runtime in runtimes)
            wanted = expected.log_softmax(-1)
            reference.add(expected, wanted, window[1:])
            for entry, logits in zip(entries, found, strict=True):
                entry.tally.add(logits, wanted, window[1:])
    return reference.figures()["perplexity"]


def lines(rows: list[dict[str, Any]], perplexity: float, target: float) -> list[str]:
    """The table in Markdown, ours last; the last column is our mean KL over theirs."""
    *others, ours = rows
    table = [["made by", "bits a weight", "mean KL", "perplexity", "top-1", "ours / theirs"], ["---"] * 6]
    table.append(["float32", "32", "0", f"{perplexity:.3f}", "", ""])
    best = min(others, key=lambda row: row["mean_kl"])
    for row in rows:
        bits = "not packed" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}"
        cells = [row["made_by"], bits, f"{row['mean_kl']:.3e}", f"{row['perplexity']:.3f}", f"{row['top1']:.2%}"]
        ratio = "" if row is ours else f"{ours['mean_kl'] / row['mean_kl']:.3f}"
        if row is best:
            ratio += f" (best; target {target:.2f}{', missed' if ours['mean_kl'] > target * row['mean_kl'] else ''})"
        table.append([*cells, ratio])
    return ["| " + " | ".join(cells) + " |" for cells in table]


def compare(
    artifact: QuantizedCheckpoint, source: Path, folder: Path, windows: Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """Quantise, measure, print one table."""
    folder.mkdir()
    bits, _ = shape_of(artifact)
    entries = theirs(artifact, source, folder, options)
    ours = export(artifact, "onnx", folder / "ours").target
    entries.append(Entry(OURS, ours, bits_per_weight(ours)))
    perplexity = measure(entries, source, windows, options.threads)
    rows = [entry.as_row() for entry in entries]
    print(f"\n{options.model.name}, {artifact.plan.scheme}, {options.text.name}, {len(windows)} windows\n")
    print("\n".join(lines(rows, perplexity, TARGETS[bits])), flush=True)
    best = min(row["mean_kl"] for row in rows[:-1])
    ratio = rows[-1]["mean_kl"] / best
    return {"scheme": artifact.plan.scheme, "float": perplexity, "ratio": ratio, "target": TARGETS[bits], "rows": rows}


def run(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    if not options.artifact and not options.scheme:
        raise SystemExit("nothing to compare: give --artifact or --scheme")
    windows = text_windows(options.model, options.text, options.context)[: options.windows]
    source = float_graph(options.model, folder / "float")
    artifacts = [QuantizedCheckpoint(path) for path in options.artifact]
    artifacts += [tuned_here(options, scheme, folder) for scheme in options.scheme]
    return [
        compare(artifact, source, folder / f"table-{index}", windows, options)
        for index, artifact in enumerate(artifacts)
    ]


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        tables = run(options, Path(folder))
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({"settings": settings, "tables": tables}, indent=1))
    missed = [table["scheme"] for table in tables if table["ratio"] > table["target"]]
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
