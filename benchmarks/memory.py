"""Peak memory of every stage of the main job on random models of 8 and 32 layers: one table.

    python benchmarks/memory.py
    python benchmarks/memory.py --large    (exports of artifacts of Llama-3-8B's shape: `large_artifact.py`)

Each stage runs in a fresh process through the real pipeline. It first runs on a tiny model, so that every import and
pool is there, then the high-water mark of the operating system (VmHWM) is reset and the stage runs on the real one;
the table shows what it took on top of what was resident before. Processes that a stage starts (independent readers)
are watched too, from their own first moment. Ends with code 1 when 32 layers take more than LIMIT times the memory of
8 layers (and NOISE_BYTES) in any stage: memory must be bounded by one block or one tensor. Every judged stage runs
ROUNDS times at each size, each time from nothing, and the lowest peak counts: fragments of the heap add to what a stage
needs and never take away from it. The last stages, running the files in their runtimes, are not judged: a runtime holds
the whole file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

LAYERS = (8, 32)
TINY = {"layers": 2, "hidden": 128, "intermediate": 256}
FORMATS = ("gguf", "onnx", "gptq")
STAGES = (
    "plan",
    "tune",
    "tune own text",
    "evaluate float",
    "evaluate rounded",
    "evaluate tuned",
    *(f"{work} {name}" for name in FORMATS for work in ("export", "check")),
    *(f"run {name}" for name in FORMATS),
)
PARTS = ("own", "children")
ROUNDS = 2
LIMIT = 1.25
NOISE_BYTES = 16 << 20  # differences below this say nothing: arenas, buffers of files, a page cache of one tensor
SCHEME = "w4g32"
SETTINGS = {"samples": 8, "seqlen": 64, "iters": 2}


def prepared(model: Path, out: Path):  # type: ignore[no-untyped-def]
    from signround.pipeline import prepare

    calibration = str(out.parent / "calibration.txt")
    return prepare(model, SCHEME, out, FORMATS, calibration=calibration, **SETTINGS)


def stage_plan(model: Path, out: Path) -> None:
    prepared(model, out)


def stage_tune(model: Path, out: Path) -> None:
    from signround.pipeline import tune

    shutil.rmtree(out, ignore_errors=True)  # of an earlier round: blocks that are done are not tuned again
    tune(prepared(model, out))


def stage_tune_own_text(model: Path, out: Path) -> None:
    """Rounding alone, the lightest work there is, after the whole model wrote its own text: `tune` starts a new
    measurement in between, so a model that stays resident shows."""
    from signround.pipeline import prepare, tune

    own_text = out.parent / "own-text"
    shutil.rmtree(own_text, ignore_errors=True)
    tune(prepare(model, SCHEME, own_text, method="rtn", calibration="self", samples=4, seqlen=16))


def stage_evaluate(model: Path, out: Path, which: str) -> None:
    from signround.artifact import QuantizedCheckpoint
    from signround.calibration import read_tokens
    from signround.checkpoint import SourceCheckpoint
    from signround.evaluate import score
    from signround.runtimes import torch_blocks

    artifact = QuantizedCheckpoint(out / "artifact")
    source = SourceCheckpoint(model)
    runtime = {
        "float": lambda: torch_blocks.float_model(source),
        "rounded": lambda: torch_blocks.rounded_model(source, artifact.plan),
        "tuned": lambda: torch_blocks.tuned_model(artifact),
    }[which]()
    score(runtime, read_tokens(artifact.folder / "calibration.safetensors").evaluation)


def stage_export(out: Path, name: str) -> None:
    from signround.pipeline import export

    shutil.rmtree(out / name, ignore_errors=True)  # of an earlier round: nothing is written over a folder in use
    export(out / "artifact", name, out / name)


def stage_check(out: Path, name: str) -> None:
    """Every tensor through the reader that is not ours."""
    from signround.artifact import QuantizedCheckpoint
    from signround.exporting import make_exporters
    from signround.parity import compare_weights

    exporter = make_exporters([name])[0]
    parity = compare_weights(QuantizedCheckpoint(out / "artifact"), exporter, exporter.opened(out / name))
    assert parity.passed, parity


def stage_run(out: Path, name: str) -> None:
    """The file as its users run it, without the reference beside it."""
    from signround.calibration import read_tokens
    from signround.evaluate import spread
    from signround.runtimes.targets import open_target

    runtime = open_target(out / name)
    for _ in runtime.logits(spread(read_tokens(out / "artifact" / "calibration.safetensors").evaluation, 64)):
        pass
    runtime.close()


def stage(name: str) -> Callable[[Path, Path], None]:
    kind, _, which = name.partition(" ")
    return {
        "plan": stage_plan,
        "tune": stage_tune_own_text if which else stage_tune,
        "evaluate": lambda model, out: stage_evaluate(model, out, which),
        "export": lambda _, out: stage_export(out, which),
        "check": lambda _, out: stage_check(out, which),
        "run": lambda _, out: stage_run(out, which),
    }[kind]


class ChildrenPeak:
    """The highest VmHWM of any process that this one starts, asked for often: a mark that only rises."""

    def __init__(self) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ChildrenPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            for child in psutil.Process().children(recursive=True):
                try:
                    status = Path(f"/proc/{child.pid}/status").read_text()
                except OSError:
                    continue
                marks = [int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:")]
                self.bytes = max([self.bytes, *marks])


def measure(name: str, model: Path, out: Path, tiny: Path) -> dict[str, float]:
    """Run one stage here, after a warm-up on the tiny model; bytes of this process and of its children."""
    from signround.measure import peak_memory, reset_peak_memory

    work = stage(name)
    with tempfile.TemporaryDirectory(dir=tiny.parent) as scratch:
        warm = tiny / "out"
        if name.startswith(("plan", "tune")):
            warm = Path(scratch) / "out"
            (Path(scratch) / "calibration.txt").write_text((tiny / "calibration.txt").read_text())
        with ChildrenPeak() as children_before:
            work(tiny / "model", warm)
    reset_peak_memory()
    before = psutil.Process().memory_info().rss
    started = time.monotonic()
    with ChildrenPeak() as children:
        work(model, out)
    peak, _ = peak_memory()
    return {
        "own": peak - before,
        "children": max(0, children.bytes - children_before.bytes),
        "seconds": time.monotonic() - started,
    }


def in_fresh_process(name: str, home: Path, tiny: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--stage", name, "--home", str(home), "--tiny", str(tiny)]
    # Threads that wait by spinning take 20 times as long when other work shares the processor (libgomp's default).
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed on {home.name}:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def lowest(rounds: Iterable[dict[str, float]]) -> dict[str, float]:
    first, *others = rounds
    return {key: min([first[key], *(other[key] for other in others)]) for key in first}


def write_home(home: Path, layers: int, hidden: int, intermediate: int) -> int:
    """A folder with a model and a calibration text; returns the bytes of the model."""
    from random_model import write_random_model

    size = write_random_model(home / "model", layers=layers, hidden=hidden, intermediate=intermediate)
    words = random.Random(0)
    text = " ".join("".join(words.choices("etaoinshrdlu", k=words.randint(2, 8))) for _ in range(8000))
    (home / "calibration.txt").write_text(text)
    return size


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1408)
    parser.add_argument("--folder", type=Path, default=None, help="where the models go (default: a temporary folder)")
    parser.add_argument("--only", action="append", help="stages to run (those they need must have run in --folder)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--large", action="store_true", help="exports of 8 B artifacts instead (15 GB of disk)")
    parser.add_argument("--to", action="append", default=[], help="formats of --large, gguf or onnx (default: both)")
    parser.add_argument("--layers", type=int, help="of the large artifact (default: 32; onnx: 14)")
    parser.add_argument("--scale", type=int, default=1, help="divides the widths of the large artifact")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.stage:
        print(json.dumps(measure(args.stage, args.home / "model", args.home / "out", args.tiny)))
        return
    if args.large:
        import large_artifact

        large_artifact.table(args.folder, args.layers, args.scale, args.json, args.to)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = args.folder or Path(temporary)
        table(args, folder)


def is_bounded(few: float, many: float) -> bool:
    return many <= LIMIT * few + NOISE_BYTES


def table(args: argparse.Namespace, folder: Path) -> None:
    homes = {layers: folder / f"{layers}-layers" for layers in LAYERS}
    tiny = folder / "tiny"
    if not tiny.exists():
        write_home(tiny, **TINY)
        for name in ("tune", *(f"export {name}" for name in FORMATS)):
            stage(name)(tiny / "model", tiny / "out")
    for layers, home in homes.items():
        if not home.exists():
            write_home(home, layers, args.hidden, args.intermediate)
    sizes = {layers: sum(path.stat().st_size for path in (home / "model").iterdir()) for layers, home in homes.items()}
    few, many = LAYERS
    print("model:", ", ".join(f"{layers} layers {size / 1e6:.0f} MB" for layers, size in sizes.items()))
    print(f"{'MB above idle':18} {f'{few} layers':>10} {f'{many} layers':>10} {'ratio':>7} {'seconds':>15}  bounded by")
    rows, failed = [], []
    for name in args.only or STAGES:
        judged = not name.startswith("run")
        rounds = ROUNDS if judged else 1
        found = {
            layers: lowest(in_fresh_process(name, home, tiny) for _ in range(rounds)) for layers, home in homes.items()
        }
        for part in PARTS:
            low, high = found[few][part], found[many][part]
            if part == "children" and max(low, high) < NOISE_BYTES:
                continue
            ratio = high / max(low, 1)
            bounded = is_bounded(low, high)
            if judged and not bounded:
                failed.append(name)
            label = name if part == "own" else f"  {name.split()[-1]}'s reader"
            verdict = ("a block or tensor" if bounded else "THE MODEL") if judged else "the file (a runtime)"
            times = "/".join(f"{found[layers]['seconds']:.0f}" for layers in LAYERS) if part == "own" else ""
            print(
                f"{label:18} {low / 1e6:10.0f} {high / 1e6:10.0f} {ratio:7.2f} {times:>15}  {verdict}",
                flush=True,
            )
            rows.append({"stage": label, "bytes": {few: low, many: high}, "ratio": ratio, "bounded": bounded})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if failed:
        sys.exit(f"memory grows with the model in: {', '.join(failed)}")


if __name__ == "__main__":
    main()
