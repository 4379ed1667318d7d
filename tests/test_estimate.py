"""The resolved plan: every tensor is in it, and its sizes are those of the files to come."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from signround.checkpoint import SourceCheckpoint
from signround.estimate import describe, describe_lines, memory_bytes
from signround.pipeline import Job, export, prepare, tune

FAST: dict[str, Any] = {"method": "rtn", "samples": 2, "seqlen": 16}


def job(folder: Path, out: Path, to: tuple[str, ...] = (), **changes: Any) -> Job:
    return prepare(folder, "w4g32", out, to, **(FAST | changes))


def test_every_tensor_is_accounted_for(untied_folder: Path, tmp_path: Path) -> None:
    description = describe(job(untied_folder, tmp_path / "out"))
    names = [entry["name"] for entry in description["quantized"] + description["kept"]] + [*description["skipped"]]
    assert sorted(names) == sorted(SourceCheckpoint(untied_folder).tensors)
    assert all(entry["reason"] for entry in description["quantized"] + description["kept"])
    assert description["parameters"] == SourceCheckpoint(untied_folder).parameters
    json.dumps(description)


def test_estimated_sizes_are_the_real_ones(llama_folder: Path, tmp_path: Path) -> None:
    planned = job(llama_folder, tmp_path / "out", ("gguf", "onnx", "gptq"))
    sizes = describe(planned)["bytes"]
    artifact = tune(planned)
    written = sum(path.stat().st_size for path in artifact.folder.rglob("*.safetensors"))
    assert sizes["artifact"] == pytest.approx(written, rel=0.1)
    for exporter in planned.exporters:
        files = export(artifact, exporter, tmp_path / exporter.name).files
        found = sum(path.stat().st_size for path in files)
        # Small files beside the weights (tokenizer, graph) are not estimated by every exporter.
        small = sum(path.stat().st_size for path in files if path.suffix in (".json", ".jinja"))
        assert sizes[exporter.name] == pytest.approx(found, abs=0.05 * found + small)


def test_memory_grows_with_the_settings_not_with_the_blocks(llama_folder: Path, tmp_path: Path) -> None:
    one = memory_bytes(job(llama_folder, tmp_path / "out", method="signround", recipe="fast", samples=4, iters=1))
    more = memory_bytes(job(llama_folder, tmp_path / "out", method="signround", recipe="fast", samples=400, iters=1))
    draft = memory_bytes(job(llama_folder, tmp_path / "out", method="signround-400", samples=400, iters=1))
    ahead = memory_bytes(job(llama_folder, tmp_path / "out", method="signround", samples=400, iters=1))
    hidden = 16 * 128 * 4
    assert more["tune"] - one["tune"] >= 2 * 396 * hidden
    assert draft["tune"] - more["tune"] == 400 * hidden  # the draft keeps the float inputs too
    assert ahead["tune"] - more["tune"] > 400 * hidden  # the next block's targets, and the block itself
    assert memory_bytes(job(llama_folder, tmp_path / "out"))["tune"] < one["tune"]  # rtn has no hidden states


def test_linears_that_are_kept_are_in_memory_too(llama_folder: Path, tmp_path: Path) -> None:
    """Whatever is not tuned of a block is still run, and so is all of the block that follows."""

    def peaks(*overrides: str) -> dict[str, int]:
        return memory_bytes(job(llama_folder, tmp_path / "out", method="signround", tensor_types=overrides))

    every, some = peaks(), peaks("down_proj=float")  # gate and up are as large: the largest layer is the same
    assert some["evaluate"] == every["evaluate"]
    assert every["tune"] - some["tune"] == 12 * 4 * 128 * 256  # tuned no more, and still held beside the tuned block


def test_lines_for_a_person(llama_folder: Path, tmp_path: Path) -> None:
    description = describe(job(llama_folder, tmp_path / "out", ("gptq",)))
    text = "\n".join(describe_lines(description))
    for part in ("LlamaForCausalLM", "quantised: 14, scheme w4g32", "norms are not quantised", "gptq",
                 "peak memory", description["fingerprint"]):  # fmt: skip
        assert part in text
    assert math.isfinite(description["seconds"])
    assert not (tmp_path / "out").exists()  # a plan does no work
