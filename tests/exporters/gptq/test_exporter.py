"""The folder that is written: the same integers, complete, deterministic, whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from exporters.gptq import exporter as module
from exporters.gptq.exporter import GptqExporter
from signround.artifact import QuantizedCheckpoint
from signround.errors import FailedError, RefusedError
from signround.events import Event, StageAdvanced, silent
from signround.exporting import ExportedModel
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import DENSE, write_small_model

# float32 sources: scales of bfloat16 weights have three bits to spare, which would hide a loss of precision.
CASES = [
    ("llama", "w4g32", "gptq"),
    ("llama-untied", "w2g16", "gptq"),
    ("llama-biased", "w3g64", "gptq"),
    ("qwen3", "w8g32", "gptq"),
    ("mistral", "w4gc", "gptq"),
    ("qwen2", "w4g32-asym", "gptq"),
    ("smollm2-like", "w4g32-asym", "gptq_v2"),
    ("llama", "q8_0", "gptq_v2"),
]


def make(
    folder: Path, family: str, scheme: str, checkpoint_format: str = "gptq", **options: object
) -> QuantizedCheckpoint:
    model = write_small_model(folder / "model", family, dtype=torch.float32, **options)  # type: ignore[arg-type]
    return write_rounded_artifact(model, folder / "artifact", scheme, GptqExporter(checkpoint_format).zero_floor)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return make(tmp_path_factory.mktemp("gptq"), "llama-biased", "w4g32")


def tensors_of(exported: ExportedModel) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in exported.files:
        if path.suffix == ".safetensors":
            found |= load_file(path)
    return found


@pytest.mark.parametrize(("family", "scheme", "checkpoint_format"), CASES)
def test_read_back_is_what_went_in_and_every_tensor_is_there(
    tmp_path: Path, family: str, scheme: str, checkpoint_format: str
) -> None:
    artifact = make(tmp_path, family, scheme, checkpoint_format)
    exporter = GptqExporter(checkpoint_format)
    exported = exporter.export(artifact, tmp_path / "gptq", silent)
    read = dict(exporter.read_back(exported))
    assert set(read) == set(artifact.layers)
    for name, tensor in read.items():
        original = artifact.quantized(name)
        assert torch.equal(tensor.codes, original.codes), name
        assert set(tensor.fields) == set(original.fields)
        assert all(torch.equal(tensor.fields[field], value) for field, value in original.fields.items()), name
        assert torch.equal(tensor.decode(), original.decode()), name
    stored = tensors_of(exported)
    packed = {f"{name.removesuffix('.weight')}.{part}" for name in read for part in module.PARTS}
    assert set(stored) == packed | set(artifact.kept)
    for name in artifact.kept:
        assert stored[name].dtype == artifact.tensor(name).dtype
        assert torch.equal(stored[name], artifact.tensor(name)), name


def test_kept_tensors_keep_their_dtype(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama-untied", dtype=torch.bfloat16)
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32")
    stored = tensors_of(GptqExporter().export(artifact, tmp_path / "gptq", silent))
    assert stored["lm_head.weight"].dtype == stored["model.norm.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16


@pytest.mark.parametrize(
    ("scheme", "group", "sym"), [("w4g32", 32, True), ("w8gc", -1, True), ("w2g64-asym", 64, False)]
)
def test_configuration(tmp_path: Path, scheme: str, group: int, sym: bool) -> None:
    artifact = make(tmp_path, "qwen3", scheme)
    exported = GptqExporter().export(artifact, tmp_path / "gptq", silent)
    config = json.loads((exported.target / "config.json").read_text())
    expected = {
        "quant_method": "gptq",
        "bits": int(scheme[1]),
        "group_size": group,
        "sym": sym,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }
    assert config.pop("quantization_config") == expected
    assert json.loads((exported.target / "quantize_config.json").read_text()) == expected
    assert config.pop("dtype") == config.pop("torch_dtype") == "float16"
    source = {key: value for key, value in artifact.plan.config.items() if key not in ("dtype", "torch_dtype")}
    assert config == source


def test_tokenizer_and_generation_files_are_carried(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    exported = GptqExporter().export(artifact, tmp_path / "gptq", silent)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (exported.target / name).read_bytes() == (artifact.plan.files / name).read_bytes()


def test_one_file_has_the_metadata_that_transformers_wants(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    exported = GptqExporter().export(artifact, tmp_path / "gptq", silent)
    assert not (exported.target / module.INDEX).exists()
    with safe_open(exported.target / module.SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_hold_whole_modules_and_the_index_is_right(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    limit = 60_000
    exporter = GptqExporter(max_shard_bytes=limit)
    exported = exporter.export(artifact, tmp_path / "gptq", silent)
    shards = [path for path in exported.files if path.suffix == ".safetensors"]
    count = len(shards)
    assert count > 3
    assert [path.name for path in shards] == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((exported.target / module.INDEX).read_text())
    contents = {path.name: load_file(path) for path in shards}
    assert index["weight_map"] == {name: file for file in sorted(contents) for name in contents[file]}
    sizes = {file: sum(tensor.nbytes for tensor in tensors.values()) for file, tensors in contents.items()}
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    for file, tensors in contents.items():
        modules = {name.rsplit(".", 1)[0] for name in tensors}
        assert sizes[file] <= limit or len(modules) == 1
        inside = [name for name in index["weight_map"] if name.rsplit(".", 1)[0] in modules]
        assert set(inside) == set(tensors)
    whole = tensors_of(GptqExporter().export(artifact, tmp_path / "whole", silent))
    sharded = tensors_of(exported)
    assert set(whole) == set(sharded)
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert {name for name, _ in exporter.read_back(exported)} == set(artifact.layers)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_two_exports_are_byte_identical(artifact: QuantizedCheckpoint, tmp_path: Path, max_shard_bytes: int) -> None:
    exporter = GptqExporter(max_shard_bytes=max_shard_bytes)
    first, second = (exporter.export(artifact, tmp_path / name, silent) for name in ("first", "second"))
    assert [path.name for path in first.files] == [path.name for path in second.files]
    for one, other in zip(first.files, second.files, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


@pytest.mark.parametrize("family", sorted(DENSE))
def test_estimate_is_within_two_per_cent(tmp_path: Path, family: str) -> None:
    artifact = make(tmp_path, family, "w4g32")
    exported = GptqExporter().export(artifact, tmp_path / "gptq", silent)
    size = sum(path.stat().st_size for path in exported.files)
    assert GptqExporter().estimated_bytes(artifact.plan) == pytest.approx(size, rel=0.02)


def test_progress_counts_every_tensor(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    events: list[Event] = []
    exported = GptqExporter().export(artifact, tmp_path / "gptq", events.append)
    steps = [event for event in events if isinstance(event, StageAdvanced)]
    assert [step.done for step in steps] == list(range(1, len(tensors_of(exported)) + 1))
    assert {step.total for step in steps} == {len(steps)}


def test_a_failing_export_leaves_nothing_and_keeps_what_was_there(
    artifact: QuantizedCheckpoint, tmp_path: Path
) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, StageAdvanced) and event.done == 30:
            raise OSError(28, "No space left on device")

    out = tmp_path / "gptq"
    with pytest.raises(FailedError, match="disk is full"):
        GptqExporter().export(artifact, out, fail)
    assert list(tmp_path.iterdir()) == []
    before = {path.name: path.read_bytes() for path in GptqExporter().export(artifact, out, silent).files}
    with pytest.raises(FailedError, match="disk is full"):
        GptqExporter().export(artifact, out, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["gptq"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_export_leaves_no_stale_shards(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    """The onnxruntime-genai builder loads every *.safetensors file of the folder."""
    GptqExporter(max_shard_bytes=50_000).export(artifact, tmp_path / "gptq", silent)
    GptqExporter().export(artifact, tmp_path / "gptq", silent)
    assert [path.name for path in (tmp_path / "gptq").glob("*.safetensors*")] == [module.SINGLE]


def test_export_refuses_what_plan_refuses(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model")
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32-asym")
    with pytest.raises(RefusedError, match="zero points may be 0"):
        GptqExporter().export(artifact, tmp_path / "gptq", silent)
    assert not (tmp_path / "gptq").exists()


def test_opened_gives_what_export_gave(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    exported = GptqExporter().export(artifact, tmp_path / "gptq", silent)
    assert GptqExporter("gptq_v2").opened(tmp_path / "gptq") == exported


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quant_method": "awq"}, "'awq', 'gptq' is needed"),
        ({"bits": 5}, "bits 5 is not read"),
        ({"desc_act": True}, "desc_act True is not read"),
        ({"dynamic": {"+:.*": {"bits": 8}}}, "dynamic .* is not read"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"),
        ({"group_size": None, "bits": None}, "bits None is not read"),
    ],
)
def test_other_folders_are_refused(
    artifact: QuantizedCheckpoint, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    out = GptqExporter().export(artifact, tmp_path / "gptq", silent).target
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= changes
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match=reason):
        GptqExporter().opened(out)


def test_folders_that_are_not_gptq_are_refused(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"no config\.json"):
        GptqExporter().opened(tmp_path)
    with pytest.raises(RefusedError, match=r"not the config\.json of a GPTQ folder"):
        GptqExporter().opened(artifact.plan.files)
    out = GptqExporter().export(artifact, tmp_path / "gptq", silent).target
    (out / module.SINGLE).unlink()
    with pytest.raises(RefusedError, match=r"no \*\.safetensors"):
        GptqExporter().opened(out)


def test_a_damaged_file_is_found_when_read_back(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    exporter = GptqExporter()
    exported = exporter.export(artifact, tmp_path / "gptq", silent)
    path = exported.target / module.SINGLE
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.qzeros"][0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(FailedError, match=r"model\.layers\.1\.mlp\.down_proj: .*zero point 8"):
        list(exporter.read_back(exported))
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, path)
    with pytest.raises(FailedError, match=r"model\.layers\.0\.mlp\.up_proj: .*scales"):
        list(exporter.read_back(exported))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FailedError, match="not a whole safetensors file"):
        list(exporter.read_back(exported))
