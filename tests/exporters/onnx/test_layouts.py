"""The folders of each runtime: names, data files, configs, chat templates; and one function that finds the graph."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporters.onnx import layouts
from exporters.onnx.carried import chat_templates, side_files, template_note
from exporters.onnx.exporter import OnnxExporter
from exporters.onnx.form import GraphForm
from exporters.onnx.genai import genai_config
from exporters.onnx.layouts import Places
from signround.artifact import QuantizedCheckpoint
from signround.checkpoint import SourceCheckpoint
from signround.cli.main import main
from signround.errors import FailedError, RefusedError
from signround.events import silent
from signround.pipeline import export
from signround.plan import CalibrationSpec, ModelPlan, make_plan
from signround.recipes import settings_for
from signround.runtimes.onnx_files import SUFFIXES, find_graph
from signround.runtimes.targets import kind_of
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model
from tests.tokenizer_families import PUBLISHED, write_byte_level

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")
BROWSER = OnnxExporter(layout="transformers.js")
TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    folder = tmp_path_factory.mktemp("layouts")
    write_small_model(folder / "model", "llama", layers=1)
    return write_rounded_artifact(folder / "model", folder / "artifact", "w4g32")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def with_grids(plan: ModelPlan, *bits: int) -> ModelPlan:
    """The plan with these bits in its layers, again and again."""
    (block,) = plan.blocks
    layers = tuple(
        replace(layer, grid=replace(layer.grid, bits=bits[index % len(bits)]))
        for index, layer in enumerate(block.layers)
    )
    return replace(plan, blocks=(replace(block, layers=layers),))


@pytest.mark.parametrize(
    ("bits", "dtype", "name"),
    [
        ((4,), "fp32", "q4"), ((3,), "fp32", "q4"), ((2,), "fp32", "q2"), ((8,), "fp32", "q8"), ((4,), "fp16", "q4f16"),
        ((2,), "fp16", "q2f16"), ((8, 4, 4), "fp32", "q4"), ((3, 2, 3), "fp32", "q4"),
    ],
)  # fmt: skip
def test_transformers_js_finds_the_graph_by_its_dtype(
    artifact: QuantizedCheckpoint, bits: tuple[int, ...], dtype: str, name: str
) -> None:
    plan = with_grids(artifact.plan, *bits)
    places = layouts.places_of("transformers.js", plan, dtype)
    file = f"model{SUFFIXES[name]}.onnx"
    assert places.graph == f"onnx/{file}"
    assert [places.data_file(index) for index in range(3)] == [f"{file}_data", f"{file}_data_1", f"{file}_data_2"]
    config = layouts.browser_config(plan, places, dtype, 3)["transformers.js_config"]
    assert config["dtype"] == name
    assert config["use_external_data_format"] == {file: 3}
    assert ("kv_cache_dtype" in config) == (dtype == "fp16")


def test_refusals(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    plan = artifact.plan
    (unknown,) = OnnxExporter(layout="web").refusals(plan)
    assert "layout 'web' is not known; allowed are genai, transformers.js" in unknown.sentence()
    (wide,) = layouts.refusals_of("transformers.js", with_grids(plan, 8), "fp16")
    assert "no name for 8-bit weights in an fp16 graph" in wide.sentence()
    assert layouts.refusals_of("genai", with_grids(plan, 8), "fp16") == []
    (bare,) = BROWSER.refusals(replace(plan, files=tmp_path))
    assert "no tokenizer.json" in bare.sentence()
    family = replace(plan.architecture.family, model_type="somebodys")
    other = replace(plan)
    other.__dict__["architecture"] = replace(plan.architecture, family=family)
    assert "no class for LlamaForCausalLM" in layouts.refusals_of("transformers.js", other, "fp32")[0].sentence()
    write_small_model(tmp_path / "experts", "qwen3-moe", layers=1)
    settings = settings_for("rtn", context=64, samples=2, seqlen=16)
    experts = make_plan(SourceCheckpoint(tmp_path / "experts"), "w4g32", settings, CalibrationSpec("self"))
    assert "does not load QMoE" in " ".join(refusal.sentence() for refusal in BROWSER.refusals(experts))
    with pytest.raises(RefusedError, match="layout 'web'"):
        OnnxExporter(layout="web").export(artifact, tmp_path / "out", silent)


@given(st.lists(st.integers(1, 50)), st.integers(1, 60))
def test_data_files_hold_whole_tensors_up_to_a_size(sizes: list[int], limit: int) -> None:
    chunks = Places("any", "g", "d", limit).chunks(sizes)
    assert chunks == sorted(chunks)
    assert sorted(set(chunks)) == list(range(len(set(chunks))))
    for chunk in set(chunks):
        members = [size for size, place in zip(sizes, chunks, strict=True) if place == chunk]
        assert sum(members) <= limit or len(members) == 1
    for first, second in zip(sorted(set(chunks)), sorted(set(chunks))[1:], strict=False):
        held = sum(size for size, place in zip(sizes, chunks, strict=True) if place == first)
        assert held + sizes[chunks.index(second)] > limit  # no file earlier than needed
    assert set(Places("any", "g", "d", None).chunks(sizes)) <= {0}


def test_the_browsers_folder(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    exported = BROWSER.export(artifact, tmp_path / "out", silent)
    graph, data = "onnx/model_q4.onnx", "onnx/model_q4.onnx_data"
    assert names(tmp_path / "out") == {
        graph, data, "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"
    }  # fmt: skip
    assert {path.relative_to(exported.target).as_posix() for path in exported.files} == names(exported.target)
    config = json.loads((exported.target / "config.json").read_text())
    assert config.pop("transformers.js_config") == {
        "dtype": "q4", "use_external_data_format": {"model_q4.onnx": 1}
    }  # fmt: skip
    assert config == artifact.plan.config
    written = sum(path.stat().st_size for path in exported.files)
    assert BROWSER.estimated_bytes(artifact.plan) == pytest.approx(written, rel=0.02)
    plain = OnnxExporter().export(artifact, tmp_path / "plain", silent)
    assert (plain.target / "model.onnx.data").read_bytes() == (exported.target / data).read_bytes()


def test_several_data_files_are_one_model(
    artifact: QuantizedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "CHUNK_BYTES", 60_000)
    exported = BROWSER.export(artifact, tmp_path / "out", silent)
    files = sorted((exported.target / "onnx").glob("*_data*"), key=lambda path: (len(path.name), path.name))
    assert len(files) > 3
    assert [path.name for path in files[:3]] == [f"model_q4.onnx_data{end}" for end in ("", "_1", "_2")]
    config = json.loads((exported.target / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {"model_q4.onnx": len(files)}
    for name, weight in BROWSER.decode_independently(exported):
        assert torch.equal(weight, artifact.weight(name)), name
    for name, tensor in BROWSER.read_back(OnnxExporter().opened(exported.target)):
        assert torch.equal(tensor.codes, artifact.quantized(name).codes), name
    monkeypatch.setattr(layouts, "CHUNK_BYTES", 1)
    monkeypatch.setattr("exporters.onnx.data_files.MOST_CHUNKS", 3)
    with pytest.raises(FailedError, match="data files, 3 are the most"):
        BROWSER.export(artifact, tmp_path / "many", silent)
    assert not (tmp_path / "many").exists()


def test_equal_bytes_twice(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    first, second = (BROWSER.export(artifact, tmp_path / name, silent).files for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_graph_is_found_wherever_it_lies(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"no model\.onnx, and no onnx/model_q4\.onnx"):
        find_graph(tmp_path)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "something_q4.onnx").touch()
    (tmp_path / "onnx" / "model_q4.onnx").touch()
    assert find_graph(tmp_path).name == "model_q4.onnx"
    assert kind_of(tmp_path) == "onnx"
    (tmp_path / "onnx" / "model_q2.onnx").touch()
    with pytest.raises(RefusedError, match=r"several graphs \(model_q2\.onnx, model_q4\.onnx\)"):
        find_graph(tmp_path)
    (tmp_path / "config.json").write_text('{"transformers.js_config": {"dtype": "q2"}}')
    assert find_graph(tmp_path).name == "model_q2.onnx"
    (tmp_path / "model.safetensors").touch()
    assert kind_of(tmp_path) == "checkpoint"
    (tmp_path / "model.onnx").touch()
    assert find_graph(tmp_path) == tmp_path / "model.onnx"
    assert kind_of(tmp_path) == "onnx"


def test_the_command_line(artifact: QuantizedCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> tuple[object, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code, capsys.readouterr().err

    job = ("export", artifact.folder, "-o", tmp_path / "out")
    assert run(*job, "--to", "onnx", "--layout", "transformers.js")[0] == 0
    assert find_graph(tmp_path / "out").name == "model_q4.onnx"
    code, said = run(*job, "--to", "gptq", "--layout", "genai")
    assert (code, "--layout: this is an option of onnx" in said) == (2, True)
    code, said = run(*job, "--to", "onnx", "--layout", "phone")
    assert (code, "layout 'phone' is not known" in said) == (2, True)
    target = export(artifact, "onnx", tmp_path / "set", options={"layout": "transformers.js"}).target
    assert find_graph(target).name == "model_q4.onnx"


def files_with(folder: Path, **content: Any) -> Path:
    """A folder of tokenizer files; keys are the names with _ for the dot."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    for name, text in content.items():
        path = folder / name.replace("__", "/").replace("_json", ".json").replace("_jinja", ".jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text if isinstance(text, str) else json.dumps(text))
    return folder


def template_in(plan: ModelPlan, layout: str) -> Any:
    item = side_files(plan, layout, {})["tokenizer_config.json"]
    return json.loads(item if isinstance(item, str) else item.read_text()).get("chat_template")


def test_both_runtimes_get_the_template_that_transformers_uses(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    inside = files_with(tmp_path / "a", tokenizer_config_json={"chat_template": TEMPLATE, "x": 1})
    plan = replace(artifact.plan, files=inside)
    assert side_files(plan, "genai", {})["tokenizer_config.json"] == inside / "tokenizer_config.json"  # as it was
    beside = files_with(
        tmp_path / "b", tokenizer_config_json={"chat_template": "old", "x": "ö"}, chat_template_jinja=TEMPLATE
    )
    plan = replace(artifact.plan, files=beside)
    assert template_in(plan, "genai") == template_in(plan, "transformers.js") == TEMPLATE
    text = side_files(plan, "genai", {})["tokenizer_config.json"]
    assert isinstance(text, str)
    assert '"x": "ö"' in text
    absent = files_with(tmp_path / "c")
    plan = replace(artifact.plan, files=absent)
    assert chat_templates(absent) == {}
    assert template_in(plan, "genai") is None
    assert "tokenizer_class" in str(side_files(plan, "genai", {})["tokenizer_config.json"])


def test_named_templates(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    listed = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "T"}]
    inside = files_with(tmp_path / "a", tokenizer_config_json={"chat_template": listed})
    beside = files_with(
        tmp_path / "b", tokenizer_config_json={}, chat_template_jinja=TEMPLATE,
        additional_chat_templates__tool_use_jinja="T",
    )  # fmt: skip
    for files in (inside, beside):
        plan = replace(artifact.plan, files=files)
        assert template_in(plan, "genai") == TEMPLATE  # onnxruntime-genai cannot open a list
        assert template_in(plan, "transformers.js") == listed
        assert "tool_use must be passed by hand" in str(template_note(files, "genai"))
        assert "tool_use must be passed by hand" in " ".join(OnnxExporter().notes(plan))
        assert template_note(files, "transformers.js") is None
    unnamed = files_with(tmp_path / "c", tokenizer_config_json={"chat_template": listed[1:]})
    assert template_in(replace(artifact.plan, files=unnamed), "genai") is None


def test_sampling_is_the_publishers(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    def search(**generation: Any) -> dict[str, Any]:
        files = tmp_path / str(len(list(tmp_path.iterdir())))
        files.mkdir()
        (files / "generation_config.json").write_text(json.dumps(generation))
        found = dict(genai_config(replace(artifact.plan, files=files), "model.onnx", GraphForm())["search"])
        assert found.pop("past_present_share_buffer") is True
        assert found.pop("max_length") == 512
        return found

    assert search() == {"do_sample": False}
    assert search(do_sample=True, temperature=0.6, top_p=0.95, top_k=20, min_p=0.1, max_length=20) == {
        "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20
    }  # fmt: skip
    assert search(do_sample=True, temperature=None) == {
        "do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 1.0
    }  # fmt: skip
    assert search(repetition_penalty=1) == {"do_sample": False, "repetition_penalty": 1.0}


def test_special_tokens_are_lists_where_there_are_several(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 5, 7]}')
    config = replace(artifact.plan, files=tmp_path, config={**artifact.plan.config, "pad_token_id": None})
    found = genai_config(config, "model.onnx", GraphForm())["model"]
    assert (found["eos_token_id"], found["pad_token_id"], found["bos_token_id"]) == ([1, 5, 7], 1, 0)


def test_metadata_names_tuner_and_sources(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    exporter = OnnxExporter(accuracy_level=0)
    exported = exporter.export(artifact, tmp_path / "out", silent)
    found = exporter.inspected(exported.target)
    assert found["ours"] is True
    assert found["problems"] == []
    metadata = found["graph"]["metadata"]
    tuning = json.loads(metadata["signround.tuning"])
    assert (tuning["method"], tuning["seed"], tuning["iters"]) == ("rtn", 0, 0)
    assert metadata["signround.artifact"] == artifact.fingerprint
    assert metadata["signround.source_sha256"] == artifact.plan.source_sha256
    assert json.loads(metadata["signround.options"])["accuracy_level"] == 0
    assert metadata["signround.bits_per_weight"] == "4.5000"
    (operator,) = found["operators"]
    assert operator == {
        "operator": "MatMulNBits", "storage": "UINT8", "bits": 4, "block_size": 32, "accuracy_level": 0,
        "zero_points": False, "nodes": 4, "weights": 147456,
    }  # fmt: skip


def test_notes_for_the_browser(artifact: QuantizedCheckpoint) -> None:
    (padding,) = BROWSER.notes(artifact.plan)
    assert "pads batches on the left" in padding
    (version,) = replace(BROWSER, flavour="std").notes(artifact.plan)
    assert "needs transformers.js 4" in version
    assert "needs transformers.js 4" in " ".join(layouts.browser_notes(with_grids(artifact.plan, 2), "contrib"))
    assert not any("transformers.js" in note for note in OnnxExporter().notes(artifact.plan))


def tokenizer_notes_of(plan: ModelPlan, files: Path) -> str:
    return " ".join(note for note in OnnxExporter().notes(replace(plan, files=files)) if "onnxruntime-genai" in note)


def test_the_plan_says_how_onnxruntime_genai_reads_the_tokenizer(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    plan = artifact.plan
    assert tokenizer_notes_of(plan, plan.files) == ""
    write_byte_level(tmp_path / "a", PUBLISHED["exaone-moe"], 600)
    assert "cannot load this tokenizer (Invalid regex" in tokenizer_notes_of(plan, tmp_path / "a")
    write_byte_level(tmp_path / "b", PUBLISHED["qwen2"], 600)
    text = tokenizer_notes_of(plan, tmp_path / "b")
    assert "other tokens than tokenizer.json of 1 of 7 probe texts" in text  # NFC is left out
    assert "decomposed" in text
    write_byte_level(tmp_path / "c", PUBLISHED["llama-bpe"], 600)
    settings = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())
    (tmp_path / "c" / "chat_template.jinja").write_text("{{ messages[0]['content'] | upper }}")
    assert "cannot render the chat template (Value is not callable" in tokenizer_notes_of(plan, tmp_path / "c")
    (tmp_path / "c" / "chat_template.jinja").write_text(TEMPLATE)
    assert tokenizer_notes_of(plan, tmp_path / "c") == ""
    settings["tokenizer_class"] = "UnheardOfTokenizer"
    (tmp_path / "c" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "Unsupported tokenizer class: UnheardOfTokenizer" in tokenizer_notes_of(plan, tmp_path / "c")
