"""The mixes of tensor types equal those of llama.cpp: against the table that its own quantiser wrote.

`tests/data/llama_cpp_types.json` comes from benchmarks/llama_cpp_types.py; runtime_tests/test_file_types.py writes it
anew where llama-cpp-python is installed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from signround.errors import RefusedError
from signround.file_types import ModelShape, TensorRole, TypeChoice, parse_overrides, resolve, tensor_types
from signround.mixes import BLOCK_LENGTHS, FALLBACKS, FILE_TYPES, PRESETS

TABLE = json.loads((Path(__file__).parent / "data" / "llama_cpp_types.json").read_text())
MODELS: Mapping[str, Mapping[str, Any]] = TABLE["models"]
ROWS = [(model, row) for model, rows in TABLE["types"].items() for row in rows]
DENSE = ModelShape("llama", layers=8, heads=8, kv_heads=8)


def shape_of(model: str) -> ModelShape:
    entry = MODELS[model]
    return ModelShape(**{name: entry[name] for name in entry.keys() - {"outer", "block"}})


def roles_of(model: str) -> list[TensorRole]:
    entry = MODELS[model]
    return roles(entry["layers"], entry["outer"], entry["block"])


def roles(layers: int, outer: Mapping[str, int], block: Mapping[str, int]) -> list[TensorRole]:
    outside = [TensorRole(part, None, 64, columns) for part, columns in outer.items()]
    return outside + [TensorRole(part, at, 64, columns) for at in range(layers) for part, columns in block.items()]


def dense_roles(hidden: int = 512, inner: int = 1024, layers: int = 8) -> list[TensorRole]:
    block = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"), hidden)
    return roles(layers, {"token_embd": hidden, "output": hidden}, block | {"ffn_down": inner})


def expanded(model: str, row: Mapping[str, str]) -> dict[str, str]:
    """GGUF tensor name -> type, from a row of the table: {"rest": "q4_k", "attn_v": "q6_k*4 q4_k ..."}."""
    entry, types = MODELS[model], {}
    for part in entry["outer"]:
        types[f"{part}.weight"] = row.get(part, row["rest"])
    for part in entry["block"]:
        runs = [run.partition("*") for run in row.get(part, row["rest"]).split()]
        layers = [name for name, _, times in runs for _ in range(int(times or 1))]
        layers = layers * entry["layers"] if len(layers) == 1 else layers
        assert len(layers) == entry["layers"]
        types |= {f"blk.{at}.{part}.weight": name for at, name in enumerate(layers)}
    return types


def named(some: list[TensorRole], choices: list[TypeChoice]) -> dict[str, str]:
    return {role.name: choice.type for role, choice in zip(some, choices, strict=True)}


def reason_of(some: list[TensorRole], choices: list[TypeChoice], name: str) -> str:
    return next(choice.reason for role, choice in zip(some, choices, strict=True) if role.name == name)


def test_the_table_covers_every_file_type_and_every_rule_that_depends_on_importance() -> None:
    for rows in TABLE["types"].values():
        assert {row.split()[0] for row in rows} == FILE_TYPES.keys()
    varying = {row.split()[0] for _, row in ROWS if row.endswith("without importance")}
    assert varying == {"q2_k_s", "q4_0", "q5_0", "iq4_nl", "iq4_xs"}


@pytest.mark.parametrize(("model", "row"), ROWS)
def test_the_types_are_those_of_llama_cpp(model: str, row: str) -> None:
    file_type, _, without = row.partition(" ")
    shape, some, expected = shape_of(model), roles_of(model), TABLE["types"][model][row]
    if expected == "refused":
        with pytest.raises(RefusedError, match="q2_k_s needs an importance matrix for blk"):
            tensor_types(file_type, shape, some, has_importance=False)
        return
    theirs = expanded(model, expected)
    if file_type == "mxfp4" and not shape.experts:  # the one difference: llama.cpp's MXFP4_MOE is for experts only
        assert set(theirs.values()) <= {"q8_0", "f16"}
        theirs = {name: "mxfp4" if name.startswith("blk") and old == "q8_0" else old for name, old in theirs.items()}
    for has_importance in (False,) if without else (True,):
        assert named(some, tensor_types(file_type, shape, some, has_importance=has_importance)) == theirs
    if not without and f"{row} without importance" not in TABLE["types"][model]:
        assert named(some, tensor_types(file_type, shape, some, has_importance=False)) == theirs


@pytest.mark.parametrize("case", range(len(TABLE["overridden"])))
def test_overrides_are_those_of_llama_cpp(case: int) -> None:
    model, file_type, overrides, expected = TABLE["overridden"][case]
    some = roles_of(model)
    types = tensor_types(file_type, shape_of(model), some, [(pattern, name) for pattern, name in overrides])
    assert named(some, types) == expanded(model, expected)


@pytest.mark.parametrize("file_type", ["q4_k_m", "q3_k_m", "q4_k_s", "iq4_xs"])
def test_the_order_of_the_roles_changes_nothing_but_the_order_of_the_answers(file_type: str) -> None:
    some = dense_roles(layers=12)  # block 10 comes after block 9, not after block 1
    mixed = random.Random(1).sample(some, len(some))
    shape = ModelShape("llama", layers=12, heads=8, kv_heads=2)
    ours, theirs = (tensor_types(file_type, shape, order, [("3.attn_v", "f16")]) for order in (some, mixed))
    assert named(some, ours) == named(mixed, theirs)


def test_every_type_has_a_block_and_every_fallback_a_shorter_one() -> None:
    for name, instead in FALLBACKS.items():
        assert BLOCK_LENGTHS[instead] < BLOCK_LENGTHS[name]
    types = {name for row in FILE_TYPES.values() for rules in row.mix.values() for name, _ in rules}
    assert types | {row.type for row in FILE_TYPES.values()} <= BLOCK_LENGTHS.keys()


def test_numbers_and_labels_are_those_of_gguf() -> None:
    gguf = pytest.importorskip("gguf")
    for row in FILE_TYPES.values():
        if row.name != "q2_0":  # younger than gguf 0.19
            assert gguf.LlamaFileType[f"MOSTLY_{row.label}"].value == row.number
    sizes = gguf.GGML_QUANT_SIZES
    for name, length in BLOCK_LENGTHS.items():
        if name != "q2_0":
            assert sizes[gguf.GGMLQuantizationType[name.upper()]][0] == length


def test_the_reasons_name_the_rule() -> None:
    some = dense_roles()
    choices = tensor_types("Q4_K_M", DENSE, some, [("ffn_up", "Q8_0")])
    assert reason_of(some, choices, "blk.1.attn_v.weight") == "file type q4_k_m"
    assert reason_of(some, choices, "blk.0.attn_v.weight") == "q4_k_m: more bits on this layer"
    assert reason_of(some, choices, "output.weight") == "q4_k_m: more bits on the head"
    assert reason_of(some, choices, "blk.1.ffn_up.weight") == "--tensor-type ffn_up=Q8_0"
    ragged = dense_roles(hidden=576)
    reason = reason_of(ragged, tensor_types("q4_k_m", DENSE, ragged), "blk.1.attn_q.weight")
    assert reason == "file type q4_k_m; a row of 576 is no multiple of 256: q5_0 instead of q4_k"
    odd = dense_roles(inner=272)
    reason = reason_of(odd, tensor_types("q4_k_m", DENSE, odd), "blk.1.ffn_down.weight")
    assert reason == "file type q4_k_m; a row of 272 is no multiple of 32: f16 instead of q4_k"


def test_routers_norms_and_single_rows_stay_float_and_do_not_take_overrides() -> None:
    some = [*dense_roles(), TensorRole("ffn_gate_inp", 0, 8, 512), TensorRole("ffn_gate_inp_shexp", 0, 1, 512)]
    shape = ModelShape("qwen2moe", layers=8, heads=8, kv_heads=8, experts=60)
    choices = tensor_types("q4_k_m", shape, some, [("ffn_gate", "q8_0")])
    assert [choice.type for choice in choices[-2:]] == ["f32", "f32"]
    with pytest.raises(RefusedError, match="pattern matches no matrix of this model"):
        tensor_types("q4_k_m", shape, some, [("ffn_gate_inp", "q8_0")])


@pytest.mark.parametrize(
    ("preset", "hidden", "expected"),
    [
        ("mobile", 512, {"q4_0", "q6_k"}),
        ("mobile", 576, {"q4_0", "q8_0"}),
        ("laptop", 512, {"q4_k", "q6_k"}),
        ("laptop", 576, {"iq4_nl", "q8_0"}),
        ("small", 512, {"q2_k", "q3_k", "q6_k"}),
        ("Small", 576, {"q4_0", "q5_0", "q5_1", "q4_k", "q8_0"}),  # no type below 4 bits for such rows
    ],
)
def test_presets(preset: str, hidden: int, expected: set[str]) -> None:
    some = dense_roles(hidden=hidden)
    assert {choice.type for choice in tensor_types(preset, DENSE, some)} == expected


def test_a_preset_is_a_file_type_and_what_the_user_says_comes_first() -> None:
    some = dense_roles()
    assert [resolve(preset, some)[0].name for preset in PRESETS] == ["q4_0", "q4_k_m", "q2_k"]
    assert [resolve(preset, dense_roles(hidden=576))[0].name for preset in PRESETS] == ["q4_0", "iq4_nl", "q3_k_m"]
    choices = tensor_types("mobile", DENSE, some, [("blk.0.ffn_down", "q8_0")])
    assert reason_of(some, choices, "blk.1.ffn_down.weight") == "preset mobile"
    assert named(some, choices)["blk.0.ffn_down.weight"] == "q8_0"
    assert all(preset.purpose for preset in PRESETS.values())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            [("ffn_down", "q7_k")],
            r"ffn_down=q7_k: type 'q7_k' is not one that a tensor can have; allowed are q2_k.*f32",
        ),
        ([("ffn_down", "iq3_xxs")], "iq3_xxs"),
        ([("ffn_down(", "q6_k")], r"ffn_down\(=q6_k: the pattern is no regular expression: missing \)"),
        ([("ffn_dwn", "q6_k")], "ffn_dwn=q6_k: the pattern matches no matrix of this model; it has token_embd, output"),
        ([("x", "q6_k"), ("y", "q9")], "x=q6_k.*\n.*y=q9"),
    ],
)
def test_bad_overrides_are_refused(overrides: list[tuple[str, str]], words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        tensor_types("q4_k_m", DENSE, dense_roles(), overrides)


@pytest.mark.parametrize("text", ["ffn_down", "=q6_k", "ffn_down=", ""])
def test_an_override_is_pattern_and_type(text: str) -> None:
    assert parse_overrides(["ffn_down=q6_k", "a=b=c"]) == [("ffn_down", "q6_k"), ("a", "b=c")]
    with pytest.raises(RefusedError, match="is not PATTERN=TYPE"):
        parse_overrides([text])


def test_unknown_file_types_and_architectures_with_rules_of_their_own_are_refused() -> None:
    with pytest.raises(RefusedError, match=r"'q4_k' is not known.*presets mobile, laptop, small; take q4_k_"):
        tensor_types("q4_k", DENSE, dense_roles())
    with pytest.raises(RefusedError, match="rules of its own for architecture 'glm5-next'"):
        tensor_types("q4_k_m", ModelShape("glm5-next", 8, 8, 8), dense_roles())
