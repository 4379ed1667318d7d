"""GPTQ folders in real loaders: transformers + optimum + gptqmodel, and the onnxruntime-genai builder + onnxruntime.

The models are float32, so that scales use all 11 bits of fp16: with scales of bfloat16 weights the kernel's fp16
products would be exact and the tests blind to precision. Each loader runs in one child process for the whole module
(8 s to start).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exporters.gptq import independent
from exporters.gptq.config import read_format
from exporters.gptq.exporter import SINGLE, GptqExporter
from signround.artifact import QuantizedCheckpoint
from signround.errors import FailedError, RefusedError
from signround.events import silent
from signround.exporting import ExportedModel
from signround.loading import load
from signround.runtimes import gptq as runtimes
from signround.runtimes.gptq_child import Child
from signround.runtimes.protocol import Runtime
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import DENSE, FAMILIES, write_small_model

needs_gptqmodel = pytest.mark.skipif(
    not all(find_spec(name) for name in runtimes.LOADERS), reason="needs the extra: pip install signround[gptq]"
)
needs_builder = pytest.mark.skipif(
    not all(find_spec(name) for name in runtimes.BUILDER_LOADERS),
    reason="needs the extras: pip install signround[genai,onnx]",
)

# Covering selection: every family and every kind of scheme at least once; the whole product is marked slow.
SELECTED = [
    ("llama", "w4g32", "gptq"),
    ("llama-untied", "w2g32", "gptq"),
    ("llama-biased", "w8g32", "gptq"),
    ("llama3-rope", "w4g128", "gptq"),
    ("smollm2-like", "w3g32", "gptq"),
    ("mistral", "w4gc", "gptq"),
    ("qwen2", "w4g32-asym", "gptq"),
    ("qwen3", "w4g32", "gptq"),
    ("llama", "w4g32-asym", "gptq_v2"),
    ("llama", "w3g32-asym", "gptq"),
    ("gemma2", "w4g32", "gptq"),
    ("gemma3", "w8g32", "gptq"),
    ("phi3", "w4g32", "gptq"),
    ("phi4-mini-like", "w4g32-asym", "gptq"),
    ("smollm3", "w4g32", "gptq"),
    ("granite", "w4g32", "gptq"),
    ("olmo2", "w4g32", "gptq"),
]
SCHEMES = ["w2g32", "w2g32-asym", "w3g32", "w4g16", "w4g32", "w4gc", "w4gc-asym", "w8g32", "w8g32-asym", "q8_0"]
PRODUCT = [(family, scheme, "gptq") for family in DENSE for scheme in SCHEMES]
PRODUCT += [("llama", scheme, "gptq_v2") for scheme in SCHEMES]
CASES = [
    pytest.param(case, id="-".join(case), marks=[] if case in SELECTED else pytest.mark.slow)
    for case in [*SELECTED, *(case for case in PRODUCT if case not in SELECTED)]
]
IN_BUILDER = [
    param
    for param in CASES
    if "w3" not in param.values[0][1]
    and param.values[0][2] == "gptq"
    and FAMILIES[param.values[0][0]]["model_type"] in runtimes.BUILDER_FAMILIES
]
# One group a row is a block of 16 to 256 inputs in onnxruntime, or nothing.
IN_ONNX = [param for param in IN_BUILDER if "gc" not in param.id or param.values[0][0] not in ("qwen3", "smollm2-like")]
EXAMPLE = Path(__file__).parents[1] / "examples" / "llama-4m"
KERNEL_ERROR = 2e-3  # fp16 products of the torch kernel; measured 5e-4 to 7e-4
EXACT_ERROR = 1e-6  # the order of float32 sums; measured 0 to 2e-7
ONNX_ERROR = 1e-5  # the same and another implementation of every operator; measured 1e-6

Case = tuple[str, str, str]


@dataclass(frozen=True)
class Job:
    """One exported model and what it must compute; `half_logits` with biases in fp16, as gptqmodel keeps them."""

    artifact: QuantizedCheckpoint
    exported: ExportedModel
    windows: Tensor
    logits: Tensor
    half_logits: Tensor


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Case], Job]]:
    """Make each case once."""
    made: dict[Case, Job] = {}

    def make(case: Case) -> Job:
        if case not in made:
            made[case] = _make(tmp_path_factory.mktemp("gptq"), *case)
        return made[case]

    yield make
    for finished in made.values():
        shutil.rmtree(finished.exported.target.parent)


def _make(folder: Path, family: str, scheme: str, checkpoint_format: str) -> Job:
    model = write_small_model(folder / "model", family, dtype=torch.float32)
    return _finish(model, folder, scheme, checkpoint_format)


def _finish(model: Path, folder: Path, scheme: str, checkpoint_format: str) -> Job:
    exporter = GptqExporter(checkpoint_format)
    artifact = write_rounded_artifact(model, folder / "artifact", scheme, exporter.zero_floor)
    exported = exporter.export(artifact, folder / "gptq", silent)
    windows = torch.randint(0, 512, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        reference = load(artifact.folder)
        logits = reference(windows).logits
        for name, parameter in reference.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(parameter.half())
        return Job(artifact, exported, windows, logits, reference(windows).logits)


@pytest.fixture(scope="module")
def loader() -> Iterator[Child]:
    with runtimes.start_gptq_child() as child:
        yield child


@pytest.fixture(scope="module")
def builder() -> Iterator[Child]:
    with runtimes.start_builder_child() as child:
        yield child


def error_of(runtime: Runtime, windows: Tensor, expected: Tensor) -> float:
    """|logits - expected| / |expected|; closes the runtime."""
    found = torch.cat(list(runtime.logits(windows)))
    assert found.shape == expected.shape == (*windows.shape, runtime.vocabulary)
    assert found.dtype == torch.float32
    runtime.close()
    return float((found - expected).norm() / expected.norm())


def assert_exact(job: Job, decoded: Iterator[tuple[str, Tensor]]) -> None:
    """Every tensor of the model, once, and bit for bit."""
    found = dict(decoded)
    assert set(found) == {*job.artifact.layers, *job.artifact.kept}
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, job.artifact.weight(name)), name


@needs_gptqmodel
@pytest.mark.parametrize("case", CASES)
def test_gptqmodel_decodes_every_weight_exactly(case: Case, job: Callable[[Case], Job], loader: Child) -> None:
    made = job(case)
    assert_exact(made, independent.decoded_by_gptqmodel(made.exported, read_format(made.exported.target), loader))


@needs_gptqmodel
@pytest.mark.parametrize("case", CASES)
def test_transformers_gives_the_logits_of_the_decoded_weights(
    case: Case, job: Callable[[Case], Job], loader: Child
) -> None:
    made = job(case)
    exact = runtimes.open_gptq(made.exported.target, exact_products=True, child=loader)
    assert exact.scale_dtype == "float32"
    assert error_of(exact, made.windows, made.half_logits) <= EXACT_ERROR
    shipped = runtimes.open_gptq(made.exported.target, child=loader)
    assert shipped.scale_dtype == "float16"
    assert error_of(shipped, made.windows, made.logits) <= KERNEL_ERROR


@needs_builder
@pytest.mark.parametrize("case", IN_BUILDER)
def test_the_builder_decodes_every_weight_exactly(case: Case, job: Callable[[Case], Job], builder: Child) -> None:
    made = job(case)
    assert_exact(made, independent.decoded_by_builder(made.exported, builder))


@needs_builder
@pytest.mark.parametrize("case", IN_ONNX)
def test_onnxruntime_through_the_builder_gives_the_logits(
    case: Case, job: Callable[[Case], Job], builder: Child, tmp_path: Path
) -> None:
    made = job(case)
    runtime = runtimes.open_gptq_through_builder(made.exported.target, tmp_path, child=builder)
    assert error_of(runtime, made.windows, made.logits) <= ONNX_ERROR


@needs_gptqmodel
def test_shards_load_without_a_missing_key(job: Callable[[Case], Job], loader: Child, tmp_path: Path) -> None:
    made = job(("llama-biased", "w8g32", "gptq"))
    exporter = GptqExporter(max_shard_bytes=60_000)
    sharded = exporter.export(made.artifact, tmp_path / "gptq", silent)
    assert len(sharded.files) > 8
    assert_exact(made, independent.decoded_by_gptqmodel(sharded, read_format(sharded.target), loader))
    runtime = runtimes.open_gptq(sharded.target, exact_products=True, child=loader)
    assert error_of(runtime, made.windows, made.half_logits) <= EXACT_ERROR


@needs_gptqmodel
@needs_builder
def test_a_trained_bfloat16_model_in_both_loaders(loader: Child, builder: Child, tmp_path: Path) -> None:
    """Norms and embeddings stay bfloat16 beside fp16 scales, and nothing is lost."""
    made = _finish(EXAMPLE, tmp_path, "w4g32", "gptq")
    assert {made.artifact.tensor(name).dtype for name in made.artifact.kept} == {torch.bfloat16}
    assert_exact(made, independent.decoded_by_builder(made.exported, builder))
    exact = runtimes.open_gptq(made.exported.target, exact_products=True, child=loader)
    assert error_of(exact, made.windows, made.logits) <= EXACT_ERROR
    onnx = runtimes.open_gptq_through_builder(made.exported.target, tmp_path, child=builder)
    assert error_of(onnx, made.windows, made.logits) <= ONNX_ERROR


@needs_gptqmodel
def test_the_default_reader_and_a_wrong_bit(job: Callable[[Case], Job], tmp_path: Path) -> None:
    """Through the exporter's own door, in a child of its own: one flipped bit is one wrong tensor."""
    made = job(("llama", "w4g32", "gptq"))
    folder = tmp_path / "gptq"
    shutil.copytree(made.exported.target, folder)
    flip_a_bit(folder / SINGLE, "model.layers.1.mlp.up_proj.qweight")
    decoded = GptqExporter().decode_independently(GptqExporter().opened(folder))
    wrong = [name for name, tensor in decoded if not torch.equal(tensor, made.artifact.weight(name))]
    assert wrong == ["model.layers.1.mlp.up_proj.weight"]


def flip_a_bit(path: Path, name: str) -> None:
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin, _ = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    content[8 + length + begin] ^= 1
    path.write_bytes(content)


@needs_gptqmodel
def test_a_missing_tensor_fails_the_load(job: Callable[[Case], Job], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "gptq"
    shutil.copytree(job(("llama", "w4g32", "gptq")).exported.target, folder)
    tensors = load_file(folder / SINGLE)
    del tensors["model.layers.0.mlp.up_proj.qzeros"]
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(FailedError, match=r"did not load every tensor.*layers\.0\.mlp\.up_proj\.qzeros"):
        runtimes.open_gptq(folder)


def test_the_builder_is_not_asked_for_what_it_gets_wrong(job: Callable[[Case], Job], tmp_path: Path) -> None:
    for case in [("smollm2-like", "w3g32", "gptq"), ("llama", "w4g32-asym", "gptq_v2"), ("qwen3", "w4gc", "gptq")]:
        with pytest.raises(RefusedError, match=r"the folder holds .-bit .* in blocks of"):
            runtimes.open_gptq_through_builder(job(case).exported.target, tmp_path)
    with pytest.raises(RefusedError, match=r"llama, mistral, qwen2, qwen3 models, this is a 'phi3'"):
        runtimes.open_gptq_through_builder(job(("phi3", "w4g32", "gptq")).exported.target, tmp_path)


def test_without_the_extras_the_sentence_names_them(
    job: Callable[[Case], Job], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = job(("llama", "w4g32", "gptq"))
    for module in (runtimes, independent):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(RefusedError, match=r"pip install 'signround\[gptq\]'"):
        runtimes.open_gptq(made.exported.target)
    with pytest.raises(RefusedError, match=r"pip install 'signround\[genai,onnx\]'"):
        runtimes.open_gptq_through_builder(made.exported.target, tmp_path)
    with pytest.raises(RefusedError, match=r"pip install signround\[gptq\]"):
        GptqExporter().decode_independently(made.exported)
