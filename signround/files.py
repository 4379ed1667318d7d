"""Files that are whole or absent: every final name appears by `os.replace`, and hashes are streamed."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from signround.errors import FailedError, refuse

PARTIAL = ".partial-"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when there is none. Raises RefusedError when it is damaged."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise refuse(f"not valid JSON ({error})", "download the file again", str(path)) from error
    if not isinstance(data, dict):
        raise refuse("must hold a JSON object", "download the file again", str(path))
    return data


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full disk or a read-only folder into one sentence (FailedError)."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FailedError(
                f"{target}: the disk is full; free some space and run the same command again, finished blocks are kept."
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise FailedError(f"{target}: cannot be written ({error.strerror}); choose another -o folder.") from error
        raise


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path` (fsync, replace), on failure it is removed."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{PARTIAL}{path.name}"
        try:
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def files_written_whole(paths: Sequence[Path], replaced: Iterable[Path] = ()) -> Iterator[list[Path]]:
    """`written_whole` for files that are one thing, the first being the one that readers open.

    All take their names after the last was written, the first one last and, if it replaces another, after that was
    removed: at no moment does a first file stand beside parts of another set. `replaced` (older files of the same
    thing under other names) go at the end.
    """
    first, *others = paths
    with disk_errors(first):
        first.parent.mkdir(parents=True, exist_ok=True)
        temporaries = [path.parent / f"{PARTIAL}{path.name}" for path in paths]
        try:
            yield temporaries
            for temporary in temporaries:
                with open(temporary, "rb") as written:
                    os.fsync(written.fileno())
            if others:
                first.unlink(missing_ok=True)
            for temporary, path in reversed(list(zip(temporaries, paths, strict=True))):
                os.replace(temporary, path)
            for path in replaced:
                path.unlink(missing_ok=True)
        finally:
            for temporary in temporaries:
                temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; on success it takes the name `folder` (an older one is removed)."""
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for stale in folder.parent.glob(f"{PARTIAL}{glob.escape(folder.name)}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{folder.name}-", dir=folder.parent))
        try:
            temporary.chmod(0o755)
            yield temporary
            if folder.exists():
                retired = folder.parent / f"{PARTIAL}{folder.name}-retired"
                os.replace(folder, retired)
                os.replace(temporary, folder)
                shutil.rmtree(retired)
            else:
                os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def canonical_json(data: Any) -> str:
    """The one spelling that is hashed: sorted keys, no spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def finite(data: Any) -> Any:
    """JSON values with null for NaN and infinities, which JSON does not have: figures of damaged files."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_json(path: Path, data: Any) -> None:
    """Indented JSON, whole or absent."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(finite(data), indent=2) + "\n")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, streamed."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_json(data: Any) -> str:
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()
