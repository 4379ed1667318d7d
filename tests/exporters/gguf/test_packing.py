"""Blocks against gguf-py's decoder, for every block type, over odd shapes, zero blocks and extreme scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.gguf.packing import BLOCK_TYPES, block_type_for, obstacle, pack, unpack
from signround.formats import grid_for
from signround.grid import Grid
from signround.qtensor import QuantizedTensor

GRIDS = {
    "w4g32": "Q4_0", "w4g64": "Q4_0", "w4g256": "Q4_0", "w4gc": "Q4_0", "q4_0": "Q4_0", "q4_1": "Q4_1",
    "q5_0": "Q5_0", "q5_1": "Q5_1", "w8g32": "Q8_0", "w8g128": "Q8_0", "q8_0": "Q8_0",
}  # fmt: skip
HALVES = st.one_of(
    st.floats(width=16, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 65504.0, -65504.0, 5.9604645e-08, -5.9604645e-08]),
)


@st.composite
def tensors(draw: st.DrawFn) -> QuantizedTensor:
    """Random codes (all of them legal) under random, often odd, scales; some groups are all zero."""
    grid = grid_for(draw(st.sampled_from(sorted(GRIDS))))
    rows, columns = draw(st.integers(1, 5)), 32 * draw(st.integers(1, 9))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = torch.from_numpy(random.integers(grid.code_min, grid.code_max + 1, (rows, columns), dtype=np.uint8))
    if draw(st.booleans()):
        codes[0] = grid.code_min
    fields = {}
    for name, (shape, _) in grid.layout(rows, columns).items():
        pool = draw(st.lists(HALVES, min_size=1, max_size=8))
        fields[name] = torch.from_numpy(random.choice(np.array(pool, dtype=np.float16), shape))
    return QuantizedTensor(grid, codes, fields)


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_an_independent_reader_decodes_the_same_bits(tensor: QuantizedTensor) -> None:
    kind = block_type_for(tensor.grid, tensor.shape[1])
    decoded = dequantize(pack(tensor), GGMLQuantizationType[kind.name])
    np.testing.assert_array_equal(decoded, tensor.decode().numpy())


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_unpack_is_the_inverse(tensor: QuantizedTensor) -> None:
    again = unpack(pack(tensor), tensor.grid, tensor.shape[1])
    assert torch.equal(again.codes, tensor.codes)
    for name, field in tensor.fields.items():
        assert torch.equal(again.fields[name].view(torch.int16), field.view(torch.int16))


@pytest.mark.parametrize("scheme", GRIDS)
def test_each_grid_has_its_block_type(scheme: str) -> None:
    assert block_type_for(grid_for(scheme), 288).name == GRIDS[scheme]


def test_table_agrees_with_gguf_py() -> None:
    from gguf import GGML_QUANT_SIZES, LlamaFileType

    for kind in BLOCK_TYPES:
        theirs = GGMLQuantizationType[kind.name]
        assert (kind.code, (kind.elements, kind.bytes)) == (theirs.value, GGML_QUANT_SIZES[theirs])
        assert kind.file_type == LlamaFileType[f"MOSTLY_{kind.name}"].value


def test_lowest_code_of_eight_bits_is_minus_128() -> None:
    grid = grid_for("w8g32")
    tensor = QuantizedTensor(grid, torch.zeros(1, 32, dtype=torch.uint8), {"scale": torch.ones(1, 1).half()})
    assert pack(tensor)[0, 2:].view(np.int8).tolist() == [-128] * 32


@pytest.mark.parametrize(
    ("grid", "columns", "words"),
    [
        (grid_for("w2g32"), 64, "2-bit"),
        (grid_for("w3g128"), 128, "3-bit"),
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


def test_scales_that_differ_within_a_group_are_not_collapsed() -> None:
    fine, coarse = grid_for("w4g32"), grid_for("w4g64")
    scale = torch.tensor([[1.0, 2.0]]).half()
    raw = pack(QuantizedTensor(fine, torch.zeros(1, 64, dtype=torch.uint8), {"scale": scale}))
    with pytest.raises(ValueError, match="differs within a group of 64"):
        unpack(raw, coarse, 64)
