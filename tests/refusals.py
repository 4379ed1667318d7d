"""The command line as tests of bad input call it, and what a refusal looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from signround import files
from signround.cli.main import main

FAST = ("--samples", "4", "--seqlen", "16", "--iters", "2")
Capture = pytest.CaptureFixture[str]


def signround(capsys: Capture, *arguments: object) -> tuple[int, list[str], str]:
    """Exit code, lines on stderr, stdout."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.err.splitlines(), captured.out


def quantize(capsys: Capture, model: Path, out: Path, *arguments: object, scheme: str = "w4g32") -> Any:
    settings = () if "rtn" in arguments else FAST
    return signround(capsys, "quantize", model, "--scheme", scheme, "-o", out, *settings, *arguments)


def is_refused(outcome: tuple[int, list[str], str], *parts: str, reasons: int = 1) -> None:
    """Exit code 2, as many sentences as there are reasons, each with a next step, and `parts` in them."""
    code, lines, stdout = outcome
    assert code == 2
    assert len(lines) == reasons, lines
    for line in lines:
        assert line.startswith("signround: ")
        assert line.endswith(".")
        assert "; " in line  # what is wrong; what to do
    for part in parts:
        assert any(part in line for line in lines), (part, lines)
    assert stdout == ""


def half_written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(files.PARTIAL) or path.name.startswith(".tmp")]
