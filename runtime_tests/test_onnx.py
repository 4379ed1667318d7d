"""The ONNX folder in onnxruntime and onnxruntime-genai, against transformers on the decoded weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from exporters.onnx.exporter import OnnxExporter
from exporters.onnx.rope import inverse_frequencies, rotary_tables
from signround.architecture import read_architecture
from signround.artifact import QuantizedCheckpoint
from signround.errors import FailedError, RefusedError
from signround.events import silent
from signround.runtimes import ort
from signround.runtimes.genai import open_genai
from signround.runtimes.ort import open_onnxruntime
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

pytest.importorskip("onnxruntime")
EXAMPLE = Path(__file__).parent.parent / "examples" / "llama-4m"
PASSAGE = "Once upon a time there was a little girl who lived near the sea. She liked to walk in the sand. " * 12

COVERING = [
    ("llama", "w4g32", {}),
    ("llama-untied", "w2g64-asym", {}),
    ("llama-biased", "w3g128-asym", {}),
    ("llama3-rope", "w8g32", {}),
    ("llama", "w3g32", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("smollm2-like", "w4g128-asym", {}),
    ("smollm2-like", "w4gc", {}),
    ("mistral", "q4_0", {}),
    ("mistral", "w4g32", {"sliding_window": 16}),
    ("mistral", "w4g32", {"sliding_window": 1}),
    ("qwen2", "q8_0", {}),
    ("qwen2", "w2g32", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen3", "w2g32", {}),
    ("qwen3", "w4g64-asym", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
]  # fmt: skip
FAMILIES = frozenset(family for family, _, _ in COVERING)


def reference_model(artifact: QuantizedCheckpoint) -> Any:
    """transformers in float32 on the decoded weights, loaded by hand."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(artifact.folder / "model")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    weights = {name: artifact.weight(name) for name in [*artifact.layers, *artifact.kept]}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def mean_kl(reference: Tensor, other: Tensor) -> float:
    reference, other = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((reference.exp() * (reference - other)).sum(-1).mean())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[QuantizedCheckpoint, Path]]:
    """(artifact, ONNX folder) of a small model."""

    def make(family: str, scheme: str, level: int = 4, **overrides: Any) -> tuple[QuantizedCheckpoint, Path]:
        folder = tmp_path_factory.mktemp("onnx")
        write_small_model(folder / "model", family, **overrides)
        artifact = write_rounded_artifact(folder / "model", folder / "artifact", scheme)
        OnnxExporter(level).export(artifact, folder / "out", silent)
        return artifact, folder / "out"

    return make


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedCheckpoint, Path]:
    """The bundled trained model at w4g32, rounded to nearest with flips."""
    folder = tmp_path_factory.mktemp("trained")
    artifact = write_rounded_artifact(EXAMPLE, folder / "artifact", "w4g32")
    OnnxExporter().export(artifact, folder / "out", silent)
    return artifact, folder / "out"


def windows(vocabulary: int, count: int = 3, tokens: int = 48) -> Tensor:
    return torch.randint(vocabulary, (count, tokens), generator=torch.Generator().manual_seed(1))


def all_logits(batches: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(batches))


@pytest.mark.parametrize(("family", "scheme", "overrides"), COVERING)
@torch.no_grad()
def test_level_0_is_transformers_on_the_decoded_weights(
    exported: Callable[..., tuple[QuantizedCheckpoint, Path]], family: str, scheme: str, overrides: dict[str, Any]
) -> None:
    artifact, folder = exported(family, scheme, **overrides)
    tokens = windows(512)
    wanted = reference_model(artifact)(tokens).logits
    runtime = open_onnxruntime(folder, accuracy_level=0)
    found = all_logits(runtime.logits(tokens))
    assert found.shape == wanted.shape
    assert relative_error(found, wanted) <= 1e-5
    assert runtime.vocabulary == wanted.shape[-1]


@torch.no_grad()
def test_the_shipped_level_stays_within_its_gate(trained: tuple[QuantizedCheckpoint, Path]) -> None:
    from transformers import AutoTokenizer

    artifact, folder = trained
    ids = AutoTokenizer.from_pretrained(folder)(PASSAGE, return_tensors="pt")["input_ids"]
    tokens = ids[:, : ids.shape[1] // 2 * 2].reshape(2, -1)
    wanted = reference_model(artifact)(tokens).logits
    exact = all_logits(open_onnxruntime(folder, accuracy_level=0).logits(tokens))
    shipped_runtime = open_onnxruntime(folder)
    shipped = all_logits(shipped_runtime.logits(tokens))
    assert relative_error(exact, wanted) <= 1e-5
    assert "accuracy_level 4" in shipped_runtime.name
    assert 1e-9 < mean_kl(wanted, shipped) <= 5e-4  # the lower bound: level 4 did run


@pytest.mark.parametrize(("family", "scheme"), [("llama", "w4g32"), ("qwen3", "w4g128-asym")])
def test_step_by_step_with_the_cache_is_the_full_forward(
    exported: Callable[..., tuple[QuantizedCheckpoint, Path]], family: str, scheme: str
) -> None:
    import onnxruntime

    _, folder = exported(family, scheme, level=0)
    tokens = windows(512, count=1, tokens=12)
    full = all_logits(open_onnxruntime(folder).logits(tokens))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs() if value.name.startswith("past")]
    heads, size = next((value.shape[1], value.shape[3]) for value in session.get_inputs() if value.name in names)
    cache = {name: np.zeros((1, heads, 0, size), np.float32) for name in names}
    steps = []
    for position, (start, end) in enumerate([(0, 5), *[(index, index + 1) for index in range(5, 12)]]):
        feeds = {
            "input_ids": tokens[:, start:end].numpy(),
            "attention_mask": np.ones((1, end), np.int64),
            **cache,
        }
        logits, *present = session.run(None, feeds)
        outputs = [value.name for value in session.get_outputs()][1:]
        cache = {
            name.replace("present", "past_key_values"): array for name, array in zip(outputs, present, strict=True)
        }
        assert cache.keys() == set(names), position
        steps.append(torch.from_numpy(logits))
    assert relative_error(torch.cat(steps, 1), full) <= 1e-5


@pytest.mark.parametrize(
    ("family", "scheme"), [("llama", "w4g32"), ("mistral", "q8_0"), ("qwen2", "w2g64-asym"), ("qwen3", "w3g32")]
)
@torch.no_grad()
def test_genai_runs_the_folder(
    exported: Callable[..., tuple[QuantizedCheckpoint, Path]], family: str, scheme: str
) -> None:
    pytest.importorskip("onnxruntime_genai")
    artifact, folder = exported(family, scheme, level=0)
    tokens = windows(512, count=2, tokens=20)
    genai = open_genai(folder)
    raw = all_logits(open_onnxruntime(folder).logits(tokens))
    assert relative_error(all_logits(genai.logits(tokens)), raw) <= 1e-6
    model = reference_model(artifact)
    wanted = model.generate(tokens[:1], max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(tokens[:1]))
    assert torch.equal(genai.greedy(tokens[0], 24), wanted[0, 20:])


@torch.no_grad()
def test_genai_tells_the_trained_models_story(trained: tuple[QuantizedCheckpoint, Path]) -> None:
    genai_package = pytest.importorskip("onnxruntime_genai")
    artifact, folder = trained
    tokenizer = genai_package.Tokenizer(genai_package.Model(str(folder)))
    prompt = torch.from_numpy(np.asarray(tokenizer.encode("Once upon a time"))).long()
    exact = folder.parent / "exact"
    OnnxExporter(accuracy_level=0).export(artifact, exact, silent)
    wanted = reference_model(artifact).generate(
        prompt[None], max_new_tokens=32, do_sample=False, attention_mask=torch.ones_like(prompt[None])
    )
    assert torch.equal(open_genai(exact).greedy(prompt, 32), wanted[0, len(prompt) :])


def test_rotary_tables_are_those_of_transformers() -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for parameters in (
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
    ):  # fmt: skip
        config = AutoConfig.for_model(
            "llama", max_position_embeddings=131072, hidden_size=512, num_attention_heads=4, head_dim=128,
            rope_parameters=parameters,
        )  # fmt: skip
        architecture = read_architecture({**config.to_dict(), "architectures": ["LlamaForCausalLM"]})
        rotary = LlamaRotaryEmbedding(config)
        assert torch.equal(inverse_frequencies(architecture.rope, 64), rotary.inv_freq)
        table = rotary_tables(architecture)[architecture.rope]
        positions = torch.tensor([[0, 1, 8191, 100_000, 131_071]])
        cos, sin = rotary(torch.zeros(1), positions)
        assert torch.equal(torch.from_numpy(table.array("cos"))[positions[0]], cos[0, :, :64])
        assert torch.equal(torch.from_numpy(table.array("sin"))[positions[0]], sin[0, :, :64])


def test_batches_are_bounded_by_their_logits(
    exported: Callable[..., tuple[QuantizedCheckpoint, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = exported("llama", "w4g32", level=0)
    tokens = windows(512, count=5, tokens=8)
    runtime = open_onnxruntime(folder, threads=1)
    whole = list(runtime.logits(tokens))
    monkeypatch.setattr(ort, "LOGIT_BYTES", 2 * 8 * 512 * 4)
    batches = list(runtime.logits(tokens))
    assert [len(batch) for batch in whole] == [5]
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert relative_error(torch.cat(batches), whole[0]) <= 1e-6


def test_broken_folders_end_in_one_sentence(
    exported: Callable[..., tuple[QuantizedCheckpoint, Path]], tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=r"no model\.onnx"):
        open_onnxruntime(tmp_path)
    with pytest.raises(RefusedError, match=r"no genai_config\.json"):
        open_genai(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff\xff not a graph")
    with pytest.raises(RefusedError, match="damaged"):
        open_onnxruntime(tmp_path)
    _, folder = exported("llama", "w4g32")
    runtime = open_onnxruntime(folder)
    with pytest.raises(FailedError, match="cannot run"):
        list(runtime.logits(torch.full((1, 4), 100_000)))
    runtime.close()
    with pytest.raises(FailedError, match="closed"):
        list(runtime.logits(windows(512)))
    with open(folder / "model.onnx.data", "r+b") as data:
        data.truncate(5000)
    with pytest.raises(RefusedError, match=r"model\.onnx\.data is cut short, .* bytes are needed; export"):
        open_onnxruntime(folder)
    (folder / "model.onnx.data").unlink()
    with pytest.raises(RefusedError, match=r"model\.onnx\.data is missing; export the artifact again"):
        open_onnxruntime(folder)
    with pytest.raises(FailedError, match="cannot load"):
        open_genai(folder)


def test_the_configuration_of_the_cache_is_capped(exported: Callable[..., tuple[QuantizedCheckpoint, Path]]) -> None:
    _, folder = exported("llama", "w4g32", max_position_embeddings=20_000)
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["search"]["max_length"] == 4096
    assert config["model"]["context_length"] == 20_000
