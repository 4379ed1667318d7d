"""Which .gguf files make one model."""

from __future__ import annotations

from pathlib import Path

import pytest

from signround.errors import RefusedError
from signround.runtimes.gguf_files import is_version_of, model_files, part_name
from signround.runtimes.targets import kind_of


def touched(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"GGUF")


def test_names_of_parts() -> None:
    assert part_name("a-Q4_0", 0, 1) == "a-Q4_0.gguf"
    assert part_name("a-Q4_0", 1, 12) == "a-Q4_0-00002-of-00012.gguf"
    assert is_version_of("a.gguf", "a")
    assert is_version_of(".partial-a-00002-of-00012.gguf", "a")
    assert not any(is_version_of(name, "a") for name in ("aa.gguf", "a-b.gguf", "a-00002-of-12.gguf", "a.ggufs"))
    assert not is_version_of("axb.gguf", "a.b")


def test_a_file_and_the_folder_of_one(tmp_path: Path) -> None:
    touched(tmp_path, "a.gguf", "imatrix.gguf", "a-imatrix.gguf")
    assert model_files(tmp_path) == model_files(tmp_path / "a.gguf") == (tmp_path / "a.gguf",)
    assert model_files(tmp_path / "none.gguf") == (tmp_path / "none.gguf",)
    assert kind_of(tmp_path) == "gguf"


def test_a_folder_of_several_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="found none"):
        model_files(tmp_path)
    touched(tmp_path, "a-00001-of-00002.gguf", "a-00002-of-00002.gguf")
    assert [path.name for path in model_files(tmp_path)] == ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]
    touched(tmp_path, "a-00001-of-00003.gguf", "b.gguf")
    with pytest.raises(RefusedError, match=r"found a-00001-of-00002\.gguf, a-00001-of-00003\.gguf, b\.gguf; name"):
        model_files(tmp_path)
    assert len(model_files(tmp_path / "a-00001-of-00002.gguf")) == 2
    with pytest.raises(RefusedError, match=r"2 of 3 parts are missing \(a-00002-of-00003\.gguf, \.\.\.\)"):
        model_files(tmp_path / "a-00001-of-00003.gguf")


@pytest.mark.parametrize("name", ["a-00000-of-00002.gguf", "a-00003-of-00002.gguf", "a-00002-of-00002.gguf"])
def test_other_numbers_are_refused(name: str, tmp_path: Path) -> None:
    touched(tmp_path, name)
    with pytest.raises(RefusedError, match=r"opened by its first; give .*a-00001-of-00002\.gguf"):
        model_files(tmp_path / name)
