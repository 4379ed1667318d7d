"""Our .gguf files against llama-quantize's with an importance matrix, both measured by llama.cpp on the file.

    python -m benchmarks.gguf_vs_llama_quantize MODEL --calibration calibration.txt --text eval.txt \\
        --text wikitext2-valid.txt --type q2_k --type q3_k_m --type q4_k_m --ours FOLDER --json table.json

For each type: perplexity, mean KL to the F32 file, top-1 agreement and bytes, and the ratio of the mean KLs.

- Theirs: `llama_model_quantize` of llama-cpp-python on the F32 file, with the importance matrix of 128 chunks of 512
  tokens of the calibration text (`--imatrix` gives another one, `--save-imatrix` keeps it).
- Ours: `--ours` names .gguf files, TYPE=PATH, or folders of files whose names end in the type. What is not given is
  made here as `signround quantize MODEL --scheme TYPE --calibration ... --to gguf` does.
- Peers: `--peer NAME:TYPE=PATH` adds a row for a file that another tool made. AutoRound's (0.16.1; for K-quants it
  advises `--iters 0`, a search without tuning): `auto-round --model MODEL --scheme gguf:q4_k_m --format gguf:q4_k_m
  --iters 0 --dataset calibration.json --nsamples 128 --seqlen 512 --output_dir FOLDER`, the text as a JSON list of
  {"text": ...}. Its converter stops at tokenizers it does not know, as those of our example models
  (`get_vocab_base_pre` in its conversion/base.py must then be made to return the name), and for some families needs
  the gguf package of llama.cpp's repository.
- `--limits` adds two rows a type, made by llama-quantize: the embedding and head in their types with float linears, and
  float embedding and head with linears in Q8_0, where nearly all that is left is llama.cpp's rounding of activations
  to 8 bits. What a missed target is made of can be read from them.

Stops when ours and theirs differ in the type of any tensor, unless `--like-ours` gives llama-quantize the types of our
file. Windows of `--context` tokens, whole texts (or the first `--windows` of each); each window starts afresh, its
first token is not scored. `--second-half` scores the second half of each window only, as llama-perplexity does. All
files of a run are in memory at once, and once a job (`--jobs`): each window runs through the F32 file and then through
each of them, so nothing is stored. llama.cpp's settings: float32 KV cache, no flash attention.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.llama_quantize import FILE_TYPES, bos_of, chunks_of, collect_importance, quantize
from benchmarks.tally import Tally
from exporters.gguf.container import GgufFile
from exporters.gguf.imatrix import read_imatrix, write_imatrix
from exporters.gguf.layout import TYPE_BYTES
from runtime_tests.gguf_floats import write_float_gguf
from signround.evaluate import text_windows
from signround.events import silent
from signround.pipeline import prepare, tune
from signround.runtimes.llama_cpp_windows import WindowRuntime

if TYPE_CHECKING:
    from numpy.typing import NDArray

IMATRIX_CHUNK = 512
F32, Q8_0 = 0, 8  # ggml's type ids
OURS, THEIRS = "signround", "llama-quantize"
TARGETS = {"q2_k": 0.45, "q3_k_m": 0.45, "q4_0": 0.6, "q4_k_m": 0.6, "iq4_xs": 0.6, "q5_k_m": 0.9, "q6_k": 0.9}


@dataclass
class Entry:
    """One file of the table."""

    type: str
    maker: str
    path: Path
    texts: dict[str, Tally] = field(default_factory=dict)

    def as_row(self) -> dict[str, Any]:
        figures = {text: tally.figures() for text, tally in self.texts.items()}
        return {"type": self.type, "made_by": self.maker, "bytes": self.path.stat().st_size, "texts": figures}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--type", action="append", choices=sorted(FILE_TYPES), help="default: those of --ours")
    parser.add_argument("--ours", action="append", default=[], help="TYPE=PATH or a folder")
    parser.add_argument("--peer", action="append", default=[], help="NAME:TYPE=PATH")
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--save-imatrix", type=Path)
    parser.add_argument("--chunks", type=int, default=128, help="of the importance matrix")
    parser.add_argument("--like-ours", action="store_true", help="llama-quantize with the tensor types of our file")
    parser.add_argument("--limits", action="store_true", help="rows for what no tuning of the linears can change")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, help="the first N of each text")
    parser.add_argument("--second-half", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="of each job")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the windows")
    parser.add_argument("--device", default="cpu", help="for tuning what --ours does not give, as are the next three")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seqlen", type=int)
    parser.add_argument("--iters", type=int)
    parser.add_argument("--keep", type=Path, help="folder for the files made here; default: deleted")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser.parse_args()


def given_files(options: Sequence[str]) -> dict[str, Path]:
    """Type -> path, from TYPE=PATH and folders (llama-quantize's files in them, as `--keep` leaves, are passed over).
    Stops when two files are of one type."""
    found: dict[str, Path] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if equals:
            found[name.lower()] = Path(path)
            continue
        for file in sorted(Path(option).rglob("*.gguf")):
            ending = re.search(rf"(?:^|[^a-z0-9])({'|'.join(FILE_TYPES)})$", file.stem.lower())
            if ending and not file.stem.startswith(THEIRS):
                if ending[1] in found:
                    raise SystemExit(f"two files of type {ending[1]}: {found[ending[1]]} and {file}; name one of them")
                found[ending[1]] = file
    return found


def tuned_here(options: argparse.Namespace, file_type: str, folder: Path) -> Path:
    """The job of `signround quantize`, tuned and exported."""
    job = prepare(
        options.model,
        file_type,
        folder / file_type,
        ["gguf"],
        calibration=str(options.calibration),
        samples=options.samples,
        seqlen=options.seqlen,
        iters=options.iters,
        device=options.device,
    )
    (exporter,) = job.exporters
    return exporter.export(tune(job), folder / file_type / "gguf", silent).target


def tensor_types(path: Path) -> dict[str, int]:
    """Name -> ggml type id of every matrix."""
    tensors = GgufFile(path, TYPE_BYTES).tensors
    return {name: entry.type for name, entry in tensors.items() if len(entry.shape) > 1}


def check_equal_types(ours: Path, theirs: Path) -> None:
    """Stops the benchmark when a comparison would be between different things."""
    mine, other = tensor_types(ours), tensor_types(theirs)
    differing = [name for name in {**mine, **other} if mine.get(name) != other.get(name)]
    if differing:
        listed = ", ".join(f"{name} {mine.get(name)} / {other.get(name)}" for name in sorted(differing)[:8])
        raise SystemExit(f"{ours.name}: {len(differing)} tensors differ in type from llama-quantize's file ({listed})")


def make_entries(options: argparse.Namespace, float_file: Path, folder: Path) -> list[Entry]:
    """Theirs and ours for each type, types compared, and the peers."""
    given = given_files(options.ours)
    types = options.type or sorted(given)
    if not types:
        raise SystemExit("no type to compare: give --type or --ours")
    if options.imatrix:
        imatrix = read_imatrix(options.imatrix)
    else:
        windows = chunks_of(options.model, options.calibration, options.chunks, IMATRIX_CHUNK, bos_of(float_file))
        imatrix = collect_importance(options.model, windows, options.calibration.name)
    if options.save_imatrix:
        write_imatrix(options.save_imatrix, imatrix)
    entries = []
    for file_type in types:
        ours = given.get(file_type)
        if ours is None:
            ours = tuned_here(options, file_type, folder)
        theirs = folder / f"{THEIRS}-{file_type}.gguf"
        quantize(float_file, theirs, file_type, imatrix, tensor_types(ours) if options.like_ours else None)
        check_equal_types(ours, theirs)
        entries += [Entry(file_type, THEIRS, theirs), Entry(file_type, OURS, ours)]
        if options.limits:
            entries += limits(float_file, file_type, tensor_types(ours), folder)
    for option in options.peer:
        name, _, path = option.partition("=")
        maker, _, file_type = name.partition(":")
        entries.append(Entry(file_type.lower(), maker, Path(path)))
    return entries


def limits(float_file: Path, file_type: str, types: dict[str, int], folder: Path) -> list[Entry]:
    """What no tuning of the linears can change: the embedding and head of this type alone, and what llama.cpp's 8-bit
    activations cost when the linears are as good as exact (Q8_0)."""
    floats = tensor_types(float_file)
    parts = {
        "embedding and head alone": {name: code for name, code in types.items() if not name.startswith("blk.")},
        "linears in Q8_0": {name: Q8_0 for name, code in types.items() if name.startswith("blk.") and code != F32},
    }
    entries = []
    for maker, changed in parts.items():
        path = folder / f"{file_type}, {maker}.gguf"
        quantize(float_file, path, "q8_0", None, floats | changed)
        entries.append(Entry(file_type, maker, path))
    return entries


def measure(entries: list[Entry], float_file: Path, text: str, windows: Tensor, options: argparse.Namespace) -> None:
    """Run every window through the F32 file and each entry; adds a tally to each. `--jobs` share the windows."""
    first = windows.shape[1] // 2 if options.second_half else 0
    paths = [float_file, *(entry.path for entry in entries)]
    shares = [windows[job :: options.jobs].numpy() for job in range(min(options.jobs, len(windows)))]
    with ProcessPoolExecutor(len(shares), get_context("spawn")) as pool:
        measured = [pool.submit(measure_share, paths, share, first, options.threads) for share in shares]
        for job in measured:
            for entry, tally in zip(entries, job.result(), strict=True):
                entry.texts.setdefault(text, Tally()).include(tally)


def measure_share(paths: Sequence[Path], windows: NDArray[Any], first: int, threads: int) -> list[Tally]:
    """Tallies of `paths[1:]` against `paths[0]` over int64 [windows, tokens], in a process of their own; positions
    before `first` are not scored."""
    torch.set_num_threads(threads)
    reference, *runtimes = [WindowRuntime(path, threads, repack=True) for path in paths]
    tallies = [Tally() for _ in runtimes]
    for window in torch.from_numpy(windows):
        following = window[first + 1 :]
        (wanted,) = next(reference.logits(window[None]))
        expected = wanted[first:-1].log_softmax(-1)
        for runtime, tally in zip(runtimes, tallies, strict=True):
            (logits,) = next(runtime.logits(window[None]))
            tally.add(logits[first:-1], expected, following)
    for runtime in [reference, *runtimes]:
        runtime.close()
    return tallies


def lines(rows: list[dict[str, Any]], texts: Sequence[str]) -> list[str]:
    """The table in Markdown; in our rows, the mean KL over theirs."""
    theirs = {row["type"]: row for row in rows if row["made_by"] == THEIRS}
    head = ["type", "made by", "bytes"]
    for text in texts:
        head += [f"{text}: perplexity (ratio to F32)", "mean KL", "top-1", "KL / theirs"]
    table = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row["type"], row["made_by"], f"{row['bytes']:,}"]
        for text in texts:
            figures = row["texts"][text]
            cells += [f"{figures['perplexity']:.3f} ({figures['perplexity_ratio']:.4f})", f"{figures['mean_kl']:.3e}"]
            cells += [f"{figures['top1']:.2%}", ratio_cell(row, theirs.get(row["type"]), text)]
        table.append(cells)
    return ["| " + " | ".join(cells) + " |" for cells in table]


def ratio_cell(row: dict[str, Any], theirs: dict[str, Any] | None, text: str) -> str:
    if theirs is None or row is theirs:
        return ""
    ratio = row["texts"][text]["mean_kl"] / theirs["texts"][text]["mean_kl"]
    if row["made_by"] != OURS:
        return f"{ratio:.3f}"
    target = TARGETS.get(row["type"], 1.0)
    return f"{ratio:.3f} (target {target:.2f}{'' if ratio <= target else ', missed'})"


def run(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Make the files, measure them, print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    float_file = write_float_gguf(options.model, folder / "float32.gguf")
    entries = make_entries(options, float_file, folder)
    for text in options.text:
        windows = text_windows(options.model, text, options.context)[: options.windows]
        measure(entries, float_file, text.name, windows, options)
    order = {maker: place for place, maker in enumerate((THEIRS, OURS))}
    entries.sort(key=lambda entry: (list(FILE_TYPES).index(entry.type), order.get(entry.maker, len(order))))
    rows = [entry.as_row() for entry in entries]
    part = "second half of each window" if options.second_half else "all but the first token of each window"
    print(f"{options.model.name}, context {options.context}, {options.windows or 'all'} windows, scored: {part}\n")
    print("\n".join(lines(rows, [text.name for text in options.text])))
    return rows


def main() -> None:
    options = arguments()
    if options.keep:
        rows = run(options, options.keep)
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = run(options, Path(folder))
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
