"""One artifact, three files, identical integers: read here with numpy, gguf-py, onnx and safetensors alone.

Nothing of `signround` or `exporters` reads or unpacks in this file: what is compared are the bits on disk, unpacked
below from the formats' own documents. The artifact's files are safetensors too and are read as such.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from signround.pipeline import export
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

EXAMPLE = Path(__file__).parent.parent / "examples" / "llama-4m"
GGUF_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
              "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down"}  # fmt: skip
Linears = dict[str, dict[str, NDArray[Any]]]


def nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two codes a byte, the low four bits first: [..., n] -> [..., 2 n]."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def from_artifact(folder: Path) -> Linears:
    from safetensors.numpy import load_file

    found: Linears = {}
    for path in sorted((folder / "blocks").glob("*.safetensors")):
        for key, value in load_file(path).items():
            name, _, part = key.partition(".weight.")
            if part:  # norms have no parts
                found.setdefault(name, {})[part] = value
    return found


def from_gguf(path: Path, config: dict[str, Any]) -> Linears:
    """Q4_0: blocks of 32 in 18 bytes: fp16 scale, then byte j = code j | code (j + 16) << 4 (ggml-common.h). q and k
    of a Llama have each head's rows interleaved: file row 2 i + h is row h * half + i (convert_hf_to_gguf.py)."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found: Linears = {}
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in GGUF_NAMES.items():
            tensor = tensors[f"blk.{layer}.{theirs}.weight"]
            assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0
            columns, rows = (int(size) for size in tensor.shape)
            blocks = np.asarray(tensor.data).reshape(rows, columns // 32, 18)
            scale = blocks[..., :2].copy().view(np.float16)[..., 0]
            halves = blocks[..., 2:]
            codes = np.concatenate([halves & 15, halves >> 4], axis=-1).reshape(rows, columns)
            if theirs in ("attn_q", "attn_k"):
                heads = config["num_attention_heads" if theirs == "attn_q" else "num_key_value_heads"]
                order = np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
                straight = np.empty_like(order)
                straight[order] = np.arange(rows)  # file row r holds row order[r]
                codes, scale = codes[straight], scale[straight]
            found[f"model.layers.{layer}.{ours}"] = {"codes": codes, "scale": scale}
    return found


def from_onnx(folder: Path, config: dict[str, Any]) -> Linears:
    """MatMulNBits: B [rows, groups, blob] with two codes a byte; scales [rows, groups] float; zero points two a byte,
    each row padded to a byte, 8 when left out (onnxruntime, docs/ContribOperators.md). q, k and v are one product, gate
    and up another."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(folder / "model.onnx")
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found: Linears = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        attributes = {entry.name: entry.i for entry in node.attribute}
        assert attributes["bits"] == 4
        packed = arrays[node.input[1]]
        rows, groups = packed.shape[:2]
        name = next(part for part in (node.input[1], node.name) if "layers." in part)
        linear = {
            "codes": nibbles(packed).reshape(rows, -1)[:, : attributes["K"]],
            "scale": arrays[node.input[2]].reshape(rows, groups),
        }
        if len(node.input) > 3 and node.input[3]:
            linear["zero_point"] = nibbles(arrays[node.input[3]].reshape(rows, -1))[:, :groups]
        block, _, kind = linear_name(name).rpartition(".")
        if kind == "gate_up_proj":
            for half, part in enumerate(("gate", "up")):
                each = slice(half * rows // 2, (half + 1) * rows // 2)
                found[f"{block}.{part}_proj"] = {field: value[each] for field, value in linear.items()}
            continue
        if kind != "qkv_proj":
            found[f"{block}.{kind}"] = linear
            continue
        size = config["hidden_size"] // config["num_attention_heads"]
        queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
        for first, last, letter in ((0, queries, "q"), (queries, queries + keys, "k"), (queries + keys, rows, "v")):
            found[f"{block}.{letter}_proj"] = {part: value[first:last] for part, value in linear.items()}
    return found


def linear_name(text: str) -> str:
    """`model.layers.3.mlp.up_proj` out of whatever an initializer or node is called."""
    words = text.replace("/", ".").split(".")
    start = words.index("layers")
    return ".".join(["model", *words[start : start + 4]])


def from_gptq(folder: Path) -> Linears:
    """GPTQ v1: qweight int32 [columns / 8, rows], eight codes along the inputs a word, lowest bits first; qzeros int32
    [groups, rows / 8] hold zero point - 1; scales fp16 [groups, rows]; a trivial g_idx (AutoGPTQ, QuantLinear.pack)."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    found: Linears = {}
    for key in tensors:
        name, _, part = key.rpartition(".")
        if part != "qweight":
            continue
        words = tensors[key].view(np.uint32)  # [columns / 8, rows]
        codes = ((words[:, None, :] >> shifts[None, :, None]) & 15).reshape(-1, words.shape[1]).T
        zeros = tensors[f"{name}.qzeros"].view(np.uint32)  # [groups, rows / 8]
        points = ((zeros[:, :, None] >> shifts) & 15).reshape(len(zeros), -1).T + 1
        scale = tensors[f"{name}.scales"].T
        columns, groups = codes.shape[1], scale.shape[1]
        assert np.array_equal(tensors[f"{name}.g_idx"], np.arange(columns) // (columns // groups))
        found[name] = {"codes": codes.astype(np.uint8), "scale": scale, "zero_point": points.astype(np.uint8)}
    return found


def assert_same(found: Linears, expected: Linears) -> None:
    assert found.keys() == expected.keys()
    for name, parts in expected.items():
        for part, value in parts.items():
            other = found[name].get(part)
            if other is None:
                continue
            assert other.shape == value.shape, (name, part)
            assert np.array_equal(other.astype(np.float32), value.astype(np.float32)), (name, part)


@pytest.fixture(scope="module")
def symmetric(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model at w4g32, in all three formats."""
    folder = tmp_path_factory.mktemp("symmetric")
    artifact = write_rounded_artifact(EXAMPLE, folder / "artifact", "w4g32")
    targets = {name: export(artifact, name, folder / name).target for name in ("gguf", "onnx", "gptq")}
    return targets | {"artifact": artifact.folder}


def test_symmetric_codes_and_scales_in_three_files(symmetric: dict[str, Path]) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("onnx")
    config = json.loads((EXAMPLE / "config.json").read_text())
    expected = from_artifact(symmetric["artifact"])
    assert len(expected) == 7 * config["num_hidden_layers"]
    assert sum(parts["codes"].size for parts in expected.values()) > 1_000_000
    gguf, onnx, gptq = (
        from_gguf(symmetric["gguf"], config),
        from_onnx(symmetric["onnx"], config),
        from_gptq(symmetric["gptq"]),
    )
    for found in (gguf, onnx, gptq):
        assert_same(found, expected)
        assert all({"codes", "scale"} <= parts.keys() for parts in found.values())
    for name in expected:  # the constant zero point, where a format writes it down
        assert bool((gptq[name]["zero_point"] == 8).all())
        assert bool((onnx[name].get("zero_point", np.full(1, 8)) == 8).all())


def test_codes_are_not_plain_rounding(symmetric: dict[str, Path]) -> None:
    """The artifact's codes differ from those that a writer would find by rounding its weights again."""
    from safetensors.torch import load_file  # numpy has no bfloat16

    name, parts = next(iter(from_artifact(symmetric["artifact"]).items()))
    source = {key: value for path in EXAMPLE.glob("*.safetensors") for key, value in load_file(path).items()}
    weight = source[f"{name}.weight"].float().numpy()
    scale = np.repeat(parts["scale"].astype(np.float32), 32, axis=1)
    nearest = np.clip(np.rint(weight / scale) + 8, 0, 15)
    assert 0.1 < (nearest != parts["codes"]).mean() < 0.9


@pytest.mark.parametrize("tied", [True, False])
def test_tables_in_two_files(tmp_path: Path, tied: bool) -> None:
    """Embedding and head, 8 bits: Q8_0 (34 bytes: fp16 scale, 32 int8) against codes in bytes with zero 128."""
    gguf = pytest.importorskip("gguf")
    onnx = pytest.importorskip("onnx")
    model = write_small_model(tmp_path / "model", "llama-untied", tie_word_embeddings=tied)
    overrides = [("embed_tokens", "w8g32"), ("lm_head", "w8g32")]
    artifact = write_rounded_artifact(model, tmp_path / "artifact", "w4g32", overrides=overrides)
    target = export(artifact, "onnx", tmp_path / "onnx").target / "model.onnx"
    nodes = {node.name: node.input for node in onnx.load(target).graph.node}
    constants = {tensor.name: tensor for tensor in onnx.load(target).graph.initializer}
    reader = gguf.GGUFReader(export(artifact, "gguf", tmp_path / "gguf").target)
    tables = {tensor.name: tensor for tensor in reader.tensors}
    assert ("output.weight" in tables) == (not tied)
    pairs = [("embedding", 0, "token_embd.weight"), ("head", 1, "token_embd.weight" if tied else "output.weight")]
    for node, place, name in pairs:
        assert tables[name].tensor_type == gguf.GGMLQuantizationType.Q8_0
        blocks = np.asarray(tables[name].data).reshape(512, 4, 34)
        codes, scales = (onnx.numpy_helper.to_array(constants[nodes[node][index]]) for index in (place, 2))
        assert np.array_equal(codes.reshape(512, 4, 32).astype(np.int16) - 128, blocks[..., 2:].view(np.int8))
        assert np.array_equal(scales, blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float32))


def test_asymmetric_codes_scales_and_zero_points_in_two_files(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    artifact = write_rounded_artifact(EXAMPLE, tmp_path / "artifact", "w4g128-asym", zero_floor=1)
    expected = from_artifact(artifact.folder)
    onnx = export(artifact, "onnx", tmp_path / "onnx").target
    gptq = export(artifact, "gptq", tmp_path / "gptq").target
    config = json.loads((EXAMPLE / "config.json").read_text())
    for found in (from_onnx(onnx, config), from_gptq(gptq)):
        assert_same(found, expected)
        assert all({"codes", "scale", "zero_point"} <= parts.keys() for parts in found.values())
    points = np.concatenate([parts["zero_point"].ravel() for parts in expected.values()])
    assert points.min() >= 1  # GPTQ v1 cannot hold 0
    assert len(np.unique(points)) > 3
