"""Every flavour of the ONNX graph against transformers on the decoded weights: whole, in steps, in chunks, padded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from exporters.onnx.exporter import OnnxExporter
from runtime_tests.test_onnx import all_logits, mean_kl, reference_model, relative_error, windows
from signround.artifact import QuantizedCheckpoint
from signround.errors import FailedError
from signround.events import silent
from signround.loading import load
from signround.parity import HALF_GRAPH, verify
from signround.runtimes.genai import open_genai
from signround.runtimes.ort import OnnxRuntime, open_onnxruntime
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import FAMILIES, MIXTURES, write_small_model

pytest.importorskip("onnxruntime")

STD = {"flavour": "std"}
PURE = {"flavour": "std", "weights": "dequantize"}
HALF = {"dtype": "fp16"}
# Windows, caps, partial rotation, blocks without positions, biases, norms of q and k over a head or over all of them.
COVERING = [
    ("llama", "w4g32", {}),
    ("llama-biased", "w4g64-asym", {}),
    ("llama3-rope", "w8g32", {}),
    ("smollm2-like", "w4gc-asym", {}),
    ("mistral", "w3g32", {"sliding_window": 16}),
    ("qwen2", "w2g64-asym", {}),
    ("qwen3", "w2g32", {}),
    ("gemma2", "w4g32", {}),
    ("gemma3", "w8g64-asym", {}),
    ("phi3", "w3g32-asym", {}),
    ("phi4-mini-like", "w4g32", {}),
    ("smollm3", "w4g128-asym", {}),
    ("granite", "w4g32", {}),
    ("olmo2", "q8_0", {}),
    ("llama-untied", "w2g128-asym", {}),
]
SOME_SLOW = [
    pytest.param(*case, marks=[] if index % 4 == 1 else pytest.mark.slow) for index, case in enumerate(COVERING)
]
WINDOWS = {family: {"sliding_window": 16} for family in ("mistral", "phi3", "mixtral")}  # Gemma has its own
CACHED = [(family, WINDOWS.get(family, {})) for family in FAMILIES]


@dataclass
class Case:
    """A small model, its artifact, and its graphs."""

    folder: Path
    artifact: QuantizedCheckpoint

    @cached_property
    def reference(self) -> Any:
        mixture = self.artifact.plan.architecture.mixture
        return reference_model(self.artifact) if mixture is None else load(self.artifact.folder)

    @torch.no_grad()
    def wanted(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.reference(tokens).logits
        return logits

    def exported(self, level: int = 0, **options: str) -> Path:
        out = self.folder / "-".join([str(level), *options.values()])
        if not out.exists():
            OnnxExporter(level, **options).export(self.artifact, out, silent)
        return out

    def runtime(self, **options: str) -> OnnxRuntime:
        return open_onnxruntime(self.exported(**options), threads=1)


Maker = Callable[..., Case]


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    made: dict[str, Case] = {}

    def make(family: str, scheme: str = "w4g32", **overrides: Any) -> Case:
        key = f"{family} {scheme} {overrides}"
        if key not in made:
            folder = tmp_path_factory.mktemp("flavours")
            write_small_model(folder / "model", family, **overrides)
            made[key] = Case(folder, write_rounded_artifact(folder / "model", folder / "artifact", scheme))
        return made[key]

    return make


@pytest.mark.parametrize("options", [STD, PURE], ids=["matmulnbits", "dequantize"])
@pytest.mark.parametrize(("family", "scheme", "overrides"), COVERING)
def test_std_is_transformers_on_the_decoded_weights(
    case_of: Maker, family: str, scheme: str, overrides: dict[str, Any], options: dict[str, str]
) -> None:
    case, tokens = case_of(family, scheme, **overrides), windows(512)
    runtime = case.runtime(**options)
    assert "accuracy_level 0" in runtime.name
    assert relative_error(all_logits(runtime.logits(tokens)), case.wanted(tokens)) <= 1e-5


def test_long_texts_rotate_by_the_long_factors(case_of: Maker) -> None:
    case = case_of("phi4-mini-like")
    tokens = windows(512, count=1, tokens=300)
    found = all_logits(case.runtime(**STD).logits(tokens))
    assert relative_error(found, case.wanted(tokens)) <= 1e-5
    # the lengths of rows are their own: a short one beside a long one keeps the short factors
    mask = torch.ones(2, 300, dtype=torch.int64)
    mask[1, :200] = 0
    batch, _ = case.runtime(**STD).step(tokens.repeat(2, 1), mask=mask)
    assert relative_error(batch[:1], found) <= 1e-5
    assert relative_error(batch[1:, 200:], case.wanted(tokens[:, 200:])) <= 1e-5


@pytest.mark.parametrize(("family", "overrides"), CACHED)
def test_chunks_and_single_steps_are_the_full_forward(case_of: Maker, family: str, overrides: dict[str, Any]) -> None:
    case, tokens = case_of(family, **overrides), windows(512, count=2, tokens=40)
    runtime = case.runtime(**STD)
    parts, cache = [], None
    for start, end in [(0, 20), (20, 33), *[(index, index + 1) for index in range(33, 40)]]:
        logits, cache = runtime.step(tokens[:, start:end], cache)
        parts.append(logits)
    assert relative_error(torch.cat(parts, 1), case.wanted(tokens)) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "overrides"), CACHED)
def test_padded_rows_are_the_rows_alone(case_of: Maker, family: str, overrides: dict[str, Any], side: str) -> None:
    """Prompts of 31, 20 and 5 tokens in one batch, then five more tokens for each, one by one. A whole chunk may be
    padding (left, 5 tokens in chunks of 16)."""
    case, tokens, lengths = case_of(family, **overrides), windows(512, count=3, tokens=36), (31, 20, 5)
    runtime = case.runtime(**STD)
    prompts, mask = torch.zeros(3, 31, dtype=torch.int64), torch.zeros(3, 31, dtype=torch.int64)
    places = [slice(31 - length, 31) if side == "left" else slice(0, length) for length in lengths]
    for row, (length, place) in enumerate(zip(lengths, places, strict=True)):
        prompts[row, place], mask[row, place] = tokens[row, :length], 1
    parts, cache = [], None
    for start, end in [(0, 16), (16, 31)]:
        logits, cache = runtime.step(prompts[:, start:end], cache, mask[:, start:end])
        parts.append(logits)
    whole, _ = runtime.step(prompts, mask=mask)
    for index in range(5):
        following = torch.stack([tokens[row, length + index] for row, length in enumerate(lengths)])
        logits, cache = runtime.step(following[:, None], cache)
        parts.append(logits)
    for row, (length, place) in enumerate(zip(lengths, places, strict=True)):
        wanted = case.wanted(tokens[row : row + 1, : length + 5])[0]
        found = torch.cat(parts, 1)[row]
        assert relative_error(whole[row, place], wanted[:length]) <= 1e-5
        assert relative_error(torch.cat([found[place], found[31:]]), wanted) <= 1e-5


@pytest.mark.parametrize(("family", "scheme", "overrides"), COVERING[::3])
def test_flavours_are_equal(case_of: Maker, family: str, scheme: str, overrides: dict[str, Any]) -> None:
    case, tokens = case_of(family, scheme, **overrides), windows(512)
    contrib = all_logits(case.runtime().logits(tokens))
    for options in (STD, PURE):
        assert relative_error(all_logits(case.runtime(**options).logits(tokens)), contrib) <= 1e-5


def test_std_takes_heads_that_contrib_refuses(case_of: Maker) -> None:
    case, tokens = case_of("llama", head_dim=20), windows(512)
    (refusal,) = OnnxExporter().refusals(case.artifact.plan)
    assert refusal.next_step.startswith("add `--set onnx.flavour=std`")
    for options in (STD, PURE):
        assert OnnxExporter(**options).refusals(case.artifact.plan) == []
        assert relative_error(all_logits(case.runtime(**options).logits(tokens)), case.wanted(tokens)) <= 1e-5


def test_contrib_takes_padding_at_the_end_of_rows(case_of: Maker) -> None:
    case, tokens = case_of("llama"), windows(512, count=2, tokens=20)
    mask = torch.ones_like(tokens)
    mask[1, 12:] = 0
    runtime = case.runtime()
    logits, cache = runtime.step(tokens, mask=mask)
    assert relative_error(logits[0], case.wanted(tokens[:1])[0]) <= 1e-5
    assert relative_error(logits[1, :12], case.wanted(tokens[1:, :12])[0]) <= 1e-5
    with pytest.raises(FailedError, match="cannot run"):  # a chunk of several rows after a past: the kernel refuses
        runtime.step(tokens, cache)


def test_pure_graphs_run_in_the_reference_of_the_standard(case_of: Maker) -> None:
    """The onnx package's own evaluator: no onnxruntime, no fusion, no operator that is not in the standard."""
    from onnx import reference

    case, tokens = case_of("gemma2"), windows(512, count=2, tokens=24)
    session = reference.ReferenceEvaluator(str(case.exported(**PURE) / "model.onnx"))
    empty = {
        name: np.zeros((2, 2, 0, 64), np.float32) for name in session.input_names if name.startswith("past_key_values.")
    }
    feeds = {"input_ids": tokens.numpy(), "attention_mask": np.ones((2, 24), np.int64), **empty}
    (logits,) = session.run(["logits"], feeds)
    assert relative_error(torch.from_numpy(logits), case.wanted(tokens)) <= 1e-5


@pytest.mark.parametrize("scheme", ["w4g32", "w8g64-asym", "w2g64-asym", "w3gc"])
def test_onnxruntime_fuses_every_dequantized_weight(case_of: Maker, scheme: str, tmp_path: Path) -> None:
    """One MatMulNBits for each, at the level that the session asks for; biases do not come in the way."""
    import onnx
    import onnxruntime

    folder = case_of("qwen2", scheme).exported(**PURE)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(str(tmp_path / "optimized.onnx"), load_external_data=False).graph.node
    levels = [a.i for node in nodes if node.op_type == "MatMulNBits" for a in node.attribute if "level" in a.name]
    assert levels == [4] * 8
    assert not any(node.op_type in ("DequantizeLinear", "MatMul") for node in nodes)


def test_without_fusion_the_weights_are_the_same(case_of: Maker) -> None:
    import onnxruntime

    case, tokens = case_of("qwen2", "w2g64-asym"), windows(512)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = str(case.exported(4, **PURE) / "model.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    runtime = OnnxRuntime(session, "unfused", case.folder)
    assert relative_error(all_logits(runtime.logits(tokens)), case.wanted(tokens)) <= 1e-5


@pytest.mark.parametrize("options", [HALF, {**STD, **HALF}, {**PURE, **HALF}], ids=["contrib", "std", "pure"])
@pytest.mark.parametrize(("family", "scheme", "overrides"), SOME_SLOW)
def test_fp16_stays_within_its_gate(
    case_of: Maker, family: str, scheme: str, overrides: dict[str, Any], options: dict[str, str]
) -> None:
    case, tokens = case_of(family, scheme, **overrides), windows(512)
    runtime = case.runtime(**options)
    found, wanted = all_logits(runtime.logits(tokens)), case.wanted(tokens)
    assert found.dtype == torch.float32
    assert 1e-5 < relative_error(found, wanted) <= 3e-3  # measured 4e-4 to 1.7e-3; the lower bound: fp16 did run
    assert mean_kl(wanted, found) <= 2e-5
    assert 3e-3 < HALF_GRAPH.relative_error <= 1e-2
    logits, cache = runtime.step(tokens[:1, :40])
    steps = [logits]
    for index in range(40, 48):
        logits, cache = runtime.step(tokens[:1, index : index + 1], cache)
        steps.append(logits)
    assert relative_error(torch.cat(steps, 1), wanted[:1]) <= 3e-3


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_in_the_std_flavour(case_of: Maker, family: str) -> None:
    case, tokens = case_of(family, **WINDOWS.get(family, {})), windows(512)
    assert relative_error(all_logits(case.runtime(**STD).logits(tokens)), case.wanted(tokens)) <= 1e-5


@pytest.mark.parametrize("options", [STD, PURE, {**STD, **HALF}], ids=["std", "pure", "half"])
def test_verify_judges_every_form(case_of: Maker, options: dict[str, str]) -> None:
    case, tokens = case_of("llama"), windows(512, count=2)
    exporter = OnnxExporter(0, **options)
    parity = verify(case.artifact, exporter, exporter.opened(case.exported(**options)), tokens)
    assert parity.weights.passed
    assert parity.exact_logits is not None
    assert parity.exact_logits.passed
    assert (parity.exact_logits.gate == HALF_GRAPH) == ("dtype" in options)
    assert parity.logits is not None
    assert parity.logits.speed is not None


FORMS = [{}, STD, PURE, HALF, {**PURE, **HALF}]


@pytest.mark.parametrize("options", FORMS, ids=["contrib", "std", "pure", "half", "pure-half"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_genai_runs_every_flavour(case_of: Maker, family: str, options: dict[str, str]) -> None:
    pytest.importorskip("onnxruntime_genai")
    case, tokens = case_of(family), windows(512, count=2, tokens=20)
    folder = case.exported(**options)
    genai = open_genai(folder)
    raw = all_logits(open_onnxruntime(folder).logits(tokens))
    assert relative_error(all_logits(genai.logits(tokens)), raw) <= 1e-6
    if "dtype" in options:
        return  # fp16 may choose another of two near tokens
    prompt = tokens[:1]
    wanted = case.reference.generate(prompt, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert torch.equal(genai.greedy(prompt[0], 24), wanted[0, 20:])


@pytest.mark.parametrize("options", [{}, STD, PURE], ids=["contrib", "std", "pure"])
def test_genai_answers_a_batch_of_unequal_prompts(case_of: Maker, options: dict[str, str]) -> None:
    """Padded on the right, with the pad token of the configuration: what each prompt alone would be answered."""
    package = pytest.importorskip("onnxruntime_genai")
    folder = case_of("llama").exported(**options)
    prompts = [
        row.tolist() for row in (windows(500, count=1, tokens=12)[0] + 2, windows(500, count=1, tokens=7)[0] + 2)
    ]
    alone = [open_genai(folder).greedy(torch.tensor(prompt), 8).tolist() for prompt in prompts]
    parameters = package.GeneratorParams(package.Model(str(folder)))
    parameters.set_search_options(max_length=20, batch_size=2, do_sample=False)
    generator = package.Generator(package.Model(str(folder)), parameters)
    generator.append_tokens(np.array([prompts[0], prompts[1] + [1] * 5], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert [generator.get_sequence(row)[12:].tolist() for row in range(2)] == alone
