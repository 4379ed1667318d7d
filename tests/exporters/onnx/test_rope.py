"""Rotary tables: the rows of transformers' own modules, and how many of them fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters.onnx import rope
from exporters.onnx.contrib import ContribFlavour, rotates_inside
from exporters.onnx.rope import RotaryTable, inverse_frequencies, positions_of, rotary_tables
from signround.architecture import Architecture, read_architecture
from tests.test_published_models import PUBLISHED

LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.1 * index for index in range(12)],
    "long_factor": [1.5 + 0.5 * index for index in range(12)],
}  # fmt: skip
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def small(model_type: str, **fields: Any) -> tuple[Architecture, Any]:
    from transformers import AutoConfig

    common = {
        "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
        "intermediate_size": 256, "vocab_size": 512, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **{**common, **fields})
    classes: Mapping[str, str] = {"phi3": "Phi3ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
    return read_architecture({**config.to_dict(), "architectures": [classes[model_type]]}), config


def phi() -> tuple[Architecture, Any]:
    return small("phi3", max_position_embeddings=1024, original_max_position_embeddings=256, rope_parameters=dict(LONG))


@pytest.mark.parametrize("length", [1, 256, 257, 1000])
def test_longrope_rows_are_those_of_transformers(length: int) -> None:
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    architecture, config = phi()
    (table,) = rotary_tables(architecture).values()
    assert (table.width, table.positions, table.switch, table.rows) == (12, 1024, 256, 1280)
    cos, sin = Phi3RotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    start = 256 if length > 256 else 0
    for part, wanted in (("cos", cos), ("sin", sin)):
        found = torch.from_numpy(table.array(part))
        assert found.shape == (1280, 12)
        assert torch.equal(found[start : start + length], wanted[0, :, :12])
    assert architecture.rope.attention_factor > 1


def test_gemma3_has_a_table_for_each_kind_of_block() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    kinds = ["sliding_attention", "full_attention"]
    architecture, config = small(
        "gemma3_text", head_dim=64, sliding_window=16, layer_types=kinds, rope_parameters=GEMMA3
    )
    tables = rotary_tables(architecture)
    assert [table.name for table in tables.values()] == ["rope", "rope.1"]
    module = Gemma3RotaryEmbedding(config)
    for block, kind in enumerate(kinds):
        own = architecture.ropes[block]
        assert own is not None
        cos, _ = module(torch.zeros(1), torch.arange(64)[None], kind)
        assert torch.equal(torch.from_numpy(tables[own].array("cos"))[:64], cos[0, :, :32])


def test_texts_that_stay_short_have_no_long_rows() -> None:
    architecture, _ = phi()
    (table,) = rotary_tables(replace(architecture, context=256)).values()
    assert table.switch is None
    assert table.rows == 256
    assert torch.equal(inverse_frequencies(table.rope, 12), inverse_frequencies(table.rope, 12, long=False))
    assert not torch.equal(inverse_frequencies(table.rope, 12), inverse_frequencies(table.rope, 12, long=True))


def test_all_tables_together_stay_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def stored(tables: Mapping[Any, RotaryTable]) -> int:
        return sum(2 * 4 * table.rows * table.width for table in tables.values())

    for architecture in (phi()[0], small("gemma3_text", head_dim=64, rope_parameters=GEMMA3)[0]):
        whole = stored(rotary_tables(architecture))
        assert positions_of(architecture) == architecture.context
        monkeypatch.setattr(rope, "TABLE_BYTES", whole // 2)
        assert positions_of(architecture) < architecture.context
        assert whole // 2 - 3000 < stored(rotary_tables(architecture)) <= whole // 2
        monkeypatch.undo()


@pytest.mark.parametrize(("rows", "positions"), [(200, 200), (300, 256), (511, 256), (514, 258)])
def test_little_room_is_for_short_texts(monkeypatch: pytest.MonkeyPatch, rows: int, positions: int) -> None:
    """With an original context of 256, long rows begin to be of use at 257 positions: 256 + 257 rows."""
    monkeypatch.setattr(rope, "TABLE_BYTES", rows * 12 * 4 * 2)
    (table,) = rotary_tables(phi()[0]).values()
    assert table.positions == positions
    assert table.switch == (256 if positions > 256 else None)
    assert table.rows <= rows


def test_blocks_without_positions_need_no_table(tmp_path: Path) -> None:
    architecture = replace(phi()[0], ropes=(None, None))
    assert rotary_tables(architecture) == {}
    assert positions_of(architecture) == architecture.context


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_fit_their_tables_and_the_kernel(name: str) -> None:
    architecture = read_architecture(PUBLISHED[name][1])
    assert ContribFlavour.refusals(architecture) == []
    assert positions_of(architecture) == architecture.context
    for table in rotary_tables(architecture).values():
        assert rotates_inside(architecture.head_dim, table)
        assert (table.switch == 4096) == (name in ("phi-3.5-mini", "phi-4-mini"))
