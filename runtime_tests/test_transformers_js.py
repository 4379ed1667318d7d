"""The browser's folder in transformers.js itself, and its graph in the WebAssembly build of onnxruntime.

Needs node and `npm install --ignore-scripts --prefix runtime_tests` (package.json beside this file pins the version);
skipped without. transformers.js runs in node on onnxruntime's native CPU build; `run_wasm.mjs` runs the very engine of
a browser. WebGPU is not run here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import signround
from exporters.onnx import layouts
from exporters.onnx.exporter import OnnxExporter
from runtime_tests.test_onnx import relative_error
from signround.artifact import QuantizedCheckpoint
from signround.evaluate import evaluate_target
from signround.events import silent
from signround.inspection import inspect_target
from signround.pipeline import verify
from signround.runtimes.ort import open_onnxruntime
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import DENSE, write_small_model

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "llama-4m"
NODE = shutil.which("node")
TEXTS = ["Once upon a time", "The capital of the country is", " two  spaces\nand DON'T café 日本語 12345"]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, how are you?"}]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)

needs_node = pytest.mark.skipif(
    NODE is None or not (HERE / "node_modules" / "@huggingface" / "transformers").is_dir(),
    reason="needs node and `npm install --ignore-scripts --prefix runtime_tests`",
)


def node(script: str, *arguments: object) -> str:
    assert NODE is not None
    process = subprocess.run(
        [NODE, str(HERE / script), *map(str, arguments)], capture_output=True, text=True, cwd=HERE, check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


def in_browser_engine(folder: Path, tokens: Tensor, out: Path) -> Tensor:
    """float32 [1, tokens, vocabulary]."""
    node("run_wasm.mjs", folder, json.dumps(tokens[0].tolist()), out)
    return torch.from_numpy(np.fromfile(out, np.float32)).reshape(1, tokens.shape[1], -1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedCheckpoint, Path]:
    """The bundled model as a chat model, in the browser's layout, in several data files."""
    folder = tmp_path_factory.mktemp("browser")
    shutil.copytree(EXAMPLE, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    artifact = write_rounded_artifact(folder / "model", folder / "artifact", "w4g32")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layouts, "CHUNK_BYTES", 1_000_000)
        OnnxExporter(accuracy_level=0, layout="transformers.js").export(artifact, folder / "out", silent)
    return artifact, folder / "out"


@needs_node
def test_transformers_js_tells_the_same_story(trained: tuple[QuantizedCheckpoint, Path]) -> None:
    from transformers import AutoTokenizer

    artifact, folder = trained
    assert len(list((folder / "onnx").glob("*_data*"))) > 2
    tokenizer, model = AutoTokenizer.from_pretrained(folder), signround.load(artifact.folder)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    request = {"prompts": ids, "count": 32, "messages": MESSAGES, "texts": TEXTS}
    answer: dict[str, Any] = json.loads(node("generate.mjs", folder, json.dumps(request)).splitlines()[-1])
    assert answer["ids"] == ids
    assert answer["chat"] == tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    for prompt, found in zip(ids, answer["generated"], strict=True):
        prompt_ids = torch.tensor([prompt])
        wanted = model.generate(
            prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=32, do_sample=False
        )
        assert found == wanted[0, len(prompt) :].tolist()


TOKENS = torch.randint(2, 512, (1, 24), generator=torch.Generator().manual_seed(1))
CASES = [
    pytest.param("llama", "w4g32", {}, 1e-5),
    pytest.param("qwen3", "w2g64-asym", {}, 1e-5, marks=pytest.mark.slow),
    pytest.param("qwen2", "w8g32", {}, 1e-5, marks=pytest.mark.slow),
    pytest.param("llama", "w4g32", {"flavour": "std"}, 1e-5),
    # Fused to MatMulNBits with int8 activations, whatever the file says: the session would have to be told.
    pytest.param("llama", "w4g32", {"flavour": "std", "weights": "dequantize"}, 1e-2, marks=pytest.mark.slow),
]


def small(folder: Path, family: str, scheme: str, **options: Any) -> tuple[QuantizedCheckpoint, Path]:
    write_small_model(folder / "model", family)
    artifact = write_rounded_artifact(folder / "model", folder / "artifact", scheme)
    exporter = OnnxExporter(accuracy_level=0, layout="transformers.js", **options)
    return artifact, exporter.export(artifact, folder / "out", silent).target


@needs_node
@pytest.mark.parametrize(("family", "scheme", "options", "gate"), CASES)
def test_the_engine_of_a_browser_runs_the_graph(
    family: str, scheme: str, options: dict[str, Any], gate: float, tmp_path: Path
) -> None:
    _, folder = small(tmp_path, family, scheme, **options)
    wanted = torch.cat(list(open_onnxruntime(folder).logits(TOKENS)))
    assert relative_error(in_browser_engine(folder, TOKENS, tmp_path / "logits"), wanted) <= gate


@needs_node
@pytest.mark.slow
@pytest.mark.parametrize("family", DENSE)
def test_every_family_in_transformers_js_and_in_its_browser_engine(family: str, tmp_path: Path) -> None:
    artifact, folder = small(tmp_path, family, "w4g32")
    wanted = torch.cat(list(open_onnxruntime(folder).logits(TOKENS)))
    assert relative_error(in_browser_engine(folder, TOKENS, tmp_path / "logits"), wanted) <= 1e-5
    request = {"prompts": TOKENS.tolist(), "count": 8, "messages": None, "texts": []}
    answer = json.loads(node("generate.mjs", folder, json.dumps(request)).splitlines()[-1])
    model = signround.load(artifact.folder)
    text = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=8, do_sample=False)
    assert answer["generated"] == text[:, TOKENS.shape[1] :].tolist()


@needs_node
@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "w8g32"), ("llama", "w4g64-asym"), pytest.param("llama-untied", "w2g32", marks=pytest.mark.slow)],
)
def test_the_engine_of_a_browser_reads_quantised_tables(family: str, kind: str, tmp_path: Path) -> None:
    """A tied one is two constants over the same bytes of the data file."""
    write_small_model(tmp_path / "model", family)
    overrides = [("embed|lm_head", kind)]
    artifact = write_rounded_artifact(tmp_path / "model", tmp_path / "artifact", "w4g32", overrides=overrides)
    exporter = OnnxExporter(accuracy_level=0, layout="transformers.js")
    folder = exporter.export(artifact, tmp_path / "out", silent).target
    tokens = torch.randint(512, (1, 24), generator=torch.Generator().manual_seed(1))
    wanted = torch.cat(list(open_onnxruntime(folder).logits(tokens)))
    assert relative_error(in_browser_engine(folder, tokens, tmp_path / "logits"), wanted) <= 1e-5


def test_every_reader_opens_the_browsers_folder(
    trained: tuple[QuantizedCheckpoint, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """verify, evaluate and inspect, on several data files."""
    artifact, folder = trained
    found = inspect_target(folder)
    assert found["graph"]["file"] == "onnx/model_q4.onnx"
    assert found["problems"] == []
    assert sum(grid["linears"] for grid in found["grids"]) == len(artifact.layers)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who lived near the sea. " * 40)
    measured = evaluate_target(folder, text, reference=artifact.folder, context=128)
    assert measured.mean_kl is not None
    assert measured.mean_kl < 1e-8
    monkeypatch.setattr(
        "signround.pipeline.kept_tokens",
        lambda path: type("Kept", (), {"evaluation": torch.randint(4000, (1, 32), generator=torch.Generator())})(),
    )
    parity = verify(folder, artifact.folder)
    assert parity.passed
