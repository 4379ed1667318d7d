"""The child processes of `onnx_vs_builder.py`: one decoder folder in one runtime, or one export, measured from inside.

    python benchmarks/onnx_worker.py serve raw|genai FOLDER --threads 1
    python benchmarks/onnx_worker.py export signround|builder SOURCE OUT

`serve` loads the folder, prints what that took as one line of JSON, then answers one line of JSON a request,
{"work": "prefill" | "decode", "tokens": N, "times": N}, with the seconds of each repetition (on the clock, of the
processor). It imports nothing but numpy and the runtime, so its resident memory is the runtime's. `export` prints its
peak memory. Peaks are VmHWM: ru_maxrss of a child can be what its parent had resident.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

ACCURACY_LEVEL = 4
PAST, PRESENT = "past_key_values.", "present."
Seconds = tuple[float, float]  # on the clock, of the processor


class Sequence(Protocol):
    """One sequence and its cache."""

    def append(self, tokens: list[int], past: int) -> Seconds:
        """Time to read `tokens` behind the first `past` tokens of the cache; what lay behind them is forgotten."""
        ...


class RawDecoder:
    """Plain onnxruntime."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime

        settings: dict[str, Any] = json.loads((folder / "genai_config.json").read_text())
        decoder = settings["model"]["decoder"]
        self.vocabulary: int = settings["model"]["vocab_size"]
        self.shared: bool = settings["search"]["past_present_share_buffer"]
        self.heads, self.size = decoder["num_key_value_heads"], decoder["head_size"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [value.name for value in self.session.get_inputs()]

    def begin(self, capacity: int) -> RawSequence:
        return RawSequence(self, capacity)


class RawSequence:
    """Bound buffers. Past and present are one buffer where the graph was made for it; else the cache of the last
    tokens that were more than one is the past of every single one, and what that makes is dropped."""

    def __init__(self, decoder: RawDecoder, capacity: int) -> None:
        import numpy as np
        from onnxruntime import OrtValue

        self._np, self._decoder = np, decoder
        shape = [1, decoder.heads, capacity if decoder.shared else 0, decoder.size]
        names = [name for name in decoder.inputs if name.startswith(PAST)]
        self._cache = {name: OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cpu") for name in names}

    def append(self, tokens: list[int], past: int) -> Seconds:
        np, binding, total = self._np, self._decoder.session.io_binding(), past + len(tokens)
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        if "position_ids" in self._decoder.inputs:
            binding.bind_cpu_input("position_ids", np.arange(past, total, dtype=np.int64)[None])
        binding.bind_output("logits", "cpu")
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
            if self._decoder.shared:
                binding.bind_ortvalue_output(name.replace(PAST, PRESENT), value)
            else:
                binding.bind_output(name.replace(PAST, PRESENT), "cpu")
        seconds = timed(lambda: self._decoder.session.run_with_iobinding(binding))
        if not self._decoder.shared and len(tokens) > 1:
            _, *presents = binding.get_outputs()
            self._cache = dict(zip(self._cache, presents, strict=True))
        return seconds


class GenaiDecoder:
    """onnxruntime-genai."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai

        self.vocabulary: int = json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"]
        config = onnxruntime_genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = onnxruntime_genai.Model(config)

    def begin(self, capacity: int) -> GenaiSequence:
        return GenaiSequence(self, capacity)


class GenaiSequence:
    """Tokens are appended, never drawn, so sampling and end tokens play no part."""

    def __init__(self, decoder: GenaiDecoder, capacity: int) -> None:
        import numpy as np
        import onnxruntime_genai

        self._np = np
        parameters = onnxruntime_genai.GeneratorParams(decoder.model)
        parameters.set_search_options(max_length=capacity, batch_size=1, do_sample=False)
        self._generator = onnxruntime_genai.Generator(decoder.model, parameters)

    def append(self, tokens: list[int], past: int) -> Seconds:
        if past < self._generator.token_count():
            self._generator.rewind_to(past)
        ids = self._np.array(tokens, self._np.int32)
        return timed(lambda: self._generator.append_tokens(ids))


RUNTIMES = {"raw": RawDecoder, "genai": GenaiDecoder}


def timed(work: Callable[[], object]) -> Seconds:
    """Seconds that pass, and that the processor spends on this process."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def any_tokens(count: int, vocabulary: int) -> list[int]:
    """Token ids that are spread over the vocabulary and the same every time."""
    return [(7 + 7919 * index) % vocabulary for index in range(count)]


class Bench:
    """Answers requests on one decoder; keeps the sequences that decoding goes on from."""

    def __init__(self, decoder: RawDecoder | GenaiDecoder) -> None:
        self._decoder = decoder
        self._read: dict[int, Sequence] = {}

    def answer(self, work: str, tokens: int, times: int) -> list[Seconds]:
        """`times` prefills of `tokens` from an empty cache, or single tokens behind `tokens`."""
        *prompt, last = any_tokens(tokens + 1, self._decoder.vocabulary)
        if work == "prefill":
            return [self._decoder.begin(tokens).append(prompt, 0) for _ in range(times)]
        if tokens not in self._read:
            self._read[tokens] = self._decoder.begin(tokens + 1)
            self._read[tokens].append(prompt, 0)
        return [self._read[tokens].append([last], tokens) for _ in range(times)]


def status(field: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def serve(runtime: str, folder: Path, threads: int) -> None:
    """Load, report, answer until the input ends."""
    import numpy

    numpy.zeros(1)
    __import__({"raw": "onnxruntime", "genai": "onnxruntime_genai"}[runtime])
    before, started = status("VmRSS"), time.perf_counter()
    decoder = RUNTIMES[runtime](folder, threads)
    seconds = time.perf_counter() - started
    report = {"seconds": seconds, "before": before, "resident": status("VmRSS"), "peak": status("VmHWM")}
    print(json.dumps(report), flush=True)
    bench = Bench(decoder)
    for line in sys.stdin:
        print(json.dumps(bench.answer(**json.loads(line))), flush=True)


def export_ours(source: Path, out: Path) -> int:
    """`source` is an artifact. Bytes that were resident when everything was imported."""
    import onnx_ir  # noqa: F401  # which the exporter imports when it begins

    from signround.pipeline import export

    before = status("VmRSS")
    export(source, "onnx", out, options={"accuracy_level": str(ACCURACY_LEVEL)})
    return before


def export_theirs(source: Path, out: Path) -> int:
    """`source` is a GPTQ folder, or a float model when it is not quantised. The head stays float, as in our graphs, and
    is not tied to the embedding: the builder would round a tied table to 4 bits."""
    from onnxruntime_genai.models import builder

    before = status("VmRSS")
    quantised = "quantization_config" in json.loads((source / "config.json").read_text())
    options = ["hf_token=false", "shared_embeddings=false"]
    if quantised:
        options += [f"accuracy_level={ACCURACY_LEVEL}", "nodes_to_exclude=/lm_head/MatMul"]
    with tempfile.TemporaryDirectory() as cache:
        place = ("", str(source), str(out), "int4" if quantised else "fp32", "cpu", cache)
        builder.create_model(*place, **builder.parse_extra_options(*place, options))
    return before


EXPORTS = {"signround": export_ours, "builder": export_theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve")
    serving.add_argument("runtime", choices=RUNTIMES)
    serving.add_argument("folder", type=Path)
    serving.add_argument("--threads", type=int, default=1)
    exporting = commands.add_parser("export")
    exporting.add_argument("maker", choices=EXPORTS)
    exporting.add_argument("source", type=Path)
    exporting.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "serve":
        serve(args.runtime, args.folder, args.threads)
        return
    with contextlib.redirect_stdout(sys.stderr):
        before = EXPORTS[args.maker](args.source, args.out)
    logging.shutdown()
    print(json.dumps({"before": before, "peak": status("VmHWM")}))


if __name__ == "__main__":
    main()
