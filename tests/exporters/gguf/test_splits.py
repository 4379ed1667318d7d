"""Models in several files: sizes, marks, whole sets or none, and every reader of ours on them."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.gguf.container import GgufFile, KeyValue, TensorEntry
from exporters.gguf.exporter import GgufExporter
from exporters.gguf.layout import TYPE_BYTES
from exporters.gguf.splits import size_in_bytes, size_text, smallest_limit, split
from signround.artifact import QuantizedCheckpoint
from signround.errors import FailedError, RefusedError
from signround.events import StageAdvanced, StageStarted, silent
from signround.exporting import make_exporters
from signround.inspection import inspect_target
from signround.parity import compare_weights
from tests.small_artifacts import write_rounded_artifact
from tests.small_models import write_small_model

ENTRIES = [KeyValue("general.architecture", "string", "llama"), KeyValue("a.numbers", "i32", list(range(50)))]
LIMIT = "150K"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    folder = tmp_path_factory.mktemp("split")
    return write_rounded_artifact(write_small_model(folder / "model", "llama"), folder / "artifact", "w4g32")


@pytest.mark.parametrize(("text", "size"), [("2G", 2 * 10**9), ("500M", 5 * 10**8), ("64K", 64000), (" 1m ", 10**6)])
def test_sizes_are_decimal(text: str, size: int) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["2", "0G", "-1G", "1.5G", "2GB", "G", "2 G", "2T", "٣G"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        size_in_bytes(text)


@given(st.integers(1, 10**13))
def test_a_size_in_words_is_enough(size: int) -> None:
    assert size <= size_in_bytes(size_text(size)) <= max(size * 1.1, size + 1000)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.integers(0, 20000))
@settings(max_examples=60)
def test_no_part_is_larger_than_the_limit(sizes: list[int], extra: int) -> None:
    tensors = [TensorEntry(f"tensor.{index}", (size,), 24, size) for index, size in enumerate(sizes)]
    limit = smallest_limit(ENTRIES, tensors)[0] + extra
    parts = split(ENTRIES, tensors, limit)
    assert all(part.bytes <= limit for part in parts)
    assert [tensor for part in parts for tensor in part.tensors] == tensors
    assert all(part.tensors for part in parts)
    assert list(parts[0].entries[:2]) == ENTRIES
    if len(parts) == 1:
        assert parts[0].entries == ENTRIES
        return
    for index, part in enumerate(parts):
        marks = {entry.key: (entry.kind, entry.value) for entry in part.entries[-3:]}
        assert marks == {
            "split.no": ("u16", index),
            "split.count": ("u16", len(parts)),
            "split.tensors.count": ("i32", len(tensors)),
        }
        assert len(part.entries) == (5 if index == 0 else 3)
    for one, two in pairwise(parts):  # greedy: the next tensor had no room
        grown = split(list(one.entries), [*one.tensors, two.tensors[0]], None)[0]
        assert grown.bytes > limit


def test_below_the_smallest_limit_nothing_fits() -> None:
    tensors = [TensorEntry("small", (10,), 24, 10), TensorEntry("large", (9000,), 24, 9000)]
    least, name = smallest_limit(ENTRIES, tensors)
    assert name == "large"
    assert len(split(ENTRIES, tensors, least)) == 2
    with pytest.raises(ValueError, match="large needs a file of 10K, the limit is 10K"):
        split(ENTRIES, tensors, least - 1)
    assert len(split(ENTRIES, tensors, None)) == 1


def test_the_parts_are_the_whole(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    (exporter,) = make_exporters(["gguf"], {"gguf": {"split_max_size": LIMIT}})
    assert exporter.refusals(artifact.plan) == []
    events: list[object] = []
    exported = exporter.export(artifact, tmp_path / "parts", events.append)
    whole = GgufExporter().export(artifact, tmp_path / "whole", silent)
    count = len(exported.files)
    assert count > 2
    stem = whole.target.stem
    names = [f"{stem}-{index + 1:05d}-of-{count:05d}.gguf" for index in range(count)]
    assert [path.name for path in exported.files] == names == sorted(p.name for p in (tmp_path / "parts").iterdir())
    assert all(path.stat().st_size <= 150_000 for path in exported.files)
    assert sum(path.stat().st_size for path in exported.files) == exporter.estimated_bytes(artifact.plan)
    assert isinstance(events[0], StageStarted)
    assert isinstance(events[-1], StageAdvanced)
    assert events[-1].done == events[-1].total == len(events) - 1

    one, parts = GgufFile(whole.target, TYPE_BYTES), [GgufFile(path, TYPE_BYTES) for path in exported.files]
    added = {"split.no": 0, "split.count": count, "split.tensors.count": len(one.tensors)}
    assert list(parts[0].values.items()) == [*one.values.items(), *added.items()]
    assert all(set(part.values) == set(added) for part in parts[1:])
    assert [name for part in parts for name in part.tensors] == list(one.tensors)
    for part in parts:
        for name, entry in part.tensors.items():
            assert entry == one.tensors[name]
            assert np.array_equal(part.data(name), one.data(name))


def test_every_reader_reads_the_parts(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    exporter = GgufExporter(split_max_size=LIMIT)
    exported = exporter.export(artifact, tmp_path / "parts", silent)
    assert exporter.opened(exported.target) == exporter.opened(tmp_path / "parts") == exported
    back = dict(exporter.read_back(exported))
    assert set(back) == set(artifact.layers)
    assert all(torch.equal(tensor.codes, artifact.quantized(name).codes) for name, tensor in back.items())
    decoded = dict(exporter.decode_independently(exported))
    assert set(decoded) == set(artifact.layers) | set(artifact.kept)
    assert all(torch.equal(weight, artifact.weight(name)) for name, weight in decoded.items())
    assert compare_weights(artifact, exporter, exported).passed
    total = sum(path.stat().st_size for path in exported.files)
    for target in (exported.target, tmp_path / "parts"):
        found = inspect_target(target)
        assert (found["kind"], found["bytes"], found["grids"][0]["linears"]) == ("gguf", total, 14)


def test_gguf_py_sees_the_types_of_gguf_split(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    from gguf import GGUFReader, GGUFValueType

    exported = GgufExporter(split_max_size=LIMIT).export(artifact, tmp_path, silent)
    for index, path in enumerate(exported.files):
        fields = GGUFReader(path).fields
        kinds = {key: fields[key].types for key in fields if key.startswith("split.")}
        assert kinds == {
            "split.no": [GGUFValueType.UINT16],
            "split.count": [GGUFValueType.UINT16],
            "split.tensors.count": [GGUFValueType.INT32],
        }
        assert fields["split.no"].contents() == index


def test_two_exports_are_the_same_bytes(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    exporter = GgufExporter(split_max_size=LIMIT)
    one, two = (exporter.export(artifact, tmp_path / name, silent).files for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_a_size_that_everything_fits_into_makes_one_plain_file(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    roomy = GgufExporter(split_max_size="1G").export(artifact, tmp_path / "roomy", silent)
    plain = GgufExporter().export(artifact, tmp_path / "plain", silent)
    assert roomy.target.name == plain.target.name
    assert roomy.target.read_bytes() == plain.target.read_bytes()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("2", r"split_max_size '2' is not a size; give a number and a unit: 2G, 500M"),
        ("big", r"split_max_size 'big' is not a size"),
        (
            "20K",
            r"too small: token_embd\.weight needs a file of 14.K, the limit is 20K; choose at least that",
        ),
    ],
)
def test_bad_sizes_are_refused_before_the_work(
    size: str, message: str, artifact: QuantizedCheckpoint, tmp_path: Path
) -> None:
    (refusal,) = GgufExporter(split_max_size=size).refusals(artifact.plan)
    with pytest.raises(RefusedError, match=message):
        raise RefusedError(refusal)


def test_older_sets_do_not_linger(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    strangers = {"other-1M-Q4_0.gguf", "model-361K-W4G32-more.gguf", "model-361K-W4G32.txt"}
    for name in strangers:
        (tmp_path / name).write_bytes(b"GGUF")
    for size in (LIMIT, "", "200K", LIMIT, ""):
        (tmp_path / ".partial-model-361K-W4G32-00001-of-00077.gguf").write_bytes(b"left by a kill")
        files = GgufExporter(split_max_size=size).export(artifact, tmp_path, silent).files
        assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files} | strangers


def test_a_failing_export_leaves_the_old_set(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    shutil.copytree(artifact.folder, tmp_path / "artifact")
    copy = QuantizedCheckpoint(tmp_path / "artifact")
    old = GgufExporter(split_max_size=LIMIT).export(copy, tmp_path / "out", silent)
    before = {path.name: path.read_bytes() for path in old.files}
    (tmp_path / "artifact" / "blocks" / "00001.safetensors").unlink()
    for size in ("200K", LIMIT, ""):
        with pytest.raises(FailedError, match="cannot be read"):
            GgufExporter(split_max_size=size).export(copy, tmp_path / "out", silent)
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_sets_that_are_not_whole_are_refused(artifact: QuantizedCheckpoint, tmp_path: Path) -> None:
    exporter = GgufExporter(split_max_size=LIMIT)
    exported = exporter.export(artifact, tmp_path, silent)
    first, second, third = exported.files[:3]
    count = len(exported.files)
    with pytest.raises(RefusedError, match=rf"this is part 2 of {count}.*give .*-00001-of-0000{count}\.gguf"):
        exporter.opened(second)
    raw = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(RefusedError, match=rf"says that it is part 3 of {count}, its name says 2 of {count}"):
        exporter.opened(first)
    second.unlink()
    with pytest.raises(RefusedError, match=rf"1 of {count} parts are missing \({second.name}\)"):
        exporter.opened(tmp_path)
    second.write_bytes(raw)
    assert exporter.opened(tmp_path) == exported
    first.rename(tmp_path / "plain.gguf")
    with pytest.raises(RefusedError, match=rf"plain\.gguf says that it is part 1 of {count}, its name says 1 of 1"):
        exporter.opened(tmp_path / "plain.gguf")
