"""Exports of artifacts of Llama-3-8B's shape to GGUF and ONNX: seconds, throughput, peak memory. The door is

    python benchmarks/memory.py --large

No model of that size is needed: codes and fields are drawn at random, one tensor in memory at a time, straight into an
artifact, from a plan that was made of config.json and shapes alone. The tokenizer is the bundled model's, grown to
the vocabulary by random merges. The export runs in a fresh process through `signround.pipeline.export`, as a user's
does (hashes of the artifact checked first), and asks the operating system for its peak (VmHWM, interpreter and
libraries included). `plain` is a sequential write and fsync of as many bytes to the same disk, the faster of two, one
before and one after. The artifact was just written: it is read from the page cache where memory suffices. Ends with
code 1 when a peak is not below that of its case, with 2 when the disk is too small. Everything is deleted.

The ONNX case has 14 of the 32 blocks and a vocabulary of 32000, so that what onnxruntime unpacks fits into 5 GB of
memory. Its tensors are one file of more than 2 GiB, which no protobuf can hold; onnxruntime loads it in a fresh process
and runs one window, whose logits must be finite.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from signround.architecture import read_architecture
from signround.artifact import ArtifactWriter, BlockRecord, artifact_bytes
from signround.checkpoint import SourceCheckpoint, TensorInfo
from signround.events import Event, StageStarted
from signround.exporting import Exporter, make_exporters
from signround.measure import peak_memory
from signround.pipeline import export
from signround.plan import CalibrationSpec, KeptTensor, LayerPlan, ModelPlan, make_plan
from signround.qtensor import QuantizedTensor
from signround.recipes import settings_for

WINDOW = 32  # tokens that are run through the ONNX file
TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "llama-4m"
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@dataclass(frozen=True)
class Case:
    """One export. `peak` is what it must stay below; `blocks` is the default of --layers."""

    scheme: str
    to: str
    peak: int
    blocks: int = 32
    vocabulary: int = LLAMA_3_8B["vocab_size"]


CASES = (
    Case("q4_k_m", "gguf", 1_500_000_000),  # embedding and head quantised
    Case("w4g32", "gguf", 1_500_000_000),  # embedding and head kept in bfloat16
    Case("w4g32", "onnx", 1_000_000_000, 14, 32000),
)
ENDS = ("eos_token_id", "pad_token_id")
SPARE = 1.05  # of the disk space that is needed
PIECE = 16 << 20  # bytes of a plain write at a time


class ShapesOnly(SourceCheckpoint):
    """A model folder without weights: the tensors are those that its config.json asks for, in bfloat16."""

    def _read_index(self) -> dict[str, TensorInfo]:
        architecture = read_architecture(self.config)
        shapes: dict[str, tuple[int, ...]] = dict(architecture.outer())
        for index in range(architecture.layers):
            shapes |= architecture.block_linears(index) | architecture.block_kept(index)
        return {name: TensorInfo(self.folder, shape, torch.bfloat16) for name, shape in shapes.items()}

    @cached_property
    def sha256(self) -> str:
        return "0" * 64


def sizes_of(case: Case, layers: int, scale: int) -> dict[str, int]:
    """Llama-3-8B's with `layers` blocks and the vocabulary of the case, every width divided by `scale`."""
    widths = LLAMA_3_8B | {"vocab_size": case.vocabulary}
    sizes = {key: max(1, size // scale) for key, size in widths.items()}
    return sizes | {"num_hidden_layers": layers, "head_dim": 128}


def write_shape(folder: Path, sizes: Mapping[str, int], *, tied: bool = False) -> ShapesOnly:
    """config.json and tokenizer of a Llama of these `sizes` (fields of config.json)."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = json.loads((TOKENIZER / "config.json").read_text())
    config |= {**sizes, "tie_word_embeddings": tied}
    config |= {"bos_token_id": sizes["vocab_size"] - 2} | dict.fromkeys(ENDS, sizes["vocab_size"] - 1)
    config |= {"max_position_embeddings": 8192, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(TOKENIZER / "tokenizer_config.json", folder / "tokenizer_config.json")
    (folder / "tokenizer.json").write_text(json.dumps(grown_tokenizer(sizes["vocab_size"])))
    return ShapesOnly(folder)


def grown_tokenizer(size: int) -> dict[str, Any]:
    """The bundled byte-level BPE with random merges behind its own, until it has `size` tokens; the special ones are
    the last, as everywhere in this format."""
    data: dict[str, Any] = json.loads((TOKENIZER / "tokenizer.json").read_text())
    vocabulary, merges, specials = data["model"]["vocab"], data["model"]["merges"], data["added_tokens"]
    words, draw = list(vocabulary), random.Random(0)
    while len(vocabulary) < size - len(specials):
        pair = draw.choices(words, k=2)
        if "".join(pair) not in vocabulary:
            vocabulary["".join(pair)] = len(vocabulary)
            merges.append(pair)
    ids = {entry["content"]: index for index, entry in enumerate(specials, len(vocabulary))}
    for entry in specials:
        entry["id"] = ids[entry["content"]]
    for name, token in data["post_processor"]["processors"][-1]["special_tokens"].items():
        token["ids"] = [ids[name]]
    return data


def random_quantized(layer: LayerPlan, draw: np.random.Generator) -> QuantizedTensor:
    """Any codes, and any fields that the grid allows."""

    def integers(field: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        kind = np.int8 if dtype == torch.int8 else np.uint8
        return torch.from_numpy(draw.integers(*layer.grid.bounds(field), shape, dtype=kind, endpoint=True))

    def halves(shape: tuple[int, int]) -> torch.Tensor:
        return torch.from_numpy(draw.random(shape, dtype=np.float32) * 1e-3).half()

    layout = layer.grid.layout(layer.rows, layer.columns)
    fields = {
        name: halves(shape) if dtype.is_floating_point else integers(name, shape, dtype)
        for name, (shape, dtype) in layout.items()
    }
    return QuantizedTensor(layer.grid, integers("codes", (layer.rows, layer.columns), torch.uint8), fields)


def random_kept(kept: KeptTensor) -> torch.Tensor:
    if len(kept.shape) == 1:
        return torch.ones(kept.shape, dtype=kept.torch_dtype)
    return torch.empty(kept.shape, dtype=kept.torch_dtype).uniform_(-0.02, 0.02)


def random_plan(checkpoint: SourceCheckpoint, scheme: str) -> ModelPlan:
    """A plan for an artifact that nothing is tuned for; `scheme` may be a file type of llama.cpp."""
    settings = settings_for("rtn", context=8192, samples=2, seqlen=16)
    return make_plan(checkpoint, scheme, settings, CalibrationSpec("self"), mixes=True)


def write_random_artifact(checkpoint: SourceCheckpoint, plan: ModelPlan, folder: Path) -> None:
    """An artifact as tuning writes it, of random integers; one block in memory at a time."""
    draw = np.random.default_rng(0)
    writer = ArtifactWriter(folder, plan, checkpoint.files)
    for kept in plan.outer:
        writer.commit_outer(kept.name, random_kept(kept))
    for layer in plan.outer_layers:
        writer.commit_outer_layer(layer.name, random_quantized(layer, draw), None)
    for block in plan.blocks:
        quantized = {layer.name: random_quantized(layer, draw) for layer in block.layers}
        record = BlockRecord(block.index, 0.0, 1.0, 1.0, {}, 0, 0)
        writer.commit_block(block.index, quantized, {kept.name: random_kept(kept) for kept in block.kept}, record, {})
    writer.finish()
    writer.close()


def plain_write(path: Path, size: int) -> float:
    """Seconds to write `size` bytes of noise in one go and to see them on the disk."""
    noise = os.urandom(PIECE)
    started = time.monotonic()
    with open(path, "wb", buffering=0) as stream:
        for start in range(0, size, PIECE):
            stream.write(noise[: size - start])
        os.fsync(stream.fileno())
    seconds = time.monotonic() - started
    path.unlink()
    return seconds


class Watch:
    """When the export began to write, and the peak before that."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.writing, self.before = self.started, 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self.writing, self.before = time.monotonic(), peak_memory()[0]


def measured_export(to: str, artifact: Path, out: Path) -> dict[str, float]:
    """One export in this process, which must be fresh."""
    watch = Watch()
    exported = export(artifact, to, out, on_event=watch)
    ended = time.monotonic()
    return {
        "bytes": sum(path.stat().st_size for path in exported.files),
        "seconds": ended - watch.started,
        "writing": ended - watch.writing,
        "before": watch.before,
        "peak": peak_memory()[0],
    }


def measured_run(folder: Path) -> dict[str, float]:
    """Load an ONNX folder in this process, which must be fresh, and run one window through it."""
    from signround.runtimes.ort import open_onnxruntime

    started = time.monotonic()
    runtime = open_onnxruntime(folder, threads=1)
    loaded = time.monotonic()
    (logits,) = next(runtime.logits(torch.arange(WINDOW)[None] % runtime.vocabulary))
    ended = time.monotonic()
    if not logits.isfinite().all() or logits.std() == 0:
        sys.exit(f"{folder}: the logits are not those of a model")
    return {"loading": loaded - started, "running": ended - loaded, "run_peak": peak_memory()[0]}


def in_fresh_process(*arguments: str | Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def enough_disk(folder: Path, plan: ModelPlan, exporter: Exporter) -> None:
    """Exit with code 2 when artifact and file would not fit."""
    needed = SPARE * (artifact_bytes(plan) + exporter.estimated_bytes(plan))
    free = shutil.disk_usage(folder).free
    if free < needed:
        sentence = f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free"
        print(f"{sentence}; name another --folder, or fewer --layers.", file=sys.stderr)
        sys.exit(2)


def measure(case: Case, folder: Path, layers: int, scale: int) -> dict[str, Any]:
    """Build, export, compare with plain writing, run what can be run here, delete."""
    checkpoint = write_shape(folder / "model", sizes_of(case, layers, scale))
    plan = random_plan(checkpoint, case.scheme)
    exporter = make_exporters([case.to])[0]
    enough_disk(folder, plan, exporter)
    started = time.monotonic()
    write_random_artifact(checkpoint, plan, folder / "artifact")
    building = time.monotonic() - started
    plain = plain_write(folder / "plain", exporter.estimated_bytes(plan))
    found = in_fresh_process(case.to, folder / "artifact", folder / "out")
    if case.to == "onnx":
        shutil.rmtree(folder / "artifact")
        found |= in_fresh_process("run", folder / "out")
    largest = max(path.stat().st_size for path in (folder / "out").iterdir())
    shutil.rmtree(folder / "out")
    plain = min(plain, plain_write(folder / "plain", int(found["bytes"])))
    row = {"scheme": case.scheme, "to": case.to, "parameters": plan.parameters, "building": building, "plain": plain}
    return row | {"largest_file": largest, **found}


def table(folder: Path | None, layers: int | None, scale: int, json_file: Path | None, only: Sequence[str]) -> None:
    """Measure and print every case whose format is asked for; exit code 1 when one takes too much memory."""
    heads = (
        "scheme",
        "format",
        "weights",
        "file GB",
        "seconds",
        "writing",
        "GB/s",
        "Mw/s",
        "plain",
        "ratio",
        "before",
        "peak MB",
    )
    print(" ".join(f"{head:>8}" for head in heads))
    rows, failed = [], []
    for case in (case for case in CASES if not only or case.to in only):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            rows.append(measure(case, Path(temporary), layers or case.blocks, scale))
        print(" ".join(f"{cell:>8}" for cell in _cells(rows[-1])), flush=True)
        if case.to == "onnx":
            print(_ran(rows[-1]), flush=True)
        if rows[-1]["peak"] >= case.peak:
            failed.append(f"{case.scheme} to {case.to} took {case.peak / 1e6:.0f} MB or more")
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1))
    if failed:
        sys.exit("; ".join(failed))


def _ran(row: Mapping[str, Any]) -> str:
    return (
        f"{'':8} onnxruntime loads its {row['largest_file'] / 2**30:.2f} GiB of tensors in {row['loading']:.1f} s, "
        f"reads {WINDOW} tokens in {row['running']:.1f} s (finite logits, peak {row['run_peak'] / 1e6:.0f} MB)"
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    weights, size, writing = row["parameters"], row["bytes"], row["writing"]
    return [
        row["scheme"],
        row["to"],
        f"{weights / 1e9:.2f} G",
        f"{size / 1e9:.2f}",
        f"{row['seconds']:.1f}",
        f"{writing:.1f}",
        f"{size / writing / 1e9:.2f}",
        f"{weights / writing / 1e6:.0f}",
        f"{row['plain']:.1f}",
        f"{writing / row['plain']:.2f}",
        f"{row['before'] / 1e6:.0f}",
        f"{row['peak'] / 1e6:.0f}",
    ]


if __name__ == "__main__":
    work, *paths = sys.argv[1:]
    places = [Path(path) for path in paths]
    print(json.dumps(measured_run(*places) if work == "run" else measured_export(work, *places)))
