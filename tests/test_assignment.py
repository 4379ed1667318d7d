"""Which grid each matrix of a family gets: one for all linears, or llama.cpp's mix, embedding and head included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from signround.architecture import EMBEDDING, HEAD, Architecture, read_architecture
from signround.assignment import Assignment, assigned, is_file_type, model_shape, roles_of
from signround.checkpoint import SourceCheckpoint
from signround.errors import RefusedError
from signround.exporting import make_exporters
from signround.families import FAMILIES as SUPPORTED
from signround.formats import grid_for, scheme_names
from signround.gguf_names import ARCHITECTURES
from signround.mixes import FILE_TYPES, PRESETS
from signround.pipeline import prepare
from tests.small_models import FAMILIES, MIXTURES, write_small_model

BLOCK_1 = "model.layers.1."
WHOLE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}


def architecture_of(family: str, **changes: Any) -> Architecture:
    """Of a config alone: no weights are looked at."""
    fields: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    fields |= {key: value for key, value in FAMILIES[family].items() if key not in ("layer_types",)}
    return read_architecture(fields | changes)


def types_of(found: Assignment) -> dict[str, str]:
    """Weight name -> the scheme name of its grid, or "float"."""
    names = {grid_for(name): name for name in scheme_names()}  # the last of equal ones, llama.cpp's, stays
    return {name: names[grid] for name, (grid, _) in found.grids.items()} | dict.fromkeys(found.floats, "float")


def mixed(scheme: str, architecture: Architecture, **options: Any) -> dict[str, str]:
    return types_of(assigned(scheme, architecture, mixes=True, **options))


def refused(scheme: str, architecture: Architecture, **options: Any) -> str:
    with pytest.raises(RefusedError) as caught:
        assigned(scheme, architecture, **options)
    return "\n".join(refusal.sentence() for refusal in caught.value.refusals)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_grid_for_all_linears_and_nothing_else(family: str) -> None:
    architecture = architecture_of(family)
    found = assigned("w4g32", architecture)
    wanted = [name for index in range(architecture.layers) for name in architecture.block_linears(index)]
    assert list(found.grids) == wanted
    assert {reason for _, reason in found.grids.values()} == {"scheme w4g32"}
    assert found.floats == {}
    assert found.file_type == ""


def test_the_zero_floor_is_that_of_one_grid() -> None:
    grid, reason = next(iter(assigned("w2g64-asym", architecture_of("llama"), 1).grids.values()))
    assert grid == grid_for("w2g64-asym", 1)
    assert reason == "scheme w2g64-asym, zero point >= 1 for GPTQ"


def test_every_supported_family_has_its_name_in_llama_cpp() -> None:
    assert SUPPORTED.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_type_decides_on_every_matrix(family: str) -> None:
    architecture = architecture_of(family)
    roles = roles_of(architecture)
    matrices = [name for index in range(architecture.layers) for name in architecture.block_linears(index)]
    matrices += [name for name in architecture.outer() if name in (EMBEDDING, HEAD)]
    for scheme in (*FILE_TYPES, *PRESETS):
        found = assigned(scheme, architecture, mixes=True)
        assert sorted([*found.grids, *found.floats]) == sorted(matrices), scheme
        assert not found.grids.keys() & found.floats.keys()
        assert found.file_type in FILE_TYPES
        for name, (grid, reason) in found.grids.items():  # whole blocks, whatever the row
            assert not grid.ragged(roles[name].columns), (scheme, name)
            assert reason


def test_the_mix_of_a_dense_model() -> None:
    found = mixed("q4_k_m", architecture_of("llama-untied"))
    assert found[EMBEDDING] == "q4_k"
    assert found[HEAD] == "q6_k"
    more = [index for index in range(8) if found[f"model.layers.{index}.self_attn.v_proj.weight"] == "q6_k"]
    assert more == [0, 3, 6, 7]
    assert more == [index for index in range(8) if found[f"model.layers.{index}.mlp.down_proj.weight"] == "q6_k"]
    assert found[f"{BLOCK_1}self_attn.q_proj.weight"] == "q4_k"


def test_a_tied_embedding_is_the_head() -> None:
    architecture = architecture_of("llama")
    found = assigned("q4_k_m", architecture, mixes=True)
    assert types_of(found)[EMBEDDING] == "q6_k"
    assert "it is the head too" in found.grids[EMBEDDING][1]
    assert HEAD not in found.grids
    assert mixed("mxfp4", architecture)[EMBEDDING] == "q8_0"


def test_a_fused_qkv_is_a_value_matrix() -> None:
    """phi3: as llama.cpp has it for attn_qkv."""
    found = mixed("q4_k_m", architecture_of("phi3"))
    assert [found[f"model.layers.{index}.self_attn.qkv_proj.weight"] for index in range(3)] == ["q6_k", "q4_k", "q4_k"]
    assert found["model.layers.0.mlp.gate_up_proj.weight"] == "q4_k"
    assert roles_of(architecture_of("phi3"))["model.layers.0.mlp.gate_up_proj.weight"].part == "ffn_up"
    assert mixed("q5_k_m", architecture_of("phi3"), overrides=[("attn_qkv", "q8_0")])[
        "model.layers.1.self_attn.qkv_proj.weight"
    ] == "q8_0"  # fmt: skip


@pytest.mark.parametrize("family", MIXTURES)
def test_the_experts_of_a_block_share_a_choice(family: str) -> None:
    """They are one tensor in the file; and the other blocks are counted as if there were one of them."""
    architecture = architecture_of(family, moe_intermediate_size=256, shared_expert_intermediate_size=256)
    roles = roles_of(architecture)
    found = mixed("q4_k_m", architecture)
    stacks: dict[str, set[str]] = {}
    for name, role in roles.items():
        if role.part.endswith("_exps"):
            stacks.setdefault(role.name, set()).add(found[name])
    assert len(stacks) == 3 * 8
    assert all(len(types) == 1 for types in stacks.values())
    down = [next(iter(stacks[f"blk.{index}.ffn_down_exps.weight"])) for index in range(8)]
    assert down == ["q6_k", "q4_k", "q4_k", "q6_k", "q4_k", "q4_k", "q6_k", "q6_k"]
    assert model_shape(architecture).experts == FAMILIES[family].get("num_experts", 4)
    assert mixed("mxfp4", architecture)[f"{BLOCK_1}self_attn.q_proj.weight"] == "q8_0"


def test_eight_experts_get_8_bits_for_keys_and_values() -> None:
    found = mixed("q4_k_m", architecture_of("mixtral", num_local_experts=8))
    assert found[f"{BLOCK_1}self_attn.k_proj.weight"] == "q8_0"
    assert found[f"{BLOCK_1}self_attn.o_proj.weight"] == "q5_k"
    assert found[f"{BLOCK_1}block_sparse_moe.experts.7.w1.weight"] == "q4_k"


def test_rows_that_are_no_whole_super_blocks_fall_back() -> None:
    """SmolLM2's 576 inputs: 64 * 9; its 1536 inner channels fit."""
    architecture = architecture_of("llama", hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                                   num_key_value_heads=3)  # fmt: skip
    found = assigned("q4_k_m", architecture, mixes=True)
    types = types_of(found)
    assert types[f"{BLOCK_1}self_attn.q_proj.weight"] == "q5_0"
    assert types[f"{BLOCK_1}mlp.down_proj.weight"] == "q4_k"
    assert types[EMBEDDING] == "q8_0"
    reason = found.grids[f"{BLOCK_1}self_attn.q_proj.weight"][1]
    assert reason == "q5_0 (file type q4_k_m; a row of 576 is no multiple of 256: q5_0 instead of q4_k)"
    assert mixed("iq4_xs", architecture)[f"{BLOCK_1}self_attn.q_proj.weight"] == "iq4_nl"


def test_rows_that_no_block_fits_stay_float_with_a_reason() -> None:
    architecture = architecture_of("llama", intermediate_size=496)
    found = assigned("q4_k_m", architecture, mixes=True)
    down = f"{BLOCK_1}mlp.down_proj.weight"
    assert found.floats.keys() == {f"model.layers.{index}.mlp.down_proj.weight" for index in range(8)}
    assert "a row of 496 is no multiple of 32: f16 instead of q4_k; kept in its own precision" in found.floats[down]
    assert types_of(found)[f"{BLOCK_1}mlp.up_proj.weight"] == "q4_k"


def test_what_an_override_leaves_float_is_in_the_plan_with_its_reason(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama-untied", **WHOLE)
    job = prepare(model, "q4_k_m", None, ["gguf"], tensor_types=["blk.1.ffn_down=f16", "^output=F32"])
    reasons = {kept.name: kept.reason for kept in job.plan.kept()}
    assert reasons[f"{BLOCK_1}mlp.down_proj.weight"] == ("--tensor-type blk.1.ffn_down=f16; kept in its own precision")
    assert "--tensor-type ^output=F32" in reasons[HEAD]
    names = [layer.name for layer in job.plan.layers()]
    assert HEAD not in names
    assert f"{BLOCK_1}mlp.down_proj.weight" not in names
    assert len(names) == 1 + 7 + 6
    assert sorted([*names, *reasons]) == sorted(SourceCheckpoint(model).tensors)


@pytest.mark.parametrize(
    ("preset", "file_type", "ragged"), [("mobile", "q4_0", "q4_0"), ("laptop", "q4_k_m", "iq4_nl"),
                                        ("small", "q2_k", "q3_k_m")],
)  # fmt: skip
def test_presets(preset: str, file_type: str, ragged: str) -> None:
    assert assigned(preset, architecture_of("llama")).file_type == file_type
    assert assigned(preset.upper(), architecture_of("smollm2-like")).file_type == ragged
    assert set(mixed("mobile", architecture_of("llama")).values()) == {"q4_0", "q6_k"}


def test_an_override_beats_mix_and_preset() -> None:
    architecture = architecture_of("llama")
    for scheme in ("q4_k_m", "mobile"):
        found = assigned(scheme, architecture, overrides=[("blk.1.ffn_down", "Q8_0"), ("ffn_down", "q5_k")])
        types = types_of(found)
        assert types[f"{BLOCK_1}mlp.down_proj.weight"] == "q8_0"
        assert types["model.layers.2.mlp.down_proj.weight"] == "q5_k"
        assert found.grids[f"{BLOCK_1}mlp.down_proj.weight"][1] == "q8_0 (--tensor-type blk.1.ffn_down=Q8_0)"


def test_importance_is_known_to_the_mixes_that_ask_for_it() -> None:
    architecture = architecture_of("llama")
    first = "model.layers.0.mlp.down_proj.weight"
    assert mixed("q4_0", architecture)[first] == "q4_1"
    assert mixed("q4_0", architecture, importance=False)[first] == "q4_0"
    assert "needs an importance matrix" in refused("q2_k_s", architecture, importance=False)


# ---- overrides of one grid


def uniform(architecture: Architecture, *overrides: tuple[str, str], scheme: str = "w4g32") -> dict[str, str]:
    """Weight name -> grid or "float" of every matrix that an override changed."""
    found = assigned(scheme, architecture, overrides=overrides)
    kinds = {name: reason.split(" ")[0] for name, (_, reason) in found.grids.items()} | dict.fromkeys(
        found.floats, "float"
    )
    return {name: kind for name, kind in kinds.items() if kind != "scheme"}


DOWN = {f"model.layers.{index}.mlp.down_proj.weight" for index in range(8)}


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("ffn_down", DOWN),
        ("down_proj", DOWN),
        ("DOWN_PROJ", DOWN),
        (r"blk\.3\.ffn_(down|up)", {"model.layers.3.mlp.down_proj.weight", "model.layers.3.mlp.up_proj.weight"}),
        (r"layers\.3\.mlp\.[du]", {"model.layers.3.mlp.down_proj.weight", "model.layers.3.mlp.up_proj.weight"}),
        (r"layers\.\d\.self_attn\.v_proj", {f"model.layers.{index}.self_attn.v_proj.weight" for index in range(8)}),
        ("lm_head", {HEAD}),
        ("^output", {HEAD}),
        ("embed_tokens", {EMBEDDING}),
        ("token_embd", {EMBEDDING}),
        ("output", {HEAD, *(f"model.layers.{index}.self_attn.o_proj.weight" for index in range(8))}),
        ("embed|head", {EMBEDDING, HEAD}),
    ],
)
@pytest.mark.parametrize("kind", ["w8g32", "float"])
def test_a_pattern_is_searched_in_both_names(pattern: str, named: set[str], kind: str) -> None:
    """As llama-quantize searches in its own: `output` is in `attn_output` too."""
    assert uniform(architecture_of("llama-untied"), (pattern, kind)) == dict.fromkeys(named, kind)


@pytest.mark.parametrize("pattern", ["lm_head", "^output", "embed_tokens", "token_embd"])
def test_either_name_of_a_tied_table_names_it(pattern: str) -> None:
    found = assigned("w4g32", architecture_of("llama"), overrides=[(pattern, "w8g32")])
    grid, reason = found.grids[EMBEDDING]
    assert grid == grid_for("w8g32")
    assert reason == f"w8g32 (--tensor-type {pattern}=w8g32); tied: one table for embedding and head"
    assert HEAD not in found.grids


@pytest.mark.parametrize("kind", ["float", "f16", "BF16", "f32"])
def test_floats_are_kept_with_their_reason(kind: str, tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "llama-untied")
    plan = prepare(model, "w4g32", None, tensor_types=[f"down_proj={kind}", "lm_head=w8g32"]).plan
    reasons = {kept.name: kept.reason for kept in plan.kept()}
    assert reasons[f"{BLOCK_1}mlp.down_proj.weight"] == f"--tensor-type down_proj={kind}; kept in its own precision"
    assert reasons[EMBEDDING] == "embedding and head keep their precision unless --tensor-type names them"
    assert [layer.name for layer in plan.outer_layers] == [HEAD]
    assert sorted([*reasons, *(layer.name for layer in plan.layers())]) == sorted(SourceCheckpoint(model).tensors)


def test_the_first_override_that_matches_wins() -> None:
    architecture = architecture_of("llama")
    found = uniform(architecture, (r"blk\.1\.", "float"), ("ffn_down", "q8_0"), (r"layers\.[12]\.mlp", "w4g64-asym"))
    assert {kind for name, kind in found.items() if name.startswith(BLOCK_1)} == {"float"}
    assert found["model.layers.2.mlp.down_proj.weight"] == "q8_0"
    assert found["model.layers.2.mlp.up_proj.weight"] == "w4g64-asym"
    assert len(found) == 7 + 7 + 2


def test_an_override_keeps_the_zero_floor_of_the_formats() -> None:
    found = assigned("w4g32", architecture_of("llama"), 1, overrides=[("down_proj", "w4g32-asym")])
    grid, reason = found.grids[f"{BLOCK_1}mlp.down_proj.weight"]
    assert grid == grid_for("w4g32-asym", 1)
    assert reason == "w4g32-asym (--tensor-type down_proj=w4g32-asym), zero point >= 1 for GPTQ"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_overridden(family: str) -> None:
    architecture = architecture_of(family)
    for name in roles_of(architecture):
        assert name in uniform(architecture, (f"^{name.replace('.', '[.]')}$", "w2g64"), scheme="w8g32")


def test_experts_of_a_block_share_a_grid_in_gguf(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "qwen3-moe")
    assert prepare(model, "w4g32", None, ["gguf"], tensor_types=["ffn_down_exps=w8g32"])
    for kind in ("w8g32", "float"):
        with pytest.raises(RefusedError, match=r"in blk\.0\.ffn_up_exps\.weight have different grids"):
            prepare(model, "w4g32", None, ["gguf"], tensor_types=[rf"experts\.3\.up={kind}"])


# ---- names that are a grid and a file type


BOTH = sorted(FILE_TYPES.keys() & set(scheme_names()))


def test_which_names_are_both() -> None:
    assert BOTH == ["iq4_nl", "iq4_xs", "mxfp4", "q2_0", "q2_k", "q4_0", "q4_1", "q5_0", "q5_1", "q6_k", "q8_0"]


@pytest.mark.parametrize("name", [*BOTH, *(name.upper() for name in BOTH)])
def test_a_name_that_is_both_is_a_mix_where_mixes_are_asked_for(name: str) -> None:
    architecture = architecture_of("llama")
    assert is_file_type(name, mixes=True)
    assert not is_file_type(name, mixes=False)
    assert EMBEDDING in assigned(name, architecture, mixes=True).grids
    alone = assigned(name, architecture, mixes=False)
    assert EMBEDDING not in alone.grids
    assert {grid for grid, _ in alone.grids.values()} == {grid_for(name.lower())}
    assert alone.file_type == ""


@pytest.mark.parametrize(
    ("to", "is_mix"), [((), False), (("gguf",), True), (("onnx",), False), (("gptq",), False),
                       (("gguf", "onnx"), False)],
)  # fmt: skip
def test_the_wanted_formats_decide(llama_folder: Path, to: tuple[str, ...], is_mix: bool) -> None:
    for exporter in make_exporters(list(to)):
        assert exporter.file_types == (exporter.name == "gguf")
    plan = prepare(llama_folder, "q4_0", None, to).plan
    assert plan.file_type == ("q4_0" if is_mix else "")
    assert bool(plan.outer_layers) == is_mix
    assert prepare(llama_folder, "w4g32", None, to).plan.file_type == ""


@pytest.mark.parametrize("scheme", ["W4G32", "Q4_K_M", "Q4_0", "Mobile"])
def test_upper_case_is_the_same_job(llama_folder: Path, scheme: str) -> None:
    upper, lower = (prepare(llama_folder, name, None, ["gguf"]).plan for name in (scheme, scheme.lower()))
    assert upper == lower
    assert upper.fingerprint == lower.fingerprint


def test_a_file_type_without_a_format_is_a_mix() -> None:
    """Nothing else is called so."""
    assert is_file_type("q4_k_m", mixes=False)
    assert assigned("Q4_K_M", architecture_of("llama")).file_type == "q4_k_m"


# ---- refusals


@pytest.mark.parametrize(
    ("scheme", "near"), [("q4_k_n", "q4_k_m"), ("q3_k_xl", "q3_k_l"), ("lapdop", "laptop"), ("w4g33", "w4g32"),
                         ("", "w4g32"), ("iq4_x", "iq4_xs"), ("IQ3_XXS", "iq4_xs")],
)  # fmt: skip
@pytest.mark.parametrize("mixes", [True, False])
def test_an_unknown_scheme_names_grids_file_types_presets_and_the_nearest(scheme: str, near: str, mixes: bool) -> None:
    sentence = refused(scheme, architecture_of("llama"), mixes=mixes)
    assert f"scheme {scheme!r} is not known" in sentence
    for part in ("w{2,3,4,8}g{16,32,64,128,256,c}[-asym]", "q4_k", "q4_k_m", "iq4_xs", "mobile, laptop, small"):
        assert part in sentence
    assert near in sentence.split("did you mean")[1]
    assert "`signround schemes` lists them all" in sentence


def test_bad_overrides_of_one_grid_are_refused_together() -> None:
    overrides = [
        ("lm_head", "w5g32"),
        ("lm_haed", "w8g32"),
        ("(", "w8g32"),
        ("blk\\.8\\.", "float"),
        ("lm_head", "Q8_0"),
    ]
    sentence = refused("w4g32", architecture_of("llama"), overrides=overrides)
    assert len(sentence.splitlines()) == 4
    assert "--tensor-type lm_head=w5g32: type 'w5g32' is not known" in sentence
    assert "w{2,3,4,8}g{16,32,64,128,256,c}[-asym]" in sentence
    assert "--tensor-type lm_haed=w8g32: the pattern matches no matrix of this model" in sentence
    assert "it has token_embd, attn_q, attn_k, attn_v" in sentence
    assert "or embed_tokens, q_proj, k_proj" in sentence
    assert "--tensor-type (=w8g32: the pattern is no regular expression" in sentence
    assert "--tensor-type blk\\.8\\.=float: the pattern matches no matrix" in sentence


def test_something_must_be_left_for_the_scheme() -> None:
    sentence = refused("w4g32", architecture_of("llama-untied"), overrides=[(".", "f16")])
    assert "every matrix is kept in its own precision" in sentence


def test_bad_overrides_are_refused_together() -> None:
    sentence = refused("q4_k_m", architecture_of("llama"), overrides=[("ffn_down", "q9_k"), ("ffn_dwn", "q6_k")])
    assert "'q9_k' is not one that a tensor can have" in sentence
    assert "matches no matrix of this model; it has token_embd, attn_q" in sentence


def test_a_bare_grid_of_super_blocks_needs_whole_ones(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "smollm2-like", hidden_size=576, intermediate_size=768,
                              num_attention_heads=9, num_key_value_heads=3)  # fmt: skip
    with pytest.raises(RefusedError, match=r"rows of 576 weights.*no whole number of super-blocks.*q4_k_m with --to"):
        prepare(model, "q4_k", None)
    job = prepare(model, "q4_k_m", None)
    assert {layer.grid.super_block is None for layer in job.plan.layers()} == {True, False}
