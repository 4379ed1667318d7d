"""The shape of the decoder graph: which operators a family is made of, and what the folder says of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters.onnx.builder import GraphBuilder
from exporters.onnx.contrib import ContribFlavour
from exporters.onnx.elementwise import ACTIVATIONS, activated
from exporters.onnx.exporter import OnnxExporter
from exporters.onnx.flavour import Flavour
from exporters.onnx.reader import load_graph
from signround.artifact import QuantizedCheckpoint
from signround.events import silent
from signround.families import FAMILIES as TABLE
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

Exported = Callable[..., tuple[QuantizedCheckpoint, Path, Any]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """(artifact, folder, graph) of a small model at w4g32."""
    made: dict[str, tuple[QuantizedCheckpoint, Path, Any]] = {}

    def make(family: str, **overrides: Any) -> tuple[QuantizedCheckpoint, Path, Any]:
        key = f"{family} {overrides}"
        if key not in made:
            folder = tmp_path_factory.mktemp("onnx")
            write_small_model(folder / "model", family, **overrides)
            artifact = write_rounded_artifact(folder / "model", folder / "artifact", "w4g32")
            OnnxExporter().export(artifact, folder / "onnx", silent)
            made[key] = artifact, folder / "onnx", load_graph(folder / "onnx").graph
        return made[key]

    return make


def attributes(graph: Any, name: str) -> list[Any]:
    kind = "as_float" if name in ("scale", "softcap") else "as_int"
    return [getattr(node.attributes[name], kind)() for node in graph if node.op_type == "GroupQueryAttention"]


def test_every_family_costs_the_operators_that_it_needs(exported: Exported) -> None:
    def kinds(family: str, **overrides: Any) -> Counter[str]:
        return Counter(node.op_type for node in exported(family, **overrides)[2])

    norm, add_and_norm = "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"
    llama = kinds("llama")
    assert (llama[norm], llama[add_and_norm], llama["Add"], llama["Range"]) == (1, 4, 0, 0)
    gemma = kinds("gemma2")  # norms after attention and feed-forward; the caps of the logits
    assert (gemma[norm], gemma[add_and_norm], gemma["Gelu"], gemma["Tanh"]) == (1 + 4, 4, 2, 1)
    olmo = kinds("olmo2")  # norms after, q and k over their whole width; nothing before
    assert (olmo[norm], olmo[add_and_norm], olmo["Add"], olmo["Reshape"]) == (8, 1, 3, 0)
    phi = kinds("phi3")
    assert (phi["MatMulNBits"], phi["Split"]) == (2 * 4, 2)
    assert kinds("granite")["Mul"] == 2 * 2 + 2 * 2 + 2  # silu and gate; residual twice a block; embedding, logits


def test_numbers_of_attention_are_those_of_the_block(exported: Exported) -> None:
    _, _, graph = exported("gemma3")
    assert attributes(graph, "local_window_size") == [16, -1]
    assert attributes(graph, "scale") == [0.125, 0.125]
    _, _, graph = exported("smollm3")
    assert attributes(graph, "do_rotary") == [1, 1, 1, 0]
    assert attributes(exported("gemma2")[2], "softcap") == [2.0, 2.0]
    assert attributes(exported("granite")[2], "scale") == pytest.approx([0.3, 0.3])


def test_heads_that_the_kernel_cannot_rotate_are_rotated_before_it(exported: Exported) -> None:
    for family, overrides in (("llama", {"head_dim": 24}), ("phi4-mini-like", {})):
        _, _, graph = exported(family, **overrides)
        assert attributes(graph, "do_rotary") == [0, 0]
        rotary = [node for node in graph if node.op_type == "RotaryEmbedding"]
        assert {node.attributes["rotary_embedding_dim"].as_int() for node in rotary} == {24}
        assert [node.attributes["num_heads"].as_int() for node in rotary] == [4, 2, 4, 2]
    assert "RotaryEmbedding" not in {node.op_type for node in exported("phi3")[2]}


def test_gemmas_norms_are_stored_with_their_one(exported: Exported) -> None:
    artifact, folder, _ = exported("gemma3")
    exporter = OnnxExporter()
    added = exporter.opened(folder).added
    norms = {name for name in artifact.kept if name.endswith("norm.weight")}
    assert added == dict.fromkeys(norms, 1.0)
    decoded = dict(exporter.decode_independently(exporter.opened(folder)))
    for name in norms:
        assert torch.equal(decoded[name], artifact.weight(name) + 1)
    assert exporter.opened(exported("llama")[1]).added == {}


@pytest.mark.parametrize(
    ("family", "kind"), [("gemma3", "gemma3_text"), ("phi4-mini-like", "phi3"), ("olmo2", "decoder")]
)
def test_genai_is_told_a_family_that_it_knows(exported: Exported, family: str, kind: str) -> None:
    config = json.loads((exported(family)[1] / "genai_config.json").read_text())
    assert config["model"]["type"] == kind


def test_longrope_is_told(exported: Exported) -> None:
    artifact, _, _ = exported("phi4-mini-like")
    assert "grows past 256 tokens" in " ".join(OnnxExporter().notes(artifact.plan))
    assert "grows past" not in " ".join(OnnxExporter().notes(exported("phi3")[0].plan))


def test_windows_in_older_runtimes_are_told(exported: Exported) -> None:
    plan = exported("gemma3")[0].plan
    assert "one more than the 16 tokens" in " ".join(OnnxExporter().notes(plan))
    assert "one more than" not in " ".join(OnnxExporter(flavour="std").notes(plan))
    assert "one more than" not in " ".join(OnnxExporter().notes(exported("llama")[0].plan))


def test_every_activation_of_the_table_is_known() -> None:
    assert {family.activation for family in TABLE.values()} <= set(ACTIVATIONS)
    builder = GraphBuilder()
    with pytest.raises(ValueError, match="'relu' is none of"):
        activated(builder, "x", builder.number(1.0), "relu")


def test_contrib_is_a_flavour(exported: Exported) -> None:
    flavour: Flavour = ContribFlavour(GraphBuilder(), exported("llama")[0].plan.architecture)
    assert (flavour.opset, flavour.ir_version, flavour.shares_cache) == (21, 10, True)
