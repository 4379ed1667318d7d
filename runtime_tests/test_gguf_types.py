"""Every family with every block type in llama.cpp: one file a family, whose matrices take all types in turn.

`verify` judges it as it judges a user's file: each tensor through gguf-py, bit for bit, and the logits in llama.cpp.
Types that the gguf package does not know (Q2_0) run in `test_gguf.py`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from exporters.gguf.container import GgufFile
from exporters.gguf.exporter import GgufExporter
from exporters.gguf.layout import TYPE_BYTES
from exporters.gguf.packing import BLOCK_TYPES
from runtime_tests.test_gguf import some_windows
from signround.architecture import read_architecture
from signround.artifact import QuantizedCheckpoint
from signround.assignment import roles_of
from signround.checkpoint import SourceCheckpoint
from signround.events import silent
from signround.parity import verify
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import FAMILIES, write_small_model

if not any(importlib.util.find_spec(module) for module in ("llama_cpp", "xllamacpp")):
    pytest.skip("needs llama-cpp-python or xllamacpp", allow_module_level=True)

TYPES = [kind.name.lower() for kind in BLOCK_TYPES if kind.name != "Q2_0"]
CLAIMED = [name for name in FAMILIES if name != "smollm2-like"]  # its rows are no multiples of 256: test_mixed_jobs.py
QUICK = ("llama-untied", "qwen3", "gemma3", "phi3", "qwen3-moe")
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "layers": 2}
EXPERT_SIZES = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}


def overridden(model: Path) -> list[tuple[str, str]]:
    """Each matrix of the model another type; the types go round until all were there."""
    roles = dict.fromkeys(roles_of(read_architecture(SourceCheckpoint(model).config)).values())
    names = [role.name for role in roles]
    return [(f"^{name.replace('.', '[.]')}$", TYPES[index % len(TYPES)]) for index, name in enumerate(names)]


def artifact_of(family: str, folder: Path) -> QuantizedCheckpoint:
    sizes = SIZES | (EXPERT_SIZES if "qwen" in family and "moe" in family else {})
    if "phi" in family:
        sizes["layers"] = 4  # fused: four matrices a block
    if family in ("gemma2", "gemma3", "qwen3", "qwen3-moe"):
        sizes["head_dim"] = 64  # rows of attn_output are heads * head_dim
    model = write_small_model(folder / "model", family, initializer_range=0.04, **sizes)
    return write_rounded_artifact(model, folder / "artifact", "q4_k_m", mixes=True, overrides=overridden(model))


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CLAIMED]
)
def test_all_types_in_one_file(family: str, tmp_path: Path) -> None:
    artifact, exporter = artifact_of(family, tmp_path), GgufExporter()
    exported = exporter.export(artifact, tmp_path / "gguf", silent)
    tensors = GgufFile(exported.target, TYPE_BYTES).tensors.values()
    assert {kind.code for kind in BLOCK_TYPES if kind.name != "Q2_0"} <= {entry.type for entry in tensors}
    parity = verify(artifact, exporter, exported, some_windows())
    assert parity.weights.reader == "independent"
    assert parity.weights.exact == parity.weights.tensors
    assert parity.logits is not None
    assert parity.logits.passed, parity.logits
