"""Quantised embeddings and heads and mixed grids in onnxruntime: the logits of the tuned model, tables once in memory,
and the same integers in GGUF when one job writes both."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import signround
from exporters.onnx.exporter import OnnxExporter
from signround import parity
from signround.architecture import EMBEDDING, HEAD
from signround.artifact import QuantizedCheckpoint
from signround.events import silent
from signround.exporting import make_exporters
from signround.file_types import Overrides
from signround.formats import grid_for
from signround.report import passed
from signround.runtimes.genai import open_genai
from signround.runtimes.ort import open_onnxruntime
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

from .test_onnx import all_logits, reference_model, relative_error, windows

pytest.importorskip("onnxruntime")
EXAMPLE = Path(__file__).parent.parent / "examples" / "llama-4m"

KINDS = ["w2g64", "w2g16-asym", "w3g32", "w3g128-asym", "w4g32", "w4gc-asym", "w8g32", "w8g256-asym"]
MIXED = [
    ("llama-untied", "w8g32", [("lm_head", "w3g32"), ("embed", "w2gc"), (r"layers\.1\.", "float")]),
    ("smollm2-like", "w4g128-asym", [("lm_head", "w2g128-asym")]),  # rows of 192: a padded block
    ("llama-biased", "w4g32", [("v_proj", "w8g32"), ("down_proj", "float"), (r"blk\.0\.attn_q", "f16")]),
    ("llama", "w4g32", [("attn_v", "w8g32"), ("down_proj", "w4g64-asym")]),
    ("qwen2", "w4g32", [("attn_v", "w3g32"), ("down_proj", "w4g64-asym"), ("lm_head", "w3gc-asym")]),
    ("mistral", "w4g32", [("lm_head", "float"), (r"blk\.[01]\.ffn", "w3g128"), ("attn_output", "w2g32")]),
    ("qwen3", "w2g64", [(r"layers\.0\.", "w8g32"), ("lm_head", "q8_0")]),
    # gathered rows are multiplied, logits divided and capped; norms are the weight + 1
    ("gemma2", "w4g32", [("lm_head", "w4g32-asym")]),
    ("gemma3", "w4g32", [("embed", "w8g32")]),
    ("granite", "w4g32", [("embed", "w3g32"), ("mlp", "w2g64")]),
    ("olmo2", "w4g32", [("embed", "w2g32"), ("lm_head", "w8g32")]),
    ("phi3", "w4g32", [("qkv", "w8g32"), ("lm_head", "w4g128"), ("embed", "w4g128")]),
]  # fmt: skip
Maker = Callable[[str, str, Overrides], tuple[QuantizedCheckpoint, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """(artifact, ONNX folder) of a small model."""
    models: dict[str, Path] = {}

    def make(family: str, scheme: str, overrides: Overrides) -> tuple[QuantizedCheckpoint, Path]:
        folder = tmp_path_factory.mktemp("outer")
        if family not in models:
            models[family] = write_small_model(folder / "model", family)
        artifact = write_rounded_artifact(models[family], folder / "artifact", scheme, overrides=overrides)
        OnnxExporter(0).export(artifact, folder / "out", silent)
        return artifact, folder / "out"

    return make


@torch.no_grad()
def is_the_tuned_model(artifact: QuantizedCheckpoint, folder: Path) -> None:
    tokens = windows(512, count=2, tokens=24)
    wanted = reference_model(artifact)(tokens).logits
    found = all_logits(open_onnxruntime(folder).logits(tokens))
    assert found.dtype == torch.float32
    assert relative_error(found, wanted) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_quantised_embedding_and_head(exported: Maker, family: str, kind: str) -> None:
    artifact, folder = exported(family, "w4g32", [("embed|lm_head", kind)])
    grids = {layer.name: layer.grid for layer in artifact.plan.outer_layers}
    assert grids == dict.fromkeys([EMBEDDING] if family == "llama" else [EMBEDDING, HEAD], grid_for(kind))
    is_the_tuned_model(artifact, folder)


@pytest.mark.parametrize(("family", "scheme", "overrides"), MIXED)
def test_mixed_grids(exported: Maker, family: str, scheme: str, overrides: Overrides) -> None:
    artifact, folder = exported(family, scheme, overrides)
    assert len({layer.grid for layer in artifact.plan.layers()}) > 1
    is_the_tuned_model(artifact, folder)


FORMS = [
    ("llama", "embed", {"flavour": "std"}, 1e-5),
    ("llama", "embed", {"layout": "transformers.js"}, 1e-5),
    ("llama", "embed", {"dtype": "fp16"}, 3e-3),  # measured 1.0e-3 to 1.4e-3
    ("llama-untied", "embed|lm_head", {"flavour": "std", "dtype": "fp16"}, 3e-3),
    ("llama-untied", "lm_head", {"flavour": "std", "weights": "dequantize"}, 1e-5),
]


@pytest.mark.parametrize(("family", "pattern", "options", "gate"), FORMS)
@torch.no_grad()
def test_forms_of_the_graph(
    exported: Maker, tmp_path: Path, family: str, pattern: str, options: dict[str, Any], gate: float
) -> None:
    artifact, _ = exported(family, "w4g32", [(pattern, "w8g32"), ("o_proj", "w2g64"), ("up_proj", "float")])
    exporter = OnnxExporter(0, **options)
    assert exporter.refusals(artifact.plan) == []
    exported_model = exporter.export(artifact, tmp_path / "out", silent)
    assert parity.compare_weights(artifact, exporter, exported_model).passed
    tokens = windows(512, count=2, tokens=24)
    found = all_logits(open_onnxruntime(exported_model.target).logits(tokens))
    assert relative_error(found, reference_model(artifact)(tokens).logits) <= gate


def test_a_form_without_tables_says_so(exported: Maker) -> None:
    artifact, _ = exported("llama", "w4g32", [("embed", "w8g32")])
    (refusal,) = OnnxExporter(flavour="std", weights="dequantize").refusals(artifact.plan)
    assert "a quantised embedding is looked up by GatherBlockQuantized" in refusal.problem


@pytest.mark.parametrize(("family", "kind"), [("llama", "w4g32-asym"), ("llama-untied", "w8g32")])
@torch.no_grad()
def test_genai_reads_the_shared_table(exported: Maker, family: str, kind: str) -> None:
    pytest.importorskip("onnxruntime_genai")
    artifact, folder = exported(family, "w4g32", [("embed|lm_head", kind)])
    tokens = windows(512, count=1, tokens=20)
    wanted = reference_model(artifact).generate(
        tokens, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(tokens)
    )
    assert torch.equal(open_genai(folder).greedy(tokens[0], 24), wanted[0, 20:])


LOADED = """
import sys
import onnxruntime
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
before = resident()
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read from /proc")
def test_a_tied_table_is_in_memory_once(tmp_path: Path) -> None:
    """20000 x 256 at 8 bits: the file is a table smaller than that of the untied model, and the loaded session no
    larger than its; a second copy would be 5 MB more."""
    sizes, resident = {}, {}
    for tied in (True, False):
        folder = tmp_path / str(tied)
        model = write_small_model(
            folder / "model", "llama-untied", layers=1, vocab_size=20_000, hidden_size=256, tie_word_embeddings=tied
        )
        overrides = [("embed|lm_head", "w8g32")]
        artifact = write_rounded_artifact(model, folder / "artifact", "w4g32", overrides=overrides)
        target = OnnxExporter().export(artifact, folder / "onnx", silent).target
        sizes[tied] = (target / "model.onnx.data").stat().st_size
        command = [sys.executable, "-c", LOADED, str(target / "model.onnx")]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
        resident[tied] = min(int(run) for run in runs) * 1024
    table = 20_000 * 256
    assert sizes[False] - sizes[True] >= table
    assert resident[True] <= resident[False] + table // 4


# ---- the whole path


def sure_model(folder: Path, *, tied: bool) -> Path:
    """A small model that repeats its input and is sure of it, as trained models are: a random head hardly prefers one
    token, and rounded activations then change the first one."""
    from safetensors.torch import load_file, save_file

    write_small_model(folder, "llama-untied", tie_word_embeddings=tied)
    tensors = load_file(folder / "model.safetensors")
    tensors[EMBEDDING] = tensors[EMBEDDING] * 2
    if not tied:
        tensors[HEAD] = tensors[EMBEDDING] + tensors[HEAD] * 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read_all(format: str, target: Path) -> dict[str, Any]:
    (exporter,) = make_exporters([format])
    return dict(exporter.read_back(exporter.opened(target)))


def one_job(model: Path, out: Path, overrides: list[str], seqlen: int = 64) -> None:
    """Both formats pass their gates and hold the artifact's integers."""
    if not any(find_spec(module) for module in ("llama_cpp", "xllamacpp")):
        pytest.skip("needs llama-cpp-python or xllamacpp")
    report = signround.quantize(
        model, "w4g32", out, ["onnx", "gguf"], samples=8, seqlen=seqlen, iters=4, tensor_types=overrides
    )
    assert passed(report), {name: found["logits"] for name, found in report["exports"].items()}
    for found in report["exports"].values():
        assert found["weights"]["reader"] == "independent"
    artifact = QuantizedCheckpoint(out / "artifact")
    onnx = read_all("onnx", out / "onnx")
    gguf = read_all("gguf", next((out / "gguf").glob("*W4G32.gguf")))
    assert onnx.keys() == gguf.keys() == artifact.layers.keys()
    for name, stored in ((name, artifact.quantized(name)) for name in artifact.layers):
        for found in (onnx[name], gguf[name]):
            assert torch.equal(found.codes, stored.codes), name
            assert torch.equal(found.fields["scale"], stored.fields["scale"]), name


@pytest.mark.parametrize(
    ("tied", "overrides"),
    [
        (True, ["lm_head=w8g32", "attn_v=w8g32"]),
        pytest.param(False, ["^output=w8g32", "embed_tokens=w4g32", r"layers\.0\.=float"], marks=pytest.mark.slow),
    ],
)
def test_one_job_writes_the_same_integers_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, overrides: list[str]
) -> None:
    monkeypatch.setattr(parity, "MOST_POSITIONS", 128)  # llama.cpp is asked for one at a time
    one_job(sure_model(tmp_path / "model", tied=tied), tmp_path / "out", overrides)


@pytest.mark.slow
def test_the_bundled_model_with_a_quantised_table(tmp_path: Path) -> None:
    one_job(EXAMPLE, tmp_path / "out", ["lm_head=w8g32"], seqlen=256)
