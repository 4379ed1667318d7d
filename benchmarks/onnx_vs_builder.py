"""Our ONNX decoder against the onnxruntime-genai builder's, of the same integers: size, export, loading, speed.

    python -m benchmarks.onnx_vs_builder MODEL_OR_ARTIFACT [...] [--starts 100] [--error 0.012] [--json table.json]

For each model given and for one random Llama of about 130 million weights (hidden 1024, 8 layers, 32000 tokens, tied;
`--no-random` leaves it out) one table: ours, the builder's, and their ratio, so that more than 1 is better for us in
every row. A Hugging Face folder is rounded to `--scheme` first (speed does not depend on tuning).

- Same integers: one artifact; the builder reads our GPTQ export of it. Both heads stay float, both graphs have
  accuracy_level 4. `logits` is the relative difference of the two graphs at accuracy_level 0.
- File: graph and tensors. Most of its ratio is not the quantised weights: our tables keep the model's 16 bits, and the
  builder's are float32, in tied models twice (embedding and head).
- Export: a fresh process each, from the artifact and from the GPTQ folder; seconds from start to end of the process,
  imports included; peak resident memory (VmHWM) of the process, and what of it came after the imports.
- Loading: a fresh process that has imported the runtime; seconds, and resident memory after it.
- Speed: pairs of processes, one for each graph, alive together and asked in turn (ours, theirs, theirs, ours, ...) for
  `--rounds`. Of a process the fastest repetition counts, since other work on a machine only ever adds time. Where the
  pages of a process lie is luck and moves it by a third, both of a pair often alike; so the ratio is the geometric mean
  over the pairs, and its standard error (the +-) is that of the pairs' logarithms. New pairs start until all of these
  errors are at most `--error`, at least 12 and at most `--starts`. Prefill: one sequence from an empty cache. Decode:
  one token behind `past` cached ones. Plain onnxruntime runs with bound buffers, past and present in one where both
  graphs allow it, else concatenated in both.

Ends with code 1 when a target is missed: every speed >= 0.97 and one above 1, export peak memory <= 0.5 (printed as
theirs over ours: >= 2), logits at most 1e-5 apart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

OURS, THEIRS = "signround", "builder"
MAKERS = (OURS, THEIRS)
RUNTIMES = ("raw", "genai")
WORKS = (("prefill", 128), ("prefill", 512), ("decode", 128), ("decode", 1024))
REPETITIONS = {"prefill": 1, "decode": 8}
WORKER = Path(__file__).with_name("onnx_worker.py")
RANDOM = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_hidden_layers": 8,
    "vocab_size": 32000,
}
SLOWEST, MEMORY = 0.97, 2.0
FEWEST_STARTS = 12
APART = 1e-5  # as between our graph and transformers


@dataclass(frozen=True)
class Row:
    """One line of the table. `target` is the least allowed ratio; ratios above 1 are in our favour. `processor` is the
    ratio of the processor's time, which other work on the machine disturbs less than the clock; `error` is the standard
    error of the ratio's logarithm."""

    name: str
    ours: float
    theirs: float
    unit: str
    more_is_better: bool = False
    target: float | None = None
    processor: float | None = None
    error: float | None = None

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs if self.more_is_better else self.theirs / self.ours

    @property
    def missed(self) -> bool:
        return self.target is not None and self.ratio < self.target

    def cells(self) -> list[str]:
        target = "" if self.target is None else f"{self.target:.2f}{', missed' if self.missed else ''}"
        processor = "" if self.processor is None else f"{self.processor:.2f}"
        ratio = f"{self.ratio:.2f}" if self.error is None else f"{self.ratio:.3f} +- {self.error:.3f}"
        return [self.name, self._text(self.ours), self._text(self.theirs), ratio, processor, target]

    def _text(self, value: float) -> str:
        return (
            f"{value / 1e6:,.1f} MB" if self.unit == "bytes" else f"{value:,.{1 if value >= 100 else 2}f} {self.unit}"
        )


class Worker:
    """A process of `onnx_worker.py serve`."""

    def __init__(self, runtime: str, folder: Path, threads: int) -> None:
        command = [sys.executable, str(WORKER), "serve", runtime, str(folder), "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.loaded: dict[str, float] = self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def seconds(self, work: str, tokens: int) -> dict[str, float]:
        """The fastest of a few repetitions: on the clock, and of the processor."""
        assert self._process.stdin is not None
        print(
            json.dumps({"work": work, "tokens": tokens, "times": REPETITIONS[work]}),
            file=self._process.stdin,
            flush=True,
        )
        clock, processor = zip(*self._answer(), strict=True)
        return {label(work, tokens): min(clock), f"{label(work, tokens)} processor": min(processor)}

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a measuring process ended early, code {self._process.wait()}; see above")
        return json.loads(line)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", help="Hugging Face folders or artifacts")
    parser.add_argument("--no-random", action="store_true", help="leave the random model of 130 M weights out")
    parser.add_argument("--scheme", default="w4g32", help="of models that are not artifacts")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of the speed, for each start; 2 to 10 s a round and model"
    )
    parser.add_argument("--export-rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=100, help="at most so many pairs of processes for each runtime")
    parser.add_argument("--error", type=float, default=0.012, help="standard error at which no more pairs start")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser.parse_args()


Ask = Callable[[str], dict[str, float]]


def no_figures() -> dict[str, dict[str, float]]:
    return {maker: {} for maker in MAKERS}


def keep_least(least: dict[str, float], found: dict[str, float]) -> None:
    for name, value in found.items():
        least[name] = min(value, least.get(name, value))


def in_turn(rounds: int, asks: Sequence[Ask], least: dict[str, dict[str, float]]) -> None:
    """Each question to each maker in every round, the other one first each time; `least` keeps the least answers."""
    for index in range(rounds):
        for ask in asks:
            for maker in MAKERS if index % 2 == 0 else MAKERS[::-1]:
                keep_least(least[maker], ask(maker))


def exported(sources: dict[str, Path], folder: Path, maker: str) -> dict[str, float]:
    """Write the graph in a fresh process, over what an earlier round wrote."""
    out = folder / maker
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, str(WORKER), "export", maker, str(sources[maker]), str(out)]
    paths = [str(WORKER.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{maker} could not export {sources[maker]}:\n{done.stderr}")
    memory: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": seconds, "peak": memory["peak"], "above": memory["peak"] - memory["before"]}


def graph_bytes(folder: Path) -> int:
    """Graph and tensors, without configuration and tokenizer."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name.startswith("model.onnx"))


def share_alike(folders: dict[str, Path]) -> None:
    """One buffer for past and present in both graphs or in neither."""
    settings = {maker: json.loads((folder / "genai_config.json").read_text()) for maker, folder in folders.items()}
    shared = all(each["search"]["past_present_share_buffer"] for each in settings.values())
    for maker, each in settings.items():
        each["search"]["past_present_share_buffer"] = shared
        (folders[maker] / "genai_config.json").write_text(json.dumps(each))


def state_head_size(folder: Path) -> None:
    """Write the size of a head into the shapes of the cache inputs, where the builder leaves a name."""
    import onnx

    size = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            value.type.tensor_type.shape.dim[3].dim_value = size
    onnx.save(model, str(folder / "model.onnx"))


def logits_apart(folders: dict[str, Path]) -> float:
    """Relative difference of both graphs' logits on 64 tokens, matrix products in float32."""
    import torch

    from signround.runtimes.ort import open_onnxruntime

    state_head_size(folders[THEIRS])
    found = []
    for maker in MAKERS:
        runtime = open_onnxruntime(folders[maker], accuracy_level=0, threads=1)
        window = torch.tensor([[(7 + 7919 * index) % runtime.vocabulary for index in range(64)]])
        (logits,) = next(runtime.logits(window))
        found.append(logits.clone())
        runtime.close()
    return float((found[0] - found[1]).norm() / found[1].norm())


def speed_rows(folders: dict[str, Path], runtime: str, options: argparse.Namespace) -> list[Row]:
    """Loading and speed in one runtime."""
    loaded, pairs = no_figures(), Pairs()
    for start in range(options.starts):
        with ExitStack() as stack:
            workers = {}
            for maker in MAKERS if start % 2 == 0 else MAKERS[::-1]:
                workers[maker] = stack.enter_context(Worker(runtime, folders[maker], options.threads))
                keep_least(loaded[maker], workers[maker].loaded)
            least = no_figures()
            in_turn(options.rounds, [asking(workers, *work) for work in WORKS], least)
        pairs.add(least)
        if start + 1 >= FEWEST_STARTS and all(pairs.error(label(*work)) <= options.error for work in WORKS):
            break
    ours, theirs = loaded[OURS], loaded[THEIRS]
    rows = [
        Row(f"{runtime}: load", ours["seconds"], theirs["seconds"], "s"),
        Row(f"{runtime}: resident after load", ours["resident"], theirs["resident"], "bytes"),
    ]
    return [*rows, *(speed_row(runtime, *work, pairs) for work in WORKS)]


class Pairs:
    """Seconds by maker and figure, of pairs of processes that were measured side by side."""

    def __init__(self) -> None:
        self._pairs: list[dict[str, dict[str, float]]] = []

    def add(self, seconds: dict[str, dict[str, float]]) -> None:
        """One pair."""
        self._pairs.append(seconds)

    def mean(self, maker: str, figure: str) -> float:
        """Geometric, so that the ratio of two means is the mean of the ratios."""
        return math.exp(float(np.mean([math.log(pair[maker][figure]) for pair in self._pairs])))

    def error(self, figure: str) -> float:
        """Standard error of the mean logarithm of the ratio; of at least two pairs."""
        ratios = [math.log(pair[THEIRS][figure] / pair[OURS][figure]) for pair in self._pairs]
        return float(np.std(ratios, ddof=1)) / math.sqrt(len(ratios))


def asking(workers: dict[str, Worker], kind: str, tokens: int) -> Ask:
    return lambda maker: workers[maker].seconds(kind, tokens)


def label(kind: str, tokens: int) -> str:
    """What a worker calls the seconds of this work."""
    return f"{kind} {tokens}"


def speed_row(runtime: str, kind: str, tokens: int, pairs: Pairs) -> Row:
    count, work = (tokens if kind == "prefill" else 1), label(kind, tokens)
    speeds = [count / pairs.mean(maker, work) for maker in MAKERS]
    processor = pairs.mean(THEIRS, f"{work} processor") / pairs.mean(OURS, f"{work} processor")
    name = f"{runtime}: {work}" if kind == "prefill" else f"{runtime}: decode, past {tokens}"
    error = pairs.error(work)
    return Row(name, *speeds, "tokens/s", more_is_better=True, target=SLOWEST, processor=processor, error=error)


def compare(sources: dict[str, Path], folder: Path, options: argparse.Namespace) -> tuple[list[Row], float]:
    """All rows of one model, and how far the logits lie apart."""
    exports = no_figures()
    in_turn(options.export_rounds, [lambda maker: exported(sources, folder, maker)], exports)
    folders = {maker: folder / maker for maker in MAKERS}
    rows = [Row("file", *(graph_bytes(folders[maker]) for maker in MAKERS), "bytes")]
    rows.append(Row("export", *(exports[maker]["seconds"] for maker in MAKERS), "s"))
    rows.append(Row("export, peak memory", *(exports[maker]["peak"] for maker in MAKERS), "bytes", target=MEMORY))
    rows.append(Row("export, peak above its imports", *(exports[maker]["above"] for maker in MAKERS), "bytes"))
    share_alike(folders)
    for runtime in RUNTIMES:
        rows += speed_rows(folders, runtime, options)
    return rows, logits_apart(folders)


def write_sources(model: Path | None, folder: Path, scheme: str) -> dict[str, Path]:
    """The artifact of `model` (None: the random one), and its GPTQ folder."""
    from benchmarks.large_artifact import random_plan, write_random_artifact, write_shape
    from signround.artifact import is_artifact
    from signround.pipeline import export
    from tests.small_artifacts import write_rounded_artifact

    artifact = folder / "artifact"
    if model is None:
        checkpoint = write_shape(folder / "model", RANDOM, tied=True)
        write_random_artifact(checkpoint, random_plan(checkpoint, scheme), artifact)
    elif is_artifact(model):
        artifact = model
    else:
        write_rounded_artifact(model, artifact, scheme)
    return {OURS: artifact, THEIRS: export(artifact, "gptq", folder / "gptq").target}


def lines(rows: Sequence[Row]) -> list[str]:
    """The table in Markdown."""
    head = ["", "ours", "builder", "ratio", "of processor time", "target"]
    table = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    return ["| " + " | ".join(cells) + " |" for cells in table]


def failures(rows: Sequence[Row], apart: float) -> list[str]:
    """The targets that one table misses; `apart` as from `logits_apart`."""
    found = [row.name for row in rows if row.missed]
    if not any(row.more_is_better and row.ratio > 1 for row in rows):
        found.append("faster in no column")
    if not apart <= APART:  # NaN too
        found.append(f"logits are {apart:.1e} apart, so these are not two graphs of one model")
    return found


def main() -> None:
    options = arguments()
    tables, missed = [], []
    for model in [*options.models, *([] if options.no_random else [None])]:
        name = model.name if model else "random model of 130 M weights"
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            sources = write_sources(model, Path(temporary), options.scheme)
            rows, apart = compare(sources, Path(temporary), options)
        rounds = f"up to {options.starts} pairs of processes, {options.rounds} rounds each"
        print(f"\n{name}, {options.threads} thread(s), {rounds}; logits: {apart:.1e} apart\n")
        print("\n".join(lines(rows)), flush=True)
        missed += [f"{name}: {failure}" for failure in failures(rows, apart)]
        tables.append({"model": name, "logits": apart, "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]})
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "tables": tables}, indent=1))
    if missed:
        sys.exit("missed: " + "; ".join(missed))


if __name__ == "__main__":
    main()
