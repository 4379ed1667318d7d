"""llama.cpp's own choice of tensor types, asked in dry runs: the table in the repository, and random models."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: no wheel of xllamacpp has llama_model_quantize")
pytest.importorskip("gguf")

from benchmarks.llama_cpp_types import MODELS, NUMBERS, ROWS, LlamaCpp, Model, make_table, to_text, write_model
from signround.errors import RefusedError
from signround.file_types import ModelShape, TensorRole, tensor_types
from signround.mixes import BLOCK_LENGTHS

TABLE = Path(__file__).parent.parent / "tests" / "data" / "llama_cpp_types.json"


@pytest.fixture(scope="module")
def llama_cpp() -> LlamaCpp:
    return LlamaCpp()


def random_model(dice: random.Random) -> Model:
    """One of the families at a random depth, width, grouping and number of experts."""
    family = dice.choice(list(MODELS.values()))
    heads = dice.choice((4, 8, 16, 24))
    rows = (48, 64, 96, 256, 512, 576, 768, 1024)
    shape = replace(
        family,
        layers=dice.choice((80, dice.randint(1, 90))),
        heads=heads,
        kv_heads=dice.choice([divisor for divisor in range(1, heads + 1) if heads % divisor == 0]),
        hidden=dice.choice(rows),
        inner=dice.choice(rows),
        attention=heads * 64,
        tied=dice.random() < 0.5,
    )
    if family.experts:
        shape = replace(shape, experts=dice.choice((2, 4, 8, 64)), expert_inner=dice.choice(rows))
    return shape


def roles_of(model: Model) -> list[TensorRole]:
    outer = [TensorRole(part, None, ROWS, columns) for part, columns in model.outer().items()]
    parts = model.parts().items()
    return outer + [TensorRole(part, at, ROWS, columns) for at in range(model.layers) for part, columns in parts]


def random_overrides(dice: random.Random, model: Model) -> list[tuple[str, str]]:
    patterns = [*model.parts(), "output", "attn", "ffn_(up|down)", rf"blk\.{model.layers // 2}\.", r"[02468]\.attn_v"]
    names = [role.name for role in roles_of(model)]
    known = [pattern for pattern in patterns if any(re.search(pattern, name) for name in names)]
    chosen = dice.sample(known, dice.randint(0, 3))
    return [(pattern, dice.choice(list(BLOCK_LENGTHS))) for pattern in chosen]


def test_the_table_is_what_llama_cpp_says_today(tmp_path: Path) -> None:
    ours, theirs = TABLE.read_text().splitlines(), to_text(make_table(tmp_path)).splitlines()
    assert ours[1:] == theirs[1:]  # the first line names the version


@pytest.mark.parametrize("seed", range(60))
def test_random_models_get_the_types_of_llama_cpp(seed: int, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    dice = random.Random(seed)
    model = random_model(dice)
    write_model(tmp_path / "model.gguf", model)
    shape = ModelShape(model.architecture, model.layers, model.heads, model.kv_heads, model.experts, model.tied)
    roles = roles_of(model)
    for file_type in dice.sample(list(NUMBERS), 8):
        if file_type == "mxfp4" and not model.experts:
            continue  # llama.cpp's MXFP4_MOE quantises experts only
        importance, overrides = dice.random() < 0.7, random_overrides(dice, model)
        theirs = llama_cpp.types(tmp_path / "model.gguf", NUMBERS[file_type], importance, overrides)
        if theirs is None:
            with pytest.raises(RefusedError, match="importance matrix"):
                tensor_types(file_type, shape, roles, overrides, importance)
            continue
        ours = tensor_types(file_type, shape, roles, overrides, importance)
        wrong = {
            role.name: (choice, theirs[role.name])
            for role, choice in zip(roles, ours, strict=True)
            if choice.type != theirs[role.name]
        }
        assert not wrong, (model, file_type, importance, overrides)
