"""Where text ends and how it is sampled: what genai_config.json takes from the model's files, and damaged files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporters.onnx.exporter import OnnxExporter
from exporters.onnx.form import GraphForm
from exporters.onnx.genai import genai_config
from exporters.onnx.generation import SAMPLING, generation_refusals, read_generation, tokenizer_end
from signround.artifact import QuantizedCheckpoint
from signround.cli.main import main
from signround.events import silent
from signround.plan import ModelPlan
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

pytest.importorskip("onnx_ir")
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("generation") / "model", "llama", layers=1)


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return write_rounded_artifact(model, tmp_path_factory.mktemp("artifact") / "a", "w4g32")


def with_files(artifact: QuantizedCheckpoint, folder: Path, *, config: dict[str, Any] | None = None) -> ModelPlan:
    """The plan with the files of `folder`, and with changes to config.json."""
    return replace(artifact.plan, files=folder, config={**artifact.plan.config, **(config or {})})


def written(folder: Path, **files: object) -> Path:
    """`folder` with JSON files; `a__b` stands for `a.b`, text is written as it is."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"temperature": "hot"}', "temperature is 'hot', a number from 0 on is needed"),
        ('{"temperature": true}', "temperature is True, a number from 0 on is needed"),
        ('{"temperature": NaN}', "temperature is nan, a number from 0 on is needed"),
        ('{"do_sample": "yes"}', "do_sample is 'yes', true or false is needed"),
        ('{"top_k": 2.5}', "top_k is 2.5, a whole number is needed"),
        ('{"top_p": 2.0}', "top_p is 2.0, a number from 0 to 1 is needed"),
        ('{"min_length": -1}', "min_length is -1, a whole number from 0 on is needed"),
        ('{"eos_token_id": "1"}', "eos_token_id is '1', a whole number or a list of them is needed"),
        ('{"eos_token_id": [1, null]}', "eos_token_id is [1, None], a whole number or a list of them is needed"),
        ('{"bos_token_id": [1]}', "bos_token_id is [1], a whole number is needed"),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    artifact: QuantizedCheckpoint, tmp_path: Path, text: str, fragment: str
) -> None:
    plan = with_files(artifact, written(tmp_path, generation_config=text))
    for exporter in (OnnxExporter(), OnnxExporter(layout="transformers.js")):
        sentences = [refusal.sentence() for refusal in exporter.refusals(plan)]
        (found,) = [sentence for sentence in sentences if "generation_config.json" in sentence]
        assert fragment in found
        assert str(tmp_path) in found


def test_all_reasons_come_at_once(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    files = written(
        tmp_path, generation_config={"top_p": 3, "temperature": "hot"}, tokenizer_config="{", special_tokens_map="1"
    )
    plan = with_files(artifact, files, config={"pad_token_id": "x"})
    assert [refusal.problem.split(" ")[0] for refusal in generation_refusals(plan)] == [
        "not", "must", "temperature", "top_p", "pad_token_id",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["{", '{"temperature": "hot"}'])
def test_plan_says_it_in_a_sentence(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    written(folder, generation_config=text)
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(folder), "--scheme", "w4g32", "--to", "onnx"])
    said = capsys.readouterr()
    assert "generation_config.json: " in said.out + said.err
    assert "Traceback" not in said.out + said.err


@pytest.mark.parametrize(("top_k", "found", "noted"), [(512, 512, 0), (0, 0, 0), (513, 0, 1), (5000, 0, 1), (-1, 0, 1)])
def test_a_top_k_beyond_the_vocabulary_is_left_out(
    artifact: QuantizedCheckpoint, tmp_path: Path, top_k: int, found: int, noted: int
) -> None:
    plan = with_files(artifact, written(tmp_path, generation_config={"do_sample": True, "top_k": top_k}))
    assert genai_config(plan, "model.onnx", GraphForm())["search"]["top_k"] == found
    notes = [note for note in OnnxExporter().notes(plan) if f"top_k {top_k}" in note]
    assert len(notes) == noted
    assert OnnxExporter().refusals(plan) == []


def test_a_small_vocabulary_has_no_fifty_to_draw_from(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    """50 is what transformers takes where the file says nothing, so nothing is to be said of it."""
    plan = with_files(artifact, written(tmp_path, generation_config={"do_sample": True}))
    assert read_generation(plan).search["top_k"] == 50
    small = with_files(artifact, tmp_path, config={"vocab_size": 40})
    assert read_generation(small).search["top_k"] == 0
    assert not any("top_k" in note for note in read_generation(small).notes)


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize("token", ["<|end|>", {"content": "<|end|>", "lstrip": False}])
def test_the_end_is_the_tokenizers_where_no_config_names_one(
    artifact: QuantizedCheckpoint, model: Path, tmp_path: Path, name: str, token: object
) -> None:
    shutil.copy(model / "tokenizer.json", tmp_path)
    plan = with_files(artifact, written(tmp_path, **{name: {"eos_token": token}}), config=SPECIAL)
    found = read_generation(plan)
    assert found.tokens == {"eos_token_id": 1, "pad_token_id": 1}
    assert found.notes == (
        "onnx: no end of text in generation_config.json or config.json; the tokenizer's is written, 1 ('<|end|>').",
    )
    assert found.notes[0] in OnnxExporter().notes(plan)
    assert read_generation(with_files(artifact, tmp_path)).notes == ()  # config.json names it


@pytest.mark.parametrize("text", ["<|unknown|>", None, 5])
def test_no_end_at_all_is_said(artifact: QuantizedCheckpoint, model: Path, tmp_path: Path, text: object) -> None:
    shutil.copy(model / "tokenizer.json", tmp_path)
    plan = with_files(artifact, written(tmp_path, tokenizer_config={"eos_token": text}), config=SPECIAL)
    found = read_generation(plan)
    assert found.tokens == {}
    (note,) = found.notes
    assert "names an end of text; onnxruntime-genai ends only at search.max_length" in note
    assert OnnxExporter().refusals(plan) == []


def test_ends_beyond_the_vocabulary_are_left_out(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    generation = {"eos_token_id": [1, 100000], "pad_token_id": -1, "bos_token_id": 512}
    found = read_generation(with_files(artifact, written(tmp_path, generation_config=generation)))
    assert found.tokens == {"eos_token_id": [1], "pad_token_id": 1}
    assert found.notes == ("onnx: eos_token_id [1, 100000] is not within the vocabulary; ids beyond it are left out.",)
    nowhere = read_generation(with_files(artifact, written(tmp_path, generation_config={"eos_token_id": -1})))
    assert "eos_token_id" not in nowhere.tokens
    assert len(nowhere.notes) == 2


@pytest.mark.parametrize(
    ("tokenizer", "found"),
    [
        ({"model": {"vocab": {"a": 0, "</s>": 7}}}, (7, "</s>")),
        ({"model": {"vocab": [["a", 0.0], ["</s>", -1.0]]}}, (1, "</s>")),
        ({"model": {"vocab": {}}, "added_tokens": [{"id": 9, "content": "</s>"}]}, (9, "</s>")),
        ({"model": {"vocab": {"</s>": 7}}, "added_tokens": [{"id": 9, "content": "</s>"}]}, (9, "</s>")),
        ({"model": {"vocab": {"</s>": 10}}}, None),  # no row in an embedding of ten
        ({"model": None, "added_tokens": 3}, None),
        ({}, None),
    ],
)
def test_ids_are_those_of_tokenizer_json(tmp_path: Path, tokenizer: object, found: tuple[int, str] | None) -> None:
    written(tmp_path, tokenizer=tokenizer, tokenizer_config={"eos_token": "</s>"})
    assert tokenizer_end(tmp_path, 10) == found


def test_onnxruntime_genai_generates_with_what_was_mended(model: Path, tmp_path: Path) -> None:
    og: Any = pytest.importorskip("onnxruntime_genai")
    import numpy as np

    files = tmp_path / "model"
    shutil.copytree(model, files)
    written(
        files, generation_config={"do_sample": True, "top_k": 5000, "eos_token_id": [1, 100000], "pad_token_id": -1}
    )
    artifact = write_rounded_artifact(files, tmp_path / "artifact", "w4g32")
    target = OnnxExporter(0).export(artifact, tmp_path / "onnx", silent).target
    loaded = og.Model(str(target))
    parameters = og.GeneratorParams(loaded)
    parameters.set_search_options(max_length=8)
    generator = og.Generator(loaded, parameters)
    generator.append_tokens(np.array([5, 6, 7], np.int32))
    generator.generate_next_token()
    assert len(generator.get_sequence(0)) == 4


def test_settings_say_what_they_need() -> None:
    assert {name: setting.needed for name, setting in SAMPLING.items()}["top_p"] == "a number from 0 to 1"
    assert all(setting.needed for setting in SAMPLING.values())
