"""The laws of every exporter, held by GgufExporter: nothing lost, nothing half-written, nothing different twice."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters.gguf.container import GgufFile
from exporters.gguf.exporter import GgufExporter
from exporters.gguf.hyperparameters import rope_factors
from exporters.gguf.layout import TYPE_BYTES
from exporters.gguf.naming import size_label
from exporters.gguf.packing import BLOCK_TYPES, BlockType
from signround.artifact import QuantizedCheckpoint
from signround.checkpoint import SourceCheckpoint
from signround.errors import FailedError, RefusedError
from signround.events import StageAdvanced, StageStarted, silent
from signround.exporting import ExportedModel, Exporter
from signround.plan import CalibrationSpec, KeptTensor, ModelPlan, make_plan
from signround.positions import Rope
from signround.recipes import settings_for
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import FAMILIES, write_small_model

CASES = [
    ("llama", "w4g32", "llama3"),
    ("llama-untied", "w4g128", "gpt2"),
    ("llama-biased", "q4_1", "llama3"),
    ("llama3-rope", "w8g32", "llama3"),
    ("smollm2-like", "w4g256", "gpt2"),
    ("mistral", "q5_1", "llama2"),
    ("qwen2", "q8_0", "qwen2"),
    ("qwen3", "q5_0", "qwen2"),
    ("gemma2", "w4g32", "llama2"),
    ("gemma3", "q4_1", "llama2"),
    ("phi3", "w4g64", "llama2"),
    ("phi4-mini-like", "q5_1", "gpt2"),
    ("smollm3", "w4g32", "llama3"),
    ("granite", "q8_0", "gpt2"),
    ("olmo2", "w4g128", "gpt2"),
    ("qwen2-moe", "w4g32", "qwen2"),
    ("qwen3-moe", "q5_1", "qwen2"),
    ("mixtral", "q8_0", "llama2"),
]


def made(case: tuple[str, str, str], folder: Path) -> QuantizedCheckpoint:
    family, scheme, tokenizer = case
    model = write_small_model(folder / "model", family, tokenizer=tokenizer)
    return write_rounded_artifact(model, folder / "artifact", scheme)


def planned(folder: Path, scheme: str, family: str = "llama", **overrides: object) -> ModelPlan:
    model = write_small_model(folder / "model", family, **overrides)
    settings = settings_for("rtn", context=64, samples=2, seqlen=16)
    return make_plan(SourceCheckpoint(model), scheme, settings, CalibrationSpec("self"))


def test_it_is_an_exporter() -> None:
    assert isinstance(GgufExporter(), Exporter)


def test_every_family_is_covered() -> None:
    assert {family for family, _, _ in CASES} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_what_goes_in_comes_out(case: tuple[str, str, str], tmp_path: Path) -> None:
    artifact, exporter = made(case, tmp_path), GgufExporter()
    assert exporter.refusals(artifact.plan) == []
    events: list[object] = []
    exported = exporter.export(artifact, tmp_path / "out", events.append)
    assert exported == exporter.opened(exported.target) == exporter.opened(tmp_path / "out")
    assert exported.target.stat().st_size == exporter.estimated_bytes(artifact.plan)
    size = size_label(artifact.plan.parameters)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"model-{size}-{case[1].upper()}.gguf"]
    assert isinstance(events[0], StageStarted)
    assert isinstance(events[-1], StageAdvanced)
    assert events[-1].done == events[-1].total == len(events) - 1

    back = dict(exporter.read_back(exported))
    assert set(back) == set(artifact.layers)
    for name, tensor in back.items():
        wanted = artifact.quantized(name)
        assert tensor.grid == wanted.grid
        assert torch.equal(tensor.codes, wanted.codes)
        assert all(torch.equal(tensor.fields[key], wanted.fields[key]) for key in wanted.fields)

    decoded = dict(exporter.decode_independently(exported))
    assert set(decoded) == set(artifact.layers) | set(artifact.kept)
    for name, weight in decoded.items():
        assert torch.equal(weight, artifact.weight(name) + exported.added.get(name, 0.0)), name


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_every_block_type_goes_in_and_comes_out(kind: BlockType, tmp_path: Path) -> None:
    """Rows of 256 and 512, q and k rows permuted, on a model of one block."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 320}
    model = write_small_model(tmp_path / "model", "llama", layers=1, **sizes)
    artifact, exporter = write_rounded_artifact(model, tmp_path / "artifact", kind.name.lower()), GgufExporter()
    assert exporter.refusals(artifact.plan) == []
    assert exporter.notes(artifact.plan) == []
    exported = exporter.export(artifact, tmp_path / "out", silent)
    assert exported.target.stat().st_size == exporter.estimated_bytes(artifact.plan)
    file = GgufFile(exported.target, TYPE_BYTES)
    assert file.values["general.file_type"] == kind.file_type
    assert {file.tensors[f"blk.0.{name}.weight"].type for name in ("attn_q", "attn_v", "ffn_down")} == {kind.code}
    for name, tensor in exporter.read_back(exported):
        assert torch.equal(tensor.decode(), artifact.weight(name)), name
    if kind.name == "Q2_0":
        with pytest.raises(RefusedError, match="gguf-py does not know Q2_0; update the gguf package"):
            list(exporter.decode_independently(exported))
        return
    decoded = dict(exporter.decode_independently(exported))
    assert set(decoded) == set(artifact.layers) | set(artifact.kept)
    assert all(torch.equal(weight, artifact.weight(name)) for name, weight in decoded.items())


def test_two_exports_are_the_same_bytes(tmp_path: Path) -> None:
    artifact = made(CASES[0], tmp_path)
    one = GgufExporter().export(artifact, tmp_path / "one", silent).target
    two = GgufExporter().export(artifact, tmp_path / "two", silent).target
    assert one.read_bytes() == two.read_bytes()


def test_metadata_is_complete(tmp_path: Path) -> None:
    artifact = made(("llama3-rope", "w4g32", "llama3"), tmp_path)
    target = GgufExporter().export(artifact, tmp_path / "out", silent).target
    file = GgufFile(target, TYPE_BYTES)
    wanted = {
        "general.architecture": "llama",
        "general.file_type": 2,
        "general.name": "Model 361K",
        "general.basename": "model",
        "general.size_label": "361K",
        "general.type": "model",
        "signround.method": "rtn",
        "signround.recipe": "default",
        "signround.calibration.source": "self",
        "signround.calibration.samples": 2,
        "signround.calibration.seqlen": 16,
        "signround.iters": 0,
        "signround.seed": 0,
        "general.quantization_version": 2,
        "general.quantized_by": "signround",
        "llama.context_length": 1024,
        "llama.embedding_length": 128,
        "llama.block_count": 2,
        "llama.feed_forward_length": 256,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 500000.0,
        "llama.vocab_size": 512,
        "signround.scheme": "w4g32",
        "signround.artifact": artifact.fingerprint,
        "signround.plan": artifact.plan.fingerprint,
    }
    assert {key: file.values[key] for key in wanted} == wanted
    assert next(iter(file.values)) == "general.architecture"
    assert file.values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert file.tensors["rope_freqs.weight"].shape == (16,)
    assert file.tensors["blk.1.attn_norm.weight"].type == 0
    assert file.tensors["token_embd.weight"].type == 30
    assert "output.weight" not in file.tensors


def test_rope_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = Rope(500000.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=256)
    parameters = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=parameters)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    ours = rope_factors(rope, 64)
    assert ours is not None
    np.testing.assert_allclose(plain / ours, theirs.numpy(), rtol=1e-5)
    assert len(set(np.round(ours, 3))) > 3
    assert rope_factors(Rope(10000.0), 64) is None


@pytest.mark.parametrize(("choice", "code"), [("f16", 1), ("bf16", 30), ("f32", 0)])
def test_float_type_is_kept_and_reported(choice: str, code: int, tmp_path: Path) -> None:
    exporter, artifact = GgufExporter(float_type=choice), made(CASES[1], tmp_path)
    exported = exporter.export(artifact, tmp_path / "out", silent)
    assert exported.kept_dtype == {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[choice]
    assert exporter.opened(exported.target) == exported == GgufExporter().opened(exported.target)
    assert any(choice in note for note in exporter.notes(artifact.plan))
    types = {name: entry.type for name, entry in GgufFile(exported.target, TYPE_BYTES).tensors.items()}
    assert (types["token_embd.weight"], types["output.weight"], types["output_norm.weight"]) == (code, code, 0)
    decoded = dict(exporter.decode_independently(exported))
    for name in artifact.kept:
        kept = artifact.tensor(name)
        cast = kept.to(exported.kept_dtype) if kept.ndim > 1 else kept
        assert torch.equal(decoded[name], cast.float())


def test_overflow_of_f16_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama")
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 3] = 1e6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32")
    with pytest.raises(FailedError, match=r"model\.embed_tokens\.weight: holds values beyond the range of f16"):
        GgufExporter(float_type="f16").export(artifact, tmp_path / "out", silent)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = made(CASES[0], tmp_path)
    target = GgufExporter().export(artifact, tmp_path / "out", silent).target
    old = target.read_bytes()

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > len(old) // 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data) or 0

    monkeypatch.setattr("exporters.gguf.exporter.open", Full, raising=False)
    with pytest.raises(FailedError, match="the disk is full"):
        GgufExporter().export(artifact, tmp_path / "out", silent)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [target.name]
    assert target.read_bytes() == old


def test_a_failing_export_leaves_the_old_file(tmp_path: Path) -> None:
    artifact = made(CASES[0], tmp_path)
    target = GgufExporter().export(artifact, tmp_path / "out", silent).target
    before = target.read_bytes()
    (tmp_path / "artifact" / "blocks" / "00001.safetensors").unlink()
    with pytest.raises(FailedError, match="cannot be read"):
        GgufExporter().export(artifact, tmp_path / "out", silent)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [target.name]
    assert target.read_bytes() == before


@pytest.mark.parametrize("scheme", ["w2g32", "w3g64", "w4g16", "w4g32-asym", "w8g64-asym"])
def test_equal_reasons_are_one_refusal(scheme: str, tmp_path: Path) -> None:
    refusals = GgufExporter().refusals(planned(tmp_path, scheme))
    assert len(refusals) == 1
    assert "model.layers.0.self_attn.q_proj.weight and 13 more" in refusals[0].sentence()


def test_all_reasons_are_given_at_once(tmp_path: Path) -> None:
    plan = planned(tmp_path, "w4g32", intermediate_size=240)
    (plan.files / "tokenizer.json").unlink()
    sentences = [refusal.sentence() for refusal in GgufExporter(float_type="q4", pre="auto").refusals(plan)]
    assert len(sentences) == 3
    assert "choose one of auto, f32, f16, bf16" in sentences[0]
    assert "rows of 240 weights" in sentences[1]
    assert "mlp.down_proj.weight and 1 more" in sentences[1]
    assert "neither tokenizer.json" in sentences[2]
    assert all("tokenizer" not in note for note in GgufExporter().notes(plan))


def test_biases_without_a_place_are_refused(tmp_path: Path) -> None:
    plan = planned(tmp_path, "w4g32", "qwen3", attention_bias=True)
    (sentence,) = [refusal.sentence() for refusal in GgufExporter().refusals(plan)]
    assert "qwen3 has no place for biases of self_attn.o_proj" in sentence


def test_notes_tell_growth_and_sliding_windows(tmp_path: Path) -> None:
    notes = GgufExporter().notes(planned(tmp_path, "w4g128", "mistral", sliding_window=64))
    assert any("takes 4.50 bits a weight there instead of 4.12" in note for note in notes)
    assert any("ignores the sliding window of MistralForCausalLM" in note for note in notes)
    assert GgufExporter().notes(planned(tmp_path / "two", "w4g32")) == []
    (note,) = GgufExporter().notes(planned(tmp_path / "three", "w2g128"))
    assert "Q2_0 keeps a scale every 64 weights, so w2g128 takes 2.25 bits a weight there instead of 2.12" in note


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    exporter = GgufExporter()
    with pytest.raises(RefusedError, match=r"exactly one \.gguf model \(a file or its parts\), found none"):
        exporter.opened(tmp_path)
    foreign = tmp_path / "x.gguf"
    foreign.write_bytes(b"GGML" + bytes(60))
    with pytest.raises(RefusedError, match="not a GGUF file of ours"):
        exporter.opened(foreign)
    with pytest.raises(RefusedError, match="not a GGUF file of ours"):
        exporter.opened(tmp_path / "missing.gguf")
    from gguf import GGUFWriter

    writer = GGUFWriter(foreign, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(RefusedError, match="not written by signround"):
        exporter.opened(foreign)


def test_a_changed_scale_is_seen(tmp_path: Path) -> None:
    """read_back must not paper over damage: one of the repeated scales is changed."""
    artifact = made(("llama", "w4g64", "llama3"), tmp_path)
    exported = GgufExporter().export(artifact, tmp_path / "out", silent)
    file = GgufFile(exported.target, TYPE_BYTES)
    raw = bytearray(exported.target.read_bytes())
    start = raw.index(file.data("blk.0.ffn_up.weight").tobytes())
    raw[start] ^= 1
    exported.target.write_bytes(raw)
    with pytest.raises(FailedError, match=r"blk\.0\.ffn_up\.weight is damaged \(scale differs within a group of 64\)"):
        list(GgufExporter().read_back(exported))


def test_a_kept_tensor_in_another_dtype_keeps_it(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama", dtype=torch.float16)
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32")
    kept = artifact.kept["model.embed_tokens.weight"]
    assert isinstance(kept, KeptTensor)
    exported = GgufExporter().export(artifact, tmp_path / "out", silent)
    assert isinstance(exported, ExportedModel)
    assert GgufFile(exported.target, TYPE_BYTES).tensors["token_embd.weight"].type == 1
    assert dataclasses.replace(GgufExporter(), pre="auto") == GgufExporter()


def test_the_card_of_the_model_is_carried(tmp_path: Path) -> None:
    """README.md of the folder that was quantised is in the artifact, so that a later export knows the licence too; it
    is no part of what the model is, so editing it makes no other model."""
    model = write_small_model(tmp_path / "tiny-300k-v2", "llama")
    before = SourceCheckpoint(model).sha256
    (model / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/tiny-1M\n---\n")
    assert SourceCheckpoint(model).sha256 == before
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32")
    target = GgufExporter().export(artifact, tmp_path / "out", silent).target
    assert target.name == "tiny-300K-v2-W4G32.gguf"
    wanted = {
        "general.name": "Tiny 300K v2",
        "general.version": "v2",
        "general.license": "apache-2.0",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Tiny 1M",
        "general.base_model.0.organization": "org",
        "general.base_model.0.repo_url": "https://huggingface.co/org/tiny-1M",
    }
    values = GgufFile(target, TYPE_BYTES).values
    assert {key: values.get(key) for key in wanted} == wanted
    (model / "README.md").write_text("---\nlicense: [\n---\n")
    settings = settings_for("rtn", context=64, samples=2, seqlen=16)
    plan = make_plan(SourceCheckpoint(model), "w4g32", settings, CalibrationSpec("self"))
    assert GgufExporter().refusals(plan) == []
    assert any("front matter of README.md cannot be read" in note for note in GgufExporter().notes(plan))


def test_a_class_of_transformers_that_ignores_tokenizer_json_is_noted(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama", layers=1, tokenizer="llama2")
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32")
    assert not [note for note in GgufExporter().notes(artifact.plan) if "transformers" in note]
    path = artifact.folder / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    (note,) = [note for note in GgufExporter().notes(artifact.plan) if "transformers" in note]
    assert note.startswith("gguf: LlamaTokenizer of transformers tokenises ")
