"""One file of a sound folder is damaged at a time: `inspect` names it, and `verify` does not pass it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters.onnx.exporter import OnnxExporter
from signround.artifact import QuantizedCheckpoint
from signround.errors import RefusedError
from signround.events import silent
from signround.inspection import inspect_target
from signround.parity import verify
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
Damage = Callable[[Path], None]
CONFIG = "genai_config.json"
WINDOWS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    folder = tmp_path_factory.mktemp("rules")
    write_small_model(folder / "model", "llama", layers=1)
    return write_rounded_artifact(folder / "model", folder / "artifact", "w4g32")


@pytest.fixture(scope="module")
def exported(artifact: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layout -> a folder that was just written."""
    root = tmp_path_factory.mktemp("exported")
    return {
        layout: OnnxExporter(layout=layout).export(artifact, root / layout, silent).target
        for layout in ("genai", "transformers.js")
    }


@pytest.fixture
def damaged(exported: dict[str, Path], tmp_path: Path) -> Callable[[str, Damage], Path]:
    def make(layout: str, damage: Damage) -> Path:
        folder = tmp_path / layout
        shutil.copytree(exported[layout], folder)
        damage(folder)
        return folder

    return make


def passes(folder: Path, artifact: QuantizedCheckpoint) -> bool:
    """As `signround verify` judges, which a refusal fails too."""
    exporter = OnnxExporter()
    try:
        return verify(artifact, exporter, exporter.opened(folder), WINDOWS).passed
    except RefusedError:
        return False


def test_sound_folders_have_no_problems(exported: dict[str, Path], artifact: QuantizedCheckpoint) -> None:
    for folder in exported.values():
        assert inspect_target(folder)["problems"] == []
        assert passes(folder, artifact)


def setting(file: str, *keys: str, value: Any) -> Damage:
    """Another value in a JSON file; `...` takes the key away."""

    def damage(folder: Path) -> None:
        whole = json.loads((folder / file).read_text())
        inner = whole
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        if value is ...:
            del inner[keys[-1]]
        (folder / file).write_text(json.dumps(whole))

    return damage


def content(file: str, text: str | None) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        if text is not None:
            (folder / file).write_text(text)

    return damage


BROWSER = ("transformers.js_config",)
BESIDE: list[tuple[str, Damage, str]] = [
    ("genai", content(CONFIG, "{"), f"{CONFIG} is damaged"),
    ("genai", content(CONFIG, "[]"), f"{CONFIG} is damaged"),
    ("genai", content(CONFIG, None), f"{CONFIG} is missing"),
    ("genai", content("tokenizer.json", None), "tokenizer.json is missing"),
    ("genai", content("tokenizer.json", "{}"), "tokenizer.json is damaged"),
    ("genai", setting(CONFIG, "model", value=...), "model.decoder.filename says None"),
    ("genai", setting(CONFIG, "model", "vocab_size", value=77), "vocab_size is 77, the graph has"),
    ("genai", setting(CONFIG, "model", "eos_token_id", value=[2, 10**6]), "eos_token_id 1000000 is no token"),
    ("genai", setting(CONFIG, "model", "eos_token_id", value="</s>"), "eos_token_id </s> is no token"),
    ("genai", setting(CONFIG, "model", "context_length", value=8), "search.max_length"),
    ("genai", setting(CONFIG, "model", "decoder", "filename", value="no.onnx"), "says 'no.onnx'"),
    ("genai", setting(CONFIG, "model", "decoder", "num_hidden_layers", value=5), "num_hidden_layers is 5"),
    ("genai", setting(CONFIG, "model", "decoder", "num_key_value_heads", value=7), "num_key_value_heads is 7"),
    ("genai", setting(CONFIG, "model", "decoder", "head_size", value=...), "head_size is None"),
    (
        "genai",
        setting(CONFIG, "model", "decoder", "inputs", "past_key_names", value="past.%d"),
        "nothing feeds the input past_key_values.0.key",
    ),
    ("transformers.js", content("config.json", "{"), "config.json is damaged"),
    ("transformers.js", setting("config.json", *BROWSER, value=...), "transformers.js_config is missing"),
    ("transformers.js", setting("config.json", *BROWSER, "dtype", value="q2"), "the dtype q2 is not that of"),
    (
        "transformers.js",
        setting("config.json", *BROWSER, "use_external_data_format", value={"model_q4.onnx": 3}),
        "has 1 data files, use_external_data_format says 3",
    ),
    ("transformers.js", setting("config.json", *BROWSER, "use_external_data_format", value={}), "says None"),
]


@pytest.mark.parametrize(("layout", "damage", "found"), BESIDE)
def test_files_beside_the_graph(
    layout: str,
    damage: Damage,
    found: str,
    damaged: Callable[[str, Damage], Path],
    artifact: QuantizedCheckpoint,
) -> None:
    folder = damaged(layout, damage)
    problems = inspect_target(folder)["problems"]
    assert any(found in problem for problem in problems), problems
    assert not passes(folder, artifact)


@pytest.mark.parametrize(
    "free",
    [
        setting(CONFIG, "search", "max_length", value=100),
        setting(CONFIG, "search", "temperature", value=0.1),
        setting(CONFIG, "model", "type", value="decoder"),
        setting(CONFIG, "model", "decoder", "session_options", "intra_op_num_threads", value=2),
    ],
)
def test_what_a_user_may_set_is_no_problem(free: Damage, damaged: Callable[[str, Damage], Path]) -> None:
    assert inspect_target(damaged("genai", free))["problems"] == []


def test_bytes_that_no_comparison_reaches_are_found(
    damaged: Callable[[str, Damage], Path], artifact: QuantizedCheckpoint
) -> None:
    def far_position(folder: Path) -> None:
        """In the last row of a rotary table, behind every window that is compared."""
        model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
        table = next(tensor for tensor in model.graph.initializer if "rope" in tensor.name)
        where = {entry.key: int(entry.value) for entry in table.external_data if entry.key != "location"}
        with open(folder / "model.onnx.data", "r+b") as stream:
            stream.seek(where["offset"] + where["length"] - 4)
            stream.write(np.float32(0.123).tobytes())

    folder = damaged("genai", far_position)
    assert inspect_target(folder)["problems"] == ["model.onnx.data: its bytes are not those that were written"]
    exporter = OnnxExporter()
    parity = verify(artifact, exporter, exporter.opened(folder), WINDOWS)
    assert parity.weights.passed
    assert not parity.passed


def graph(change: Callable[[Any], None]) -> Damage:
    def damage(folder: Path) -> None:
        model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return damage


def without_labels(model: Any) -> None:
    for node in model.graph.node:
        del node.metadata_props[:]


def renamed(old: str, new: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for value in [*model.graph.input, *model.graph.output]:
            value.name = new if value.name == old else value.name
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]

    return change


def external(key: str, value: str | None) -> Callable[[Any], None]:
    """Another word about where the first external constant lies; None takes it away."""

    def change(model: Any) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        kept = [(entry.key, entry.value) for entry in tensor.external_data if entry.key != key]
        del tensor.external_data[:]
        for name, text in [*kept, *([] if value is None else [(key, value)])]:
            entry = tensor.external_data.add()
            entry.key, entry.value = name, text

    return change


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (graph(without_labels), "it does not say which weights it holds"),
        (graph(external("length", None)), "its data has no length"),
        (content("model.onnx", ""), "the graph has no outputs"),
        (graph(renamed("attention_mask", "mask")), "nothing feeds the input mask"),
        (graph(renamed("logits", "scores")), "has no output logits"),
    ],
)
def test_rewritten_graphs(
    damage: Damage, found: str, damaged: Callable[[str, Damage], Path], artifact: QuantizedCheckpoint
) -> None:
    folder = damaged("genai", damage)
    problems = inspect_target(folder)["problems"]
    assert any(found in problem for problem in problems), problems
    assert not passes(folder, artifact)


def test_an_offset_that_is_no_number_is_damage(damaged: Callable[[str, Damage], Path]) -> None:
    folder = damaged("genai", graph(external("offset", "far")))
    with pytest.raises(RefusedError, match=r"model\.onnx is damaged; export the artifact again"):
        inspect_target(folder)


def test_a_file_that_the_runtime_refuses_does_not_pass(
    damaged: Callable[[str, Damage], Path], artifact: QuantizedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = damaged("genai", graph(renamed("logits", "scores")))
    monkeypatch.setattr(OnnxExporter, "inspected", lambda self, target: {"problems": []})
    exporter = OnnxExporter()
    with pytest.raises(RefusedError, match="not a decoder"):
        verify(artifact, exporter, exporter.opened(folder), WINDOWS)
