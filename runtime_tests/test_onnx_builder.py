"""Two roads to one graph: the onnxruntime-genai builder fed with our GPTQ files, and our own ONNX files.

Where the builder can read the files, both give the same logits at accuracy_level 0. Where it cannot, docs/onnx.md says
why; here each of those cases is tested to fail in that very way, so that the table is known to hold when the builder
changes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from exporters.gptq.exporter import GptqExporter
from exporters.onnx.exporter import OnnxExporter
from runtime_tests.test_onnx import relative_error
from runtime_tests.test_onnx_families import LLAMA3
from signround.errors import RefusedError
from signround.events import silent
from signround.inspection import inspect_target, inspection_lines
from signround.runtimes.genai import open_genai
from signround.runtimes.gptq_child import CHILD_ENVIRONMENT
from signround.runtimes.ort import open_onnxruntime
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

for package in ("onnxruntime", "onnxruntime_genai"):
    pytest.importorskip(package)

CHILD = Path(__file__).with_name("builder_child.py")
FLOAT_HEAD = ("shared_embeddings=false", "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather")
TOKENS = torch.randint(512, (1, 48), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    """A model, its GPTQ export, and what the builder is asked for besides accuracy_level 0."""

    family: str = "llama"
    scheme: str = "w4g32"
    overrides: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = FLOAT_HEAD
    checkpoint_format: str = "gptq"

    def __str__(self) -> str:
        return "-".join([self.family, self.scheme, *self.overrides])


@dataclass(frozen=True)
class Built:
    """Our folder, the builder's, and what the builder raised."""

    ours: Path
    theirs: Path
    error: str


@pytest.fixture(scope="module")
def builder() -> Iterator[Callable[[Path, Path, tuple[str, ...]], str]]:
    """(GPTQ folder, out, options) -> what the builder raised; one process for the whole module."""
    child = subprocess.Popen(
        [sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, **CHILD_ENVIRONMENT}, text=True,
    )  # fmt: skip

    def run(folder: Path, out: Path, options: tuple[str, ...]) -> str:
        assert child.stdin is not None
        assert child.stdout is not None
        request = {"folder": str(folder), "out": str(out), "options": ["hf_token=false", "accuracy_level=0", *options]}
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        return str(json.loads(child.stdout.readline())["error"])

    yield run
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.close()
    child.wait(30)
    child.stdout.close()


@pytest.fixture
def build(builder: Callable[[Path, Path, tuple[str, ...]], str], tmp_path: Path) -> Callable[[Case], Built]:
    def make(case: Case) -> Built:
        write_small_model(tmp_path / "model", case.family, dtype=torch.float32, **case.overrides)
        floor = 1 if case.checkpoint_format == "gptq" else 0
        artifact = write_rounded_artifact(tmp_path / "model", tmp_path / "artifact", case.scheme, floor)
        GptqExporter(checkpoint_format=case.checkpoint_format).export(artifact, tmp_path / "gptq", silent)
        OnnxExporter(accuracy_level=0).export(artifact, tmp_path / "ours", silent)
        error = builder(tmp_path / "gptq", tmp_path / "theirs", case.options)
        return Built(tmp_path / "ours", tmp_path / "theirs", error)

    return make


def in_onnxruntime(folder: Path) -> Tensor:
    return torch.cat(list(open_onnxruntime(folder, accuracy_level=0).logits(TOKENS)))


def in_genai(folder: Path) -> Tensor:
    """With the cache allocated beforehand, for at least a window."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=64, batch_size=1, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(TOKENS[0].numpy().astype(np.int32))
    return torch.from_numpy(np.array(generator.get_output("logits"), dtype=np.float32))


def assert_alike(built: Built) -> None:
    assert built.error == ""
    ours, theirs = in_onnxruntime(built.ours), in_onnxruntime(built.theirs)
    assert ours.shape == theirs.shape
    assert relative_error(theirs, ours) <= 1e-5
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))


QUICK = [
    Case("llama"), Case("llama", "w2g64-asym"), Case("llama", "w8g32"), Case("llama-untied", "w4g128"),
    Case("llama-biased", "w4g32-asym"), Case("llama3-rope", "w2g32"), Case("smollm2-like", "w4g32"),
    Case("mistral", "w8g128-asym"), Case("qwen2", "w4g32"), Case("qwen3", "w4g32-asym"), Case("qwen3", "w2g128-asym"),
    Case("phi3", "w4g32"), Case("granite", "w4g64-asym"), Case("llama", "w4g16"), Case("llama", "w4gc"),
]  # fmt: skip
READABLE = ("llama", "llama-untied", "mistral", "qwen2", "qwen3", "phi3", "granite")
EVERY = [
    Case(family, f"w{bits}g{group}{kind}")
    for family in READABLE
    for bits in (2, 4, 8)
    for group in (32, 64, 128)
    for kind in ("", "-asym")
]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_the_builders_graph_gives_the_logits_of_ours(case: Case, build: Callable[[Case], Built]) -> None:
    assert_alike(build(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_so_does_every_other_one_that_it_reads(case: Case, build: Callable[[Case], Built]) -> None:
    assert_alike(build(case))


WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


def test_windows_that_the_builder_knows_need_an_allocated_cache(build: Callable[[Case], Built]) -> None:
    """Its windowed layers run in onnxruntime-genai alone; ours in plain onnxruntime too."""
    built = build(Case("qwen2", overrides=WINDOW))
    assert built.error == ""
    ours = in_onnxruntime(built.ours)
    with pytest.raises(Exception, match="KV cache capacity"):
        in_onnxruntime(built.theirs)
    assert relative_error(in_genai(built.theirs), ours) <= 1e-5
    assert relative_error(in_genai(built.ours), ours) <= 1e-5


def test_gemma_2_is_read_a_little_off(build: Callable[[Case], Built]) -> None:
    built = build(Case("gemma2"))
    assert built.error == ""
    ours = in_onnxruntime(built.ours)
    assert 1e-5 < relative_error(in_genai(built.theirs), ours) < 1e-3
    assert relative_error(in_genai(built.ours), ours) <= 1e-5


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_windows_that_it_leaves_out_stop_genai(family: str, build: Callable[[Case], Built]) -> None:
    """Its genai_config.json still names the window, so the cache is too short for the graph."""
    built = build(Case(family, overrides={"sliding_window": 16}))
    assert built.error == ""
    with pytest.raises(Exception, match="GroupQueryAttention"):
        in_genai(built.theirs)
    assert relative_error(in_genai(built.ours), in_onnxruntime(built.ours)) <= 1e-5


RAISES = [
    (Case(scheme="w3g32"), "3-bit quantization is not currently supported"),
    (Case(options=(*FLOAT_HEAD, "fuse_mlp_gate_up=true")), "object has no attribute 'weight'"),
    (Case("olmo2"), "not currently supported"),
    (Case("gemma3"), "KeyError: 'rope_type'"),
    (Case("phi4-mini-like"), "KeyError: 'type'"),
    (Case("smollm3"), "KeyError: 'position_ids'"),
    (Case("granite", overrides={"rope_parameters": LLAMA3}), "llama3 RoPE style is not currently supported"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "error"), RAISES, ids=str)
def test_where_the_builder_gives_up(case: Case, error: str, build: Callable[[Case], Built]) -> None:
    assert error in build(case).error


ASTRAY = [
    (Case(scheme="w4g32-asym", checkpoint_format="gptq_v2"), 0.5, "zero points are read as those of v1"),
    (Case(options=(*FLOAT_HEAD, "use_qdq=true")), 0.5, "unsigned codes become signed ones"),
    (Case(options=()), 1e-2, "embedding and head are rounded to 4 bits"),
    (Case("llama-untied", options=()), 1e-2, "the head is rounded to 4 bits"),
    (Case("mistral", overrides={"sliding_window": 16}), 0.1, "the window is left out"),
    (Case("phi3", overrides={"sliding_window": 16}), 0.5, "the window is left out"),
    (
        Case(overrides={"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        0.1,
        "the scaling of positions is left out",
    ),
]


@pytest.mark.parametrize(("case", "least", "why"), ASTRAY, ids=str)
def test_where_the_builder_writes_another_model(
    case: Case, least: float, why: str, build: Callable[[Case], Built]
) -> None:
    built = build(case)
    assert built.error == ""
    assert relative_error(in_onnxruntime(built.theirs), in_onnxruntime(built.ours)) > least, why


def test_inspect_looks_into_the_builders_folder(build: Callable[[Case], Built]) -> None:
    """The head that it rounds has no accuracy_level: slow at 8 bits, and float32 at 4."""
    built = build(Case("llama-untied", options=()))
    found = inspect_target(built.theirs)
    assert (found["kind"], found["ours"]) == ("onnx", False)
    assert found["problems"] == ["/lm_head/MatMul_Q4: attribute accuracy_level is missing"]
    text = "\n".join(inspection_lines(found))
    assert "model.onnx: onnxruntime-genai" in text
    assert "10 MatMulNBits, 294,912 weights: bits 4, block_size 32, accuracy_level 0, zero points" in text
    with pytest.raises(RefusedError, match="not written by signround"):
        OnnxExporter().opened(built.theirs)
    assert open_genai(built.theirs).vocabulary == 512
