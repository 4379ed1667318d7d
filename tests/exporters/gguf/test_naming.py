"""Names by GGUF's convention: read as gguf-py reads them, and made where it gives up."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.gguf.naming import file_stem, model_name, size_label

PUBLISHED = [
    ("Qwen3-0.6B", 752e6),
    ("Qwen3-0.6B-Base", 752e6),
    ("qwen3-26m", 26e6),
    ("llama-4m", 4.1e6),
    ("Qwen2.5-1.5B-Instruct", 1.54e9),
    ("Llama-3.2-1B-Instruct", 1.24e9),
    ("Llama-2-7b-chat-hf", 6.7e9),
    ("Mistral-7B-Instruct-v0.3", 7.2e9),
    ("Mixtral-8x7B-v0.1", 46.7e9),
    ("TinyLlama-1.1B-Chat-v1.0", 1.1e9),
    ("SmolLM2-135M-Instruct", 135e6),
    ("gemma-2-2b-it", 2.6e9),
    ("granite-3.1-2b-instruct", 2.5e9),
    ("OLMo-2-0425-1B", 1.5e9),
]


@pytest.mark.parametrize(("folder", "parameters"), PUBLISHED)
def test_published_names_are_read_as_gguf_py_reads_them(folder: str, parameters: float) -> None:
    from gguf.metadata import Metadata
    from gguf.utility import naming_convention

    name, _, base, tune, version, size = Metadata.get_model_id_components(folder, int(parameters))
    ours = model_name(folder, int(parameters))
    assert (ours.base, ours.size, ours.fine_tune, ours.version) == (base, size, tune or "", version or "")
    assert f"{file_stem(folder, int(parameters), 'q4_k_m')}" == naming_convention(
        name, base, tune, version, size, "Q4_K_M"
    )


@pytest.mark.parametrize(
    ("folder", "parameters", "stem"),
    [
        ("model", 1.5e6, "model-1.5M-W4G32"),
        ("tiny-llama", 1.34e6, "tiny-llama-1.3M-W4G32"),
        ("Phi-3-mini-128k-instruct", 3.8e9, "Phi-3-mini-128k-3.8B-instruct-W4G32"),
        ("Phi-3.5-mini-instruct", 3.8e9, "Phi-3.5-mini-3.8B-instruct-W4G32"),
        ("Qwen3-30B-A3B", 30.5e9, "Qwen3-30B-A3B-W4G32"),
        ("26m", 26e6, "26m-26M-W4G32"),
        ("my model (new)", 5e3, "my-model-new-5.0K-W4G32"),
        (".hidden", 999, "hidden-999-W4G32"),
        ("", 12e9, "model-12B-W4G32"),
        ("größer-7b", 7e9, "größer-7B-W4G32"),
    ],
)
def test_a_size_that_the_name_lacks_is_counted(folder: str, parameters: float, stem: str) -> None:
    assert file_stem(folder, int(parameters), "w4g32") == stem


def test_the_encoding_is_the_scheme() -> None:
    stems = [file_stem("llama-4m", 4_100_000, scheme) for scheme in ("q4_0", "w4g32", "w4gc", "iq4_xs", "a b/c=d")]
    assert stems == [f"llama-4M-{text}" for text in ("Q4_0", "W4G32", "W4GC", "IQ4_XS", "A-B-C-D")]


def test_titles() -> None:
    assert model_name("qwen3-26m", 26_000_000).title == "Qwen3 26M"
    assert model_name("Mistral-7B-Instruct-v0.3", 7_200_000_000).title == "Mistral 7B Instruct v0.3"


@pytest.mark.parametrize(
    ("parameters", "label"),
    [(4_130_048, "4.1M"), (26_000_000, "26M"), (7_240_000_000, "7.2B"), (46_700_000_000, "47B"), (12, "12")],
)
def test_size_labels(parameters: int, label: str) -> None:
    assert size_label(parameters) == label


@given(st.text(max_size=30), st.integers(1, 10**13), st.text(alphabet=string.printable, max_size=12))
def test_any_name_makes_a_usable_file_name(folder: str, parameters: int, scheme: str) -> None:
    stem = file_stem(folder, parameters, scheme)
    assert stem
    assert stem[0] not in ".-"
    assert not set(stem) & set('/\\:*?"<>|\n\t\0 ')
