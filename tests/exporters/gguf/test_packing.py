"""Blocks against ggml's C code and gguf-py's decoder, for every block type: odd shapes, zero blocks, extreme scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.gguf import packing
from exporters.gguf.bits import pack_bits, unpack_bits
from exporters.gguf.packing import BLOCK_TYPES, BlockType, block_type_for, obstacle, pack, unpack
from signround.formats import grid_for
from signround.grid import Grid
from signround.qtensor import QuantizedTensor
from tests import ggml, gguf_blocks

GRIDS = {
    "w4g32": "Q4_0", "w4g64": "Q4_0", "w4g256": "Q4_0", "w4gc": "Q4_0", "q4_0": "Q4_0", "q4_1": "Q4_1",
    "q5_0": "Q5_0", "q5_1": "Q5_1", "w8g32": "Q8_0", "w8g128": "Q8_0", "q8_0": "Q8_0", "q2_k": "Q2_K", "q3_k": "Q3_K",
    "q4_k": "Q4_K", "q5_k": "Q5_K", "q6_k": "Q6_K", "iq4_nl": "IQ4_NL", "iq4_xs": "IQ4_XS", "mxfp4": "MXFP4",
    "q2_0": "Q2_0", "w2g64": "Q2_0", "w2g128": "Q2_0", "w2gc": "Q2_0",
}  # fmt: skip
HALVES = st.one_of(
    st.floats(width=16, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 65504.0, -65504.0, 5.9604645e-08, -5.9604645e-08]),
)
needs_ggml = pytest.mark.skipif(not ggml.available(), reason="needs xllamacpp, which carries ggml's C code")


@st.composite
def tensors(draw: st.DrawFn) -> QuantizedTensor:
    """Random codes and integers (all of them legal) under random, often odd, scales; some groups are all zero or keep
    to one end."""
    scheme = draw(st.sampled_from(sorted(GRIDS)))
    grid = grid_for(scheme)
    elements = next(kind.elements for kind in BLOCK_TYPES if kind.name == GRIDS[scheme])
    rows, columns = draw(st.integers(1, 5)), elements * draw(st.integers(1, 9 if elements < 256 else 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = torch.from_numpy(random.integers(grid.code_min, grid.code_max + 1, (rows, columns), dtype=np.uint8))
    if draw(st.booleans()):
        codes[0] = draw(st.sampled_from([grid.code_min, grid.code_max]))
    fields = {}
    for name, (shape, dtype) in grid.layout(rows, columns).items():
        if dtype.is_floating_point:
            pool = np.array(draw(st.lists(HALVES, min_size=1, max_size=8)), dtype=np.float16)
        else:
            low, high = grid.bounds(name)
            pool = np.array(draw(st.lists(st.integers(low, high), min_size=1, max_size=40)))
        fields[name] = torch.from_numpy(random.choice(pool, shape)).to(dtype)
    return QuantizedTensor(grid, codes, fields)


@needs_ggml
@settings(max_examples=300, deadline=None)
@given(tensors())
def test_ggml_decodes_the_same_bits(tensor: QuantizedTensor) -> None:
    kind = block_type_for(tensor.grid, tensor.shape[1])
    ours, theirs = tensor.decode().numpy(), ggml.dequantize(kind.name.lower(), pack(tensor), tensor.shape[1])
    if kind.name == "Q2_0":  # the codes are mirrored, which turns a zero's sign
        np.testing.assert_array_equal(theirs, ours)
    else:
        np.testing.assert_array_equal(theirs.view(np.int32), ours.view(np.int32))


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_gguf_py_decodes_the_same_values(tensor: QuantizedTensor) -> None:
    kind = block_type_for(tensor.grid, tensor.shape[1])
    if kind.name in GGMLQuantizationType.__members__:
        decoded = dequantize(pack(tensor), GGMLQuantizationType[kind.name])
        np.testing.assert_array_equal(decoded, tensor.decode().numpy())


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_unpack_is_the_inverse(tensor: QuantizedTensor) -> None:
    again = unpack(pack(tensor), tensor.grid, tensor.shape[1])
    assert torch.equal(again.codes, tensor.codes)
    for name, field in tensor.fields.items():
        assert again.fields[name].numpy().tobytes() == field.numpy().tobytes()


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_the_slow_obvious_packer_writes_the_same_bytes(tensor: QuantizedTensor) -> None:
    name = block_type_for(tensor.grid, tensor.shape[1]).name.lower()
    if grid_for(name).group == tensor.grid.group:  # the oracle repeats no scales
        assert np.array_equal(pack(tensor), gguf_blocks.pack(tensor, name))


@needs_ggml
@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_blocks_that_ggml_made_survive_our_reader(kind: BlockType) -> None:
    """Unpack and pack again: the bits that ggml's own quantiser writes all have their place."""
    weight = np.random.default_rng(3).standard_normal((6, 512)).astype(np.float32)
    weight *= np.logspace(-6, 3, 6, dtype=np.float32)[:, None]
    if kind.name != "MXFP4":  # ggml gives a zero block the exponent 0, and writes both of FP4's zeros; we do neither
        weight[2, :256] = 0.0
    raw = ggml.quantize_chunk(kind.name.lower(), weight)
    tensor = unpack(raw, kind.grid, 512)
    np.testing.assert_array_equal(tensor.decode().numpy(), ggml.dequantize(kind.name.lower(), raw, 512))
    assert np.array_equal(pack(tensor), raw) or kind.name == "MXFP4"


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 4, 8, 16, 32, 64]), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_bits_are_found_again_and_the_rest_of_a_value_is_ignored(bits: int, apart: int, runs: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 256, (3, runs * apart * 8 // bits), dtype=np.uint8)
    packed = pack_bits(values, bits, apart)
    assert packed.shape == (3, runs * apart)
    assert np.array_equal(unpack_bits(packed, bits, apart), values & ((1 << bits) - 1))


@pytest.mark.parametrize("scheme", GRIDS)
def test_each_grid_has_its_block_type(scheme: str) -> None:
    assert block_type_for(grid_for(scheme), 256 * 9).name == GRIDS[scheme]


def test_table_agrees_with_gguf_py() -> None:
    from gguf import GGML_QUANT_SIZES, LlamaFileType

    names = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S", "Q2_K": "Q2_K_S", "MXFP4": "MXFP4_MOE"}
    for kind in BLOCK_TYPES:
        if kind.name == "Q2_0":
            continue  # it came after gguf-py 0.19
        theirs = GGMLQuantizationType[kind.name]
        assert (kind.code, (kind.elements, kind.bytes)) == (theirs.value, GGML_QUANT_SIZES[theirs])
        assert kind.file_type == LlamaFileType[f"MOSTLY_{names.get(kind.name, kind.name)}"].value


@needs_ggml
def test_table_agrees_with_ggml() -> None:
    for kind in BLOCK_TYPES:
        assert ggml.IDS[kind.name.lower()] == kind.code
        assert ggml.type_name(kind.name.lower()).lower() == kind.name.lower()
        assert ggml.block_size(kind.name.lower()) == (kind.elements, kind.bytes)
        assert kind.bytes * 8 / kind.elements == kind.grid.bits_per_weight(kind.elements)


def test_lowest_code_of_eight_bits_is_minus_128() -> None:
    grid = grid_for("w8g32")
    tensor = QuantizedTensor(grid, torch.zeros(1, 32, dtype=torch.uint8), {"scale": torch.ones(1, 1).half()})
    assert pack(tensor)[0, 2:].view(np.int8).tolist() == [-128] * 32


@pytest.mark.parametrize(
    ("grid", "columns", "words"),
    [
        (grid_for("w2g32"), 64, "group of 32"),
        (grid_for("w3g128"), 128, "3-bit"),
        (grid_for("w2g64"), 96, "multiple of 64"),
        (grid_for("q4_k"), 384, "multiple of 256"),
        (grid_for("iq4_xs"), 32, "multiple of 256"),
        (grid_for("mxfp4"), 40, "multiple of 32"),
        (grid_for("w4g16"), 64, "group of 16"),
        (grid_for("w4g32-asym"), 64, "zero point"),
        (grid_for("w4g32"), 48, "multiple of 32"),
        (grid_for("w4gc"), 80, "multiple of 32"),
        (Grid(bits=8, group=32, zero="minimum"), 64, "8-bit"),
    ],
)
def test_other_grids_are_named_not_approximated(grid: Grid, columns: int, words: str) -> None:
    reason = obstacle(grid, columns)
    assert reason is not None
    assert words in reason[0]
    with pytest.raises(ValueError, match=words):
        block_type_for(grid, columns)


@pytest.mark.parametrize("scheme", ["w4g32", "q5_1", "q6_k"])
def test_packing_in_chunks(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk is shorter."""
    grid, random = grid_for(scheme), np.random.default_rng(0)
    fields = {
        name: torch.ones(shape, dtype=dtype) if dtype.is_floating_point else torch.full(shape, 3, dtype=dtype)
        for name, (shape, dtype) in grid.layout(5, 768).items()
    }
    codes = torch.from_numpy(random.integers(0, 1 << grid.bits, (5, 768), dtype=np.uint8))
    tensor = QuantizedTensor(grid, codes, fields)
    monkeypatch.setattr(packing, "CHUNK", 1024)
    assert np.array_equal(pack(tensor), gguf_blocks.pack(tensor, GRIDS[scheme].lower()))


@pytest.mark.parametrize(("bits", "apart"), [(4, 32), (2, 1), (1, 3)])
def test_packing_bits_leaves_the_values_alone(bits: int, apart: int) -> None:
    values = np.random.default_rng(1).integers(0, 256, (4, 8 // bits * apart * 2), dtype=np.uint8)
    values.flags.writeable = False
    assert np.array_equal(unpack_bits(pack_bits(values, bits, apart), bits, apart), values & ((1 << bits) - 1))


def test_a_run_never_crosses_rows() -> None:
    with pytest.raises(ValueError, match="divi"):
        pack_bits(np.zeros((2, 16), dtype=np.uint8), 4, 16)


def test_scales_that_differ_within_a_group_are_not_collapsed() -> None:
    fine, coarse = grid_for("w4g32"), grid_for("w4g64")
    scale = torch.tensor([[1.0, 2.0]]).half()
    raw = pack(QuantizedTensor(fine, torch.zeros(1, 64, dtype=torch.uint8), {"scale": scale}))
    with pytest.raises(ValueError, match="differs within a group of 64"):
        unpack(raw, coarse, 64)


@pytest.mark.parametrize(
    ("scheme", "columns", "way_out"),
    [
        ("q6_k", 128, "iq4_nl"),
        ("w2g64", 96, "iq4_nl"),
        ("q3_k", 250, "onnx"),
        ("w3g128", 128, "q3_k"),
        ("w2g32", 64, "64 or 128 or 256"),
    ],
)
def test_a_refusal_names_something_that_works(scheme: str, columns: int, way_out: str) -> None:
    reason = obstacle(grid_for(scheme), columns)
    assert reason is not None
    assert way_out in reason[1]
