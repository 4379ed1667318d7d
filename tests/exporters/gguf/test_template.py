"""Another family by template: whatever its names and order, each tensor is found by its values, and swapped or kept."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from exporters.gguf.container import GgufFile
from exporters.gguf.exporter import GgufExporter
from exporters.gguf.layout import TYPE_BYTES
from exporters.gguf.matching import FloatTensor, RowMatcher, parts
from exporters.gguf.template import Template
from runtime_tests.gguf_floats import write_float_gguf
from signround import pipeline
from signround.artifact import QuantizedCheckpoint
from signround.checkpoint import SourceCheckpoint
from signround.errors import Refusal, RefusedError
from signround.events import silent
from signround.parity import compare_weights
from signround.plan import CalibrationSpec, make_plan
from signround.recipes import settings_for
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

Change = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def converted(model: Path, target: Path, float_type: str = "f16", change: Change = dict) -> Path:
    """A file as another converter would write it: gguf-py, shuffled tensors, more metadata, a license."""
    plain = GGUFReader(write_float_gguf(model, target.with_suffix(".plain"), float_type))
    tensors = change({tensor.name: np.array(tensor.data) for tensor in plain.tensors})
    kinds = {tensor.name: tensor.tensor_type for tensor in plain.tensors}
    writer = GGUFWriter(target, plain.fields["general.architecture"].contents())
    for key, field in plain.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    writer.add_license("apache-2.0")
    writer.add_array("general.languages", ["en", "de"])
    names = list(tensors)
    random.Random(3).shuffle(names)
    for name in names:
        bf16 = kinds.get(name) == GGMLQuantizationType.BF16
        writer.add_tensor(name, tensors[name], raw_dtype=GGMLQuantizationType.BF16 if bf16 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def by_template(artifact: QuantizedCheckpoint, template: Path, model: Path, out: Path) -> tuple[GgufExporter, Any]:
    exporter = GgufExporter(template=str(template), source=str(model))
    assert exporter.refusals(artifact.plan) == []
    exported = exporter.export(artifact, out, silent)
    assert exporter.estimated_bytes(artifact.plan) == exported.target.stat().st_size
    return exporter, exported


def exactly(exporter: GgufExporter, artifact: QuantizedCheckpoint, exported: Any) -> None:
    """Weights through gguf-py, integers through our own reader, and the same description from the file alone."""
    parity = compare_weights(artifact, exporter, exported)
    assert parity.reader == "independent"
    assert parity.passed, (parity.missing, parity.different)
    found = dict(exporter.read_back(exported))
    assert found.keys() == artifact.layers.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.codes, artifact.quantized(name).codes), name
    assert GgufExporter().opened(exported.target) == exported


@pytest.mark.parametrize(
    ("family", "float_type"),
    [
        ("llama", "f16"),
        ("llama-biased", "f32"),
        ("qwen2", "bf16"),
        ("qwen3", "f16"),
        ("gemma3", "f16"),
        ("phi3", "bf16"),
    ],
)
def test_the_same_tensors_as_without_a_template(family: str, float_type: str, tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", family)
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32")
    template = converted(model, tmp_path / "template.gguf", float_type)
    exporter, exported = by_template(artifact, template, model, tmp_path / "out")
    exactly(exporter, artifact, exported)
    usual = GgufExporter(float_type=float_type).export(artifact, tmp_path / "usual", silent)
    theirs, ours = (GgufFile(path, TYPE_BYTES) for path in (usual.target, exported.target))
    assert list(ours.tensors) == list(GgufFile(template, TYPE_BYTES).tensors)
    assert set(ours.tensors) == set(theirs.tensors)
    for name, entry in theirs.tensors.items():
        assert ours.tensors[name] == entry
        assert np.array_equal(ours.data(name), theirs.data(name)), name
    assert ours.values["general.languages"] == ["en", "de"]
    assert ours.values["general.file_type"] == theirs.values["general.file_type"]
    assert ours.values["general.quantized_by"] == "signround"
    assert ours.values["tokenizer.ggml.tokens"] == theirs.values["tokenizer.ggml.tokens"]


def fused_qkv(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """q, k and v of each block one after the other, heads interleaved between them."""
    for index in range(2):
        pieces = [tensors.pop(f"blk.{index}.attn_{part}.weight") for part in "qkv"]
        tensors[f"blk.{index}.attn_qkv.weight"] = np.concatenate(pieces)[::-1].copy()
    return tensors


def split_gate_up(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for index in range(2):
        gate, up = np.split(tensors.pop(f"blk.{index}.ffn_up.weight"), 2)
        tensors |= {f"blk.{index}.some_gate.weight": gate, f"blk.{index}.some_up.weight": up}
    return tensors


def stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gate and up of both blocks in one stack, as experts lie."""
    names = [f"blk.{index}.ffn_{part}.weight" for index in range(2) for part in ("gate", "up")]
    return tensors | {"stack.weight": np.stack([tensors.pop(name) for name in names])}


def written_out_head(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return tensors | {"output.weight": tensors["token_embd.weight"].copy()}


def full_embedding(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A kept matrix in float32 among others in float16, as routers are."""
    return tensors | {"output.weight": tensors["output.weight"].astype(np.float32)}


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", fused_qkv),
        ("qwen2", stacked),
        ("phi3", split_gate_up),
        ("llama", written_out_head),
        ("llama-untied", full_embedding),
    ],
)
def test_fused_split_stacked_and_doubled(family: str, change: Change, tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", family, dtype=torch.float16)
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "q4_1")
    template = converted(model, tmp_path / "template.gguf", change=change)
    exporter, exported = by_template(artifact, template, model, tmp_path / "out")
    exactly(exporter, artifact, exported)


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_experts_in_stacks_under_strange_names(family: str, tmp_path: Path) -> None:
    """What a converter does with a mixture: the experts of a block in one tensor, routers and norms in float32."""
    model = write_small_model(tmp_path / "model", family)
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32")
    checkpoint = SourceCheckpoint(model)
    stacks: dict[str, list[torch.Tensor]] = {}
    for name in sorted(checkpoint.tensors):
        stacks.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(checkpoint.read(name))
    writer = GGUFWriter(tmp_path / "template.gguf", "anything")
    for index, (name, tensors) in enumerate(stacks.items()):
        stack = torch.stack(tensors) if len(tensors) > 1 else tensors[0]
        full = stack.ndim == 1 or name.endswith(("gate.weight", "shared_expert_gate.weight"))
        writer.add_tensor(f"tensor.{index}", stack.to(torch.float32 if full else torch.float16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    exporter, exported = by_template(artifact, tmp_path / "template.gguf", model, tmp_path / "out")
    exactly(exporter, artifact, exported)
    assert any(len(entry.shape) == 3 for entry in GgufFile(exported.target, TYPE_BYTES).tensors.values())


def test_in_parts(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama")
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32")
    template = converted(model, tmp_path / "template.gguf", change=fused_qkv)
    exporter = GgufExporter(template=str(template), source=str(model), split_max_size="150K")
    assert exporter.refusals(artifact.plan) == []
    exported = exporter.export(artifact, tmp_path / "out", silent)
    assert len(exported.files) > 1
    exactly(exporter, artifact, exported)


def test_options_that_the_template_decides(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama")
    template = str(converted(model, tmp_path / "template.gguf"))
    plan = make_plan(SourceCheckpoint(model), "w4g32", settings_for("rtn", context=64), CalibrationSpec("self"))
    for option in ({"float_type": "f16"}, {"pre": "llama-bpe"}):
        (problem,) = GgufExporter(template=template, **option).refusals(plan)
        assert problem.problem.endswith("is given, and the template decides it")
    (problem,) = GgufExporter(source=str(model)).refusals(plan)
    assert problem.next_step == "add gguf.template=FILE"


def test_a_tokenizer_that_we_refuse(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama")
    template = converted(model, tmp_path / "template.gguf")
    (model / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32")
    assert GgufExporter().refusals(artifact.plan)
    exporter, exported = by_template(artifact, template, model, tmp_path / "out")
    exactly(exporter, artifact, exported)
    notes = exporter.notes(artifact.plan)
    assert any("come from template.gguf" in note for note in notes)


def test_equal_exports_and_no_source_needed_in_one_run(tmp_path: Path) -> None:
    """The pipeline plans with the checkpoint at hand; what it found then serves the export of the artifact."""
    model = write_small_model(tmp_path / "model", "qwen3")
    template = converted(model, tmp_path / "template.gguf")
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32")
    exporter = GgufExporter(template=str(template))
    assert exporter.refusals(replace(artifact.plan, files=model)) == []
    first = exporter.export(artifact, tmp_path / "one", silent).target
    _, second = by_template(artifact, template, model, tmp_path / "two")
    assert first.read_bytes() == second.target.read_bytes()


def test_an_artifact_alone_asks_for_its_source(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "qwen3", seed=5)
    other = write_small_model(tmp_path / "other", "qwen3", seed=6)
    template = converted(model, tmp_path / "template.gguf")
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32")
    options = {"template": str(template)}
    with pytest.raises(
        RefusedError, match=r"float checkpoint, and an artifact holds none; .*--set gguf\.source=FOLDER"
    ):
        pipeline.export(artifact.folder, "gguf", tmp_path / "out", options=options)
    with pytest.raises(RefusedError, match="not the checkpoint that was tuned"):
        pipeline.export(artifact.folder, "gguf", tmp_path / "out", options=options | {"source": str(other)})
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    pipeline.export(artifact.folder, "gguf", tmp_path / "out", options=options | {"source": str(model)})


def found(template: Path, model: Path, scheme: str = "w4g32") -> list[Refusal]:
    plan = make_plan(SourceCheckpoint(model), scheme, settings_for("rtn", context=64), CalibrationSpec("self"))
    return GgufExporter(template=str(template)).refusals(plan)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama")
    other = write_small_model(tmp_path / "other", "llama", seed=1)
    template = converted(model, tmp_path / "template.gguf")
    problems = [refusal.problem for refusal in found(template, other)]
    assert "not made of rows of the checkpoint: " in problems[0]
    assert "blk.0.attn_q.weight" in problems[0] or "more" in problems[0]
    assert problems[1].startswith("the template does not hold, or not wholly: ")

    def without(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: tensor for name, tensor in tensors.items() if name != "blk.1.ffn_down.weight"}

    (problem,) = found(converted(model, tmp_path / "less.gguf", change=without), model)
    assert problem.problem.endswith("model.layers.1.mlp.down_proj.weight")

    def touched(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors["blk.1.ffn_down.weight"][7, 3] += 1
        return tensors | {"odd.weight": np.ones((4, 4), np.float16)}

    problems = [one.problem for one in found(converted(model, tmp_path / "odd.gguf", change=touched), model)]
    assert "blk.1.ffn_down.weight" in problems[0]
    assert "odd.weight" in problems[0]
    assert problems[1].endswith("model.layers.1.mlp.down_proj.weight")

    def scaled(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs in another order: groups would not survive it."""
        return tensors | {"blk.0.attn_output.weight": tensors["blk.0.attn_output.weight"][:, ::-1].copy()}

    assert "blk.0.attn_output.weight" in found(converted(model, tmp_path / "c.gguf", change=scaled), model)[0].problem


def test_templates_that_are_no_templates(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama")
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32")
    quantised = GgufExporter().export(artifact, tmp_path / "out", silent).target
    assert "is quantised already (blk.0." in found(quantised, model)[0].problem
    whole = converted(model, tmp_path / "template.gguf").read_bytes()
    for name, content in {"cut": whole[:-5000], "header": whole[:300], "none": b"", "other": b"GGML" * 20}.items():
        damaged = tmp_path / f"{name}.gguf"
        damaged.write_bytes(content)
        (problem,) = found(damaged, model)
        assert "not an unquantised GGUF file" in problem.problem, name
    (problem,) = found(tmp_path / "missing.gguf", model)
    assert "No such file" in problem.problem
    writer = GGUFWriter(tmp_path / "split.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.add_tensor("a", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (problem,) = found(tmp_path / "split.gguf", model)
    assert problem.next_step == "merge it with llama-gguf-split --merge"


def test_one_tensor_of_two_grids_is_refused(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama")
    template = Template(converted(model, tmp_path / "template.gguf", change=fused_qkv))
    plan = make_plan(SourceCheckpoint(model), "w4g32", settings_for("rtn", context=64), CalibrationSpec("self"))
    assert template.refusals(plan) == []
    block = plan.blocks[0]
    other = make_plan(SourceCheckpoint(model), "w8g32", settings_for("rtn", context=64), CalibrationSpec("self"))
    layers = tuple(
        next(layer for layer in other.layers() if layer.name == one.name) if "v_proj" in one.name else one
        for one in block.layers
    )
    mixed = replace(plan, blocks=(replace(block, layers=layers), *plan.blocks[1:]))
    (problem,) = template.refusals(mixed)
    assert problem.problem.endswith("not quantised: blk.0.attn_qkv.weight")


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 12), st.booleans())
def test_any_rows_are_found(seed: int, count: int, rows: int, few_values: bool) -> None:
    """Matrices with equal rows, shuffled over tensors of the file: every row comes from an equal one, each once."""
    chance = np.random.default_rng(seed)
    values = [-1.0, 1.0] if few_values else chance.normal(size=50)
    checkpoint = {
        f"t.{index}.weight": torch.from_numpy(chance.choice(values, (rows, 3))).bfloat16() for index in range(count)
    }
    pile = torch.cat(list(checkpoint.values())).half()
    order = chance.permutation(len(pile))
    cut = int(chance.integers(0, len(pile) + 1))
    file = {name: pile[torch.from_numpy(part)] for name, part in (("a", order[:cut]), ("b", order[cut:])) if len(part)}
    tensors = [FloatTensor(name, tuple(tensor.shape), tensor.dtype) for name, tensor in file.items()]
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.items()}
    matching = RowMatcher(shapes, checkpoint.__getitem__, [torch.float16]).match(tensors, file.__getitem__)
    assert not matching.strange
    for name, origin in matching.origins.items():
        for checkpoint_name, here, there in parts(origin):
            assert torch.equal(checkpoint[checkpoint_name].half()[there], file[name][here])
    assert not matching.missing
