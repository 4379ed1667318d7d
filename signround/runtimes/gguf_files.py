"""Which .gguf files make one model: a single file, or parts `name-00001-of-00003.gguf`, opened by the first.

Names only: nothing is opened here. Refuses a folder of several models, a set with missing parts, and a later part where
the first is needed. An importance matrix (`...imatrix.gguf`) is no model and may lie beside one.
"""

from __future__ import annotations

import re
from pathlib import Path

from signround.errors import refuse

MOST_PARTS = 65535  # `split.count` is a u16
_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
_IMATRIX = "imatrix.gguf"


def part_name(stem: str, index: int, count: int) -> str:
    """File name of part `index` (from 0) of `count`, as llama.cpp's `llama_split_path` has it; one part is a whole."""
    return f"{stem}.gguf" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.gguf"


def is_version_of(name: str, stem: str) -> bool:
    """Whether a file is the model `stem`, whole or a part of any number of parts, finished or half-written."""
    whole = re.escape(stem)
    return re.fullmatch(rf"(?:\.partial-)?{whole}(?:-[0-9]{{5}}-of-[0-9]{{5}})?\.gguf", name) is not None


def model_files(target: Path) -> tuple[Path, ...]:
    """Every file of the model at `target` (a .gguf file, the first part, or a folder with one model), in order.

    Raises RefusedError when that is not one whole model. A file that is no part is taken as it is, existing or not.
    """
    first = _only_model(target) if target.is_dir() else target
    match = _PART.fullmatch(first.name)
    if match is None:
        return (first,)
    count = int(match["count"])
    parts = [first.with_name(part_name(match["stem"], index, count)) for index in range(count)]
    if int(match["number"]) != 1:
        raise refuse(
            f"this is part {int(match['number'])} of {count}, and a model in parts is opened by its first",
            f"give {first.with_name(match['stem'])}-00001-of-{match['count']}.gguf",
            str(target),
        )
    missing = [path.name for path in parts if not path.is_file()]
    if missing:
        raise refuse(
            f"{len(missing)} of {count} parts are missing ({missing[0]}{', ...' if len(missing) > 1 else ''})",
            "put all parts into one folder, or export again",
            str(target),
        )
    return tuple(parts) if parts else (first,)


def _only_model(folder: Path) -> Path:
    """The one file, or the first part of the one set of parts."""
    names = sorted(path.name for path in folder.glob("*.gguf") if not path.name.endswith(_IMATRIX))
    sets: dict[tuple[str, str], str] = {}
    for name in names:
        match = _PART.fullmatch(name)
        sets.setdefault((match["stem"], match["count"]) if match else (name, ""), name)
    if len(sets) != 1:
        found = ", ".join(sets.values()) or "none"
        raise refuse(
            f"the folder must hold exactly one .gguf model (a file or its parts), found {found}",
            "name the file",
            str(folder),
        )
    ((stem, count),) = sets
    return folder / (part_name(stem, 0, int(count)) if count else stem)
