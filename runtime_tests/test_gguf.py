"""Every GGUF block type and model family in llama.cpp itself: logits against transformers, tokens against tokenizers.

Runs with whichever binding is installed (xllamacpp in the development environment).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exporters.gguf.exporter import GgufExporter
from runtime_tests.gguf_floats import write_float_gguf
from signround.artifact import QuantizedCheckpoint
from signround.errors import FailedError, RefusedError
from signround.events import silent
from signround.experts import stacked
from signround.runtimes.llama_cpp import LlamaCpp, open_llama_cpp
from signround.runtimes.llama_cpp_server import ServerRuntime
from signround.runtimes.llama_cpp_windows import WindowRuntime
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import FAMILIES, MIXTURES, write_small_model

if not any(importlib.util.find_spec(module) for module in ("llama_cpp", "xllamacpp")):
    pytest.skip("needs llama-cpp-python or xllamacpp", allow_module_level=True)

LLAMA_4M = Path(__file__).parents[1] / "examples" / "llama-4m"
NASTY = [
    "",
    " ",
    "  two leading, two trailing  ",
    "def f(x):\n    return x ** 2  # squares\n\n\n\tprint(f(3))\r\n\r\n",
    "12345 67,890.12 1e-10 1234567 ½ ² ١٢٣",
    "I'm DON'T we'll they'RE it's 'quoted' \"double\" ``code`` ...!!! -- ==",
    "emoji 🚀😶‍🌫️🦙 flags 🇩🇪 café naïve ÜBER Größe",
    "日本語のテキスト、漢字。 한국어 中文混合English",
    "العربية עברית हिन्दी ไทย កាន់តែ",
    "<|begin|>system<|end|>\n<|chat|>hello<|chat|> <s>x</s> <unk>",
    "a\u00a0b\u3000c\u200bd\ufeffe\x00f",
    "CamelCaseXYZfooBAR snake_case __init__ /usr/bin//x.py @user #tag <x|y>",
    "\n\n\n   \n \t \n",
    "x" * 300 + " " * 40 + "1" * 50,
]


def transformers_logits(model: Path, windows: Tensor, artifact: QuantizedCheckpoint | None = None) -> Tensor:
    """float32 logits of the float model, or of the artifact's decoded weights."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    if artifact is not None:
        shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
        decoded = stacked([*artifact.layers, *artifact.kept], artifact.weight, shapes, torch.float32)
        unknown = network.load_state_dict(decoded, strict=False).unexpected_keys
        assert not unknown
    with torch.no_grad():
        return network(windows).logits


def runtime_logits(path: Path, windows: Tensor, repack: bool = True) -> Tensor:
    runtime = open_llama_cpp(path, threads=2, repack=repack)
    try:
        return torch.cat(list(runtime.logits(windows)))
    finally:
        runtime.close()


def log_probabilities(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


def divergences(reference: Tensor, found: Tensor) -> Tensor:
    wanted = log_probabilities(reference)
    return (wanted.exp() * (wanted - log_probabilities(found))).sum(-1)


def mean_kl(reference: Tensor, found: Tensor) -> float:
    return float(divergences(reference, found).mean())


def median_kl(reference: Tensor, found: Tensor) -> float:
    return float(divergences(reference, found).median())


def some_windows(tokens: int = 48, count: int = 2, vocabulary: int = 512) -> Tensor:
    return torch.randint(3, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_float_file_is_the_float_model(family: str, tmp_path: Path) -> None:
    """Names, q/k rows, biases, norms, head sizes and rotary scaling: everything but quantisation."""
    model = write_small_model(tmp_path / "model", family)
    windows = some_windows(tokens=100 if family == "llama3-rope" else 32, count=1)
    found = runtime_logits(write_float_gguf(model, tmp_path / "float.gguf"), windows)
    difference = log_probabilities(found) - log_probabilities(transformers_logits(model, windows))
    # llama.cpp looks GELU up in a table of fp16 values: test_gguf_families.py compares with the same table
    assert float(difference.abs().max()) < (2e-3 if "gemma" in family else 1e-3)


def test_linear_rope_scaling(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    model = write_small_model(tmp_path / "model", "llama", rope_parameters=scaling)
    windows = some_windows(count=1)
    found = runtime_logits(write_float_gguf(model, tmp_path / "float.gguf"), windows)
    difference = log_probabilities(found) - log_probabilities(transformers_logits(model, windows))
    assert float(difference.abs().max()) < 1e-3


COVERING = [
    ("llama", "w4g32", "llama3"),
    ("llama-untied", "w4g128", "gpt2"),
    ("llama-biased", "q4_1", "llama3"),
    ("llama3-rope", "w8g32", "llama3"),
    ("smollm2-like", "q5_0", "gpt2"),
    ("mistral", "q5_1", "llama2"),
    ("qwen2", "q8_0", "qwen2"),
    ("qwen3", "w4gc", "qwen2"),
    ("qwen2-moe", "w4g32", "qwen2"),
    ("qwen3-moe", "q5_0", "qwen2"),
    ("mixtral", "q8_0", "llama2"),
]


@pytest.mark.parametrize(("family", "scheme", "tokenizer"), COVERING)
def test_quantised_file_is_the_tuned_model(family: str, scheme: str, tokenizer: str, tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", family, tokenizer=tokenizer)
    artifact = write_rounded_artifact(model, tmp_path / "artifact", scheme)
    exported = GgufExporter().export(artifact, tmp_path / "gguf", silent)
    windows = some_windows(count=1)
    reference = transformers_logits(model, windows, artifact)
    found = runtime_logits(exported.target, windows)
    if family in MIXTURES:  # rounded activations change the experts of a few tokens (signround.parity)
        assert median_kl(reference, found) <= 5e-4
        assert mean_kl(reference, found) <= 5e-3
    else:
        assert mean_kl(reference, found) <= 1e-3
    assert mean_kl(transformers_logits(model, windows), reference) > 5e-3 or scheme in ("w8g32", "q8_0")


@pytest.mark.parametrize(
    "scheme", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4", "q2_0", "w2g128"]
)
def test_every_block_type_runs_as_the_tuned_model(scheme: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 320}
    model = write_small_model(tmp_path / "model", "llama", layers=1, **sizes)
    artifact = write_rounded_artifact(model, tmp_path / "artifact", scheme)
    exported = GgufExporter().export(artifact, tmp_path / "gguf", silent)
    windows = some_windows(count=1, vocabulary=320)
    reference = transformers_logits(model, windows, artifact)
    assert mean_kl(reference, runtime_logits(exported.target, windows)) <= 1e-3
    assert mean_kl(transformers_logits(model, windows), reference) > 3e-3


def test_plain_kernels_agree_with_repacked_ones(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama")
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "q4_0")
    target = GgufExporter().export(artifact, tmp_path / "gguf", silent).target
    windows = some_windows(count=1)
    assert mean_kl(runtime_logits(target, windows), runtime_logits(target, windows, repack=False)) < 1e-3


@pytest.fixture(scope="module")
def tokenizer_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, LlamaCpp]]:
    """Kind of tokenizer -> (folder, running llama.cpp)."""
    folder = tmp_path_factory.mktemp("tokenizers")
    opened = {}
    for kind in ("llama3", "qwen2", "gpt2", "llama2"):
        model = write_small_model(folder / kind, "llama", layers=1, tokenizer=kind, vocab_size=1024)
        opened[kind] = (model, open_llama_cpp(write_float_gguf(model, folder / f"{kind}.gguf"), threads=2))
    opened["llama-4m"] = (LLAMA_4M, open_llama_cpp(write_float_gguf(LLAMA_4M, folder / "4m.gguf", "auto"), threads=2))
    yield opened
    for _, runtime in opened.values():
        runtime.close()


@pytest.mark.parametrize("kind", ["llama3", "qwen2", "gpt2", "llama2", "llama-4m"])
@pytest.mark.parametrize("add_special", [False, True])
def test_tokens_are_those_of_tokenizer_json(
    kind: str, add_special: bool, tokenizer_models: dict[str, tuple[Path, LlamaCpp]]
) -> None:
    from tokenizers import Tokenizer

    folder, runtime = tokenizer_models[kind]
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in NASTY:
        wanted = reference.encode(text, add_special_tokens=add_special).ids
        assert runtime.tokenize(text, add_special=add_special) == wanted, repr(text)


def test_sliding_window_is_ignored_as_the_note_says(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "mistral", sliding_window=16)
    path = write_float_gguf(model, tmp_path / "float.gguf")
    windows = some_windows(tokens=32, count=1)
    found, wanted = runtime_logits(path, windows), transformers_logits(model, windows)
    worst = (log_probabilities(found) - log_probabilities(wanted)).abs().amax(-1)[0]
    assert float(worst[:16].max()) < 1e-3 < float(worst[17:].max())


def test_longer_windows_and_a_second_call(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama", layers=1, vocab_size=320, max_position_embeddings=1024)
    runtime = open_llama_cpp(write_float_gguf(model, tmp_path / "float.gguf"), threads=2)
    try:
        short, long = some_windows(8, 1, vocabulary=320), some_windows(257, 1, vocabulary=320)
        before = torch.cat(list(runtime.logits(short)))
        assert next(iter(runtime.logits(long))).shape == (1, 257, 320)
        after = torch.cat(list(runtime.logits(short)))
        assert torch.allclose(log_probabilities(before), log_probabilities(after), atol=1e-5)
    finally:
        runtime.close()


def test_damaged_and_missing_files_are_one_sentence(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(FailedError, match=r"damaged\.gguf: llama\.cpp could not run the file"):
        open_llama_cpp(damaged)
    with pytest.raises(RefusedError, match=r"no such \.gguf file"):
        open_llama_cpp(tmp_path / "none.gguf")


def test_a_runtime_that_dies_is_one_sentence(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama", layers=1)
    runtime = open_llama_cpp(write_float_gguf(model, tmp_path / "float.gguf"), threads=2)
    assert isinstance(runtime, ServerRuntime | WindowRuntime)
    runtime._child._process.kill()
    with pytest.raises(FailedError, match=r"float\.gguf: llama\.cpp could not run the file \(it ended with signal 9\)"):
        list(runtime.logits(some_windows(count=1)))
    runtime.close()


def test_llama_4m_in_llama_cpp(tmp_path: Path) -> None:
    """The trained model that the repository ships, on text: what `verify` measures."""
    from tokenizers import Tokenizer

    text = "The quick brown fox jumps over the lazy dog, and the old man sat down by the river."
    windows = torch.tensor([Tokenizer.from_file(str(LLAMA_4M / "tokenizer.json")).encode(text).ids])
    artifact = write_rounded_artifact(LLAMA_4M, tmp_path / "artifact", "w4g64")
    target = GgufExporter().export(artifact, tmp_path / "gguf", silent).target
    reference = transformers_logits(LLAMA_4M, windows, artifact)
    assert mean_kl(reference, runtime_logits(target, windows)) <= 1e-3
