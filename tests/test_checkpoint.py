"""SourceCheckpoint: reads one tensor at a time, refuses what it cannot read safely, leaves nothing mapped."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from signround.checkpoint import SourceCheckpoint
from signround.errors import RefusedError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(llama_folder, tmp_path / "model")


@pytest.fixture
def sharded(untied_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(untied_folder, tmp_path / "sharded")


def refusal_of(folder: Path) -> str:
    with pytest.raises(RefusedError) as caught:
        SourceCheckpoint(folder)
    assert caught.value.exit_code == 2
    return str(caught.value)


def change_tensor(folder: Path, name: str, value: torch.Tensor) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({key: tensor.clone() for key, tensor in tensors.items()} | {name: value}, folder / WEIGHTS)


def test_every_tensor_is_listed_and_read_as_safetensors_does(folder: Path) -> None:
    checkpoint = SourceCheckpoint(folder)
    expected = load_file(folder / WEIGHTS)
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.parameters == sum(tensor.numel() for tensor in expected.values())
    assert {path.name for path in checkpoint.files} >= {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_shards_are_one_checkpoint(sharded: Path) -> None:
    checkpoint = SourceCheckpoint(sharded)
    files = {info.file.name for info in checkpoint.tensors.values()}
    assert len(files) > 1
    assert files == set(json.loads((sharded / INDEX).read_text())["weight_map"].values())
    assert torch.isfinite(checkpoint.read("lm_head.weight")).all()


def test_a_missing_folder_and_a_file(tmp_path: Path, folder: Path) -> None:
    assert "does not exist" in refusal_of(tmp_path / "nowhere")
    assert "it is a file" in refusal_of(folder / WEIGHTS)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in refusal_of(folder)


@pytest.mark.parametrize("content", [b"", b"{", b'{"model_type": ', b"\xff\xfe\x00", b"[1]", b'"llama"', b"3"])
def test_a_broken_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    sentence = refusal_of(folder)
    assert "config.json" in sentence
    assert "download the file again" in sentence


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused_and_not_opened(folder: Path, name: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 3'\ntR.")
    sentence = refusal_of(folder)
    assert name in sentence
    assert "safetensors" in sentence


def test_no_weights_at_all(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "no *.safetensors" in refusal_of(folder)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.1, 0.5, 0.999])
def test_truncated_weights(folder: Path, keep: float) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    sentence = refusal_of(folder)
    assert WEIGHTS in sentence
    assert "not a whole safetensors file" in sentence
    assert "\n" not in sentence


def test_one_byte_too_few_and_one_too_many(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    for changed in (data[:-1], data + b"\0"):
        (folder / WEIGHTS).write_bytes(changed)
        assert "not a whole safetensors file" in refusal_of(folder)


def _with_header(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


@pytest.mark.parametrize(
    "content",
    [
        _with_header(b"not json"),
        _with_header(b"[]"),
        _with_header(b"{}x"),
        _with_header(b"\xff\xff"),
        _with_header(b'{"a": 1}'),
        _with_header(b'{"a": {"dtype": "F32", "shape": [2]}}'),
        _with_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', bytes(4)),
        _with_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', bytes(8)),
        _with_header(b'{"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**9) + b"{}",
        b"<!DOCTYPE html><html>not found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    ],
)
def test_a_corrupt_header(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    assert "not a whole safetensors file" in refusal_of(folder)


def test_a_folder_in_place_of_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    assert "not a whole safetensors file" in refusal_of(folder)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(set(json.loads((sharded / INDEX).read_text())["weight_map"].values()))[1]
    (sharded / shard).unlink()
    sentence = refusal_of(sharded)
    assert shard in sentence
    assert "missing" in sentence


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors"])
def test_a_shard_outside_the_folder(sharded: Path, name: str) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    sentence = refusal_of(sharded)
    assert repr(name) in sentence
    assert "leaves the folder" in sentence


@pytest.mark.parametrize("content", ["", "{}", "[]", "3", '{"weight_map": []}', '{"weight_map": {"a": 3}}',
                                     '{"weight_map": {"a": ["b"]}}', '{"weight_map": null}'])  # fmt: skip
def test_a_broken_shard_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    assert "not a valid shard index" in refusal_of(sharded)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    names = ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"]
    assert SourceCheckpoint(folder).non_finite() == []
    for name in names:
        spoiled = load_file(folder / WEIGHTS)[name].clone()
        spoiled.view(-1)[-1] = value
        change_tensor(folder, name, spoiled)
    found = SourceCheckpoint(folder).non_finite()
    assert sorted(refusal.subject for refusal in found) == sorted(names)
    assert all("NaN or Inf" in refusal.sentence() for refusal in found)


@pytest.mark.parametrize(
    ("dtype", "spelling"), [(torch.int8, "I8"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_unsupported_dtypes_are_refused_by_tensor(folder: Path, dtype: torch.dtype, spelling: str) -> None:
    change_tensor(folder, "model.norm.weight", torch.zeros(128).to(dtype))
    sentence = refusal_of(folder)
    assert sentence.startswith("model.norm.weight: ")
    assert spelling in sentence
    assert "BF16, F16, F32" in sentence


def test_the_hash_does_not_know_the_place_and_knows_every_byte(folder: Path, tmp_path: Path) -> None:
    original = SourceCheckpoint(folder).sha256
    moved = folder.rename(tmp_path / "elsewhere")
    (moved / "README.md").write_text("not part of the model")
    assert SourceCheckpoint(moved).sha256 == original
    for name in (WEIGHTS, "config.json", "tokenizer.json"):
        data = (moved / name).read_bytes()
        flipped = data[:-1] + bytes([data[-1] ^ 1]) if name == WEIGHTS else data + b"\n"
        (moved / name).write_bytes(flipped)
        assert SourceCheckpoint(moved).sha256 != original
        (moved / name).write_bytes(data)
    (moved / "generation_config.json").unlink(missing_ok=True)
    (moved / "vocab.json").write_text("{}")
    assert SourceCheckpoint(moved).sha256 != original


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_reading_leaves_no_file_mapped_or_open(folder: Path) -> None:
    checkpoint = SourceCheckpoint(folder)
    tensors = [checkpoint.read(name) for name in checkpoint.tensors]
    assert str(folder) not in Path("/proc/self/maps").read_text()
    (folder / WEIGHTS).write_bytes(b"")  # a mapped tensor would now be lost
    assert all(torch.isfinite(tensor).all() for tensor in tensors)
    assert not [link for link in Path("/proc/self/fd").iterdir() if link.exists() and folder in link.resolve().parents]
