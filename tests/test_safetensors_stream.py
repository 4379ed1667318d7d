"""The streamed file against the safetensors library: the same bytes, and readable by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from signround.safetensors_stream import SafetensorsWriter, TensorSpec, lay_out, split

DTYPES = [torch.float32, torch.int32, torch.bfloat16, torch.float16]


def test_bytes_are_those_of_save_file(tmp_path: Path) -> None:
    tensors = {
        f"{letter}.{index}": torch.randn(shape).mul(100).to(dtype)
        for letter in "zaé"
        for index, (dtype, shape) in enumerate(zip(DTYPES, [(3, 5), (7,), (1, 1, 3), (9,)], strict=True))
    }
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    layout = lay_out(specs, {"format": "pt"})
    ours = tmp_path / "ours.safetensors"
    with SafetensorsWriter(ours, layout) as file:
        for name in reversed(tensors):
            file.write(name, tensors[name])
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert ours.stat().st_size == layout.bytes
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(ours).items())


def test_a_transposed_view_is_written_in_its_own_order(tmp_path: Path) -> None:
    view = torch.arange(6, dtype=torch.int32).reshape(2, 3).T
    with SafetensorsWriter(tmp_path / "f", lay_out([TensorSpec("a", (3, 2), torch.int32)])) as file:
        file.write("a", view)
    assert torch.equal(load_file(tmp_path / "f")["a"], view)


def test_wrong_shape_dtype_and_forgotten_tensors_are_errors(tmp_path: Path) -> None:
    layout = lay_out([TensorSpec("a", (2,), torch.int32)])
    with pytest.raises(ValueError, match="a must be"), SafetensorsWriter(tmp_path / "f", layout) as file:
        file.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="a must be"), SafetensorsWriter(tmp_path / "f", layout) as file:
        file.write("a", torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="never written"), SafetensorsWriter(tmp_path / "f", layout):
        pass


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=12), st.integers(1, 400))
def test_modules_stay_whole_and_files_stay_small(sizes: list[list[int]], limit: int) -> None:
    modules = [
        [TensorSpec(f"{m}.{t}", (size,), torch.int32) for t, size in enumerate(module)]
        for m, module in enumerate(sizes)
    ]
    files = split(modules, limit)
    assert [spec for file in files for spec in file] == [spec for module in modules for spec in module]
    for file in files:
        owners = {spec.name.split(".")[0] for spec in file}
        assert all(spec in file for module in modules for spec in module if module[0].name.split(".")[0] in owners)
        assert len(owners) == 1 or sum(spec.bytes for spec in file) <= limit
