"""A child process that hosts llama.cpp: native logs go to a file, a native crash becomes one sentence.

The child answers on its standard output, whose descriptor it keeps for itself (`private_output`); it ends when its
standard input is closed, so it never outlives its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from signround.errors import FailedError

_TELLING = ("error", "failed", "unable", "unsupported", "assert", "unknown model", "unknown pre")


def private_output() -> IO[bytes]:
    """In the child: a stream to the parent; whatever native code prints on standard output goes to the log instead."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def answer(stream: IO[bytes], data: dict[str, Any]) -> None:
    """In the child: send one JSON line."""
    stream.write(json.dumps(data).encode() + b"\n")
    stream.flush()


class Child:
    """The parent's end. `module` is run with `settings` as its one argument; `path` is the file that errors name."""

    def __init__(self, module: str, settings: dict[str, Any], path: Path) -> None:
        self._path = path
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # held until close()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.requests: IO[bytes] = self._process.stdin
        self.answers: IO[bytes] = self._process.stdout

    def line(self) -> dict[str, Any]:
        """The next JSON line of the child. Raises FailedError when it has died."""
        raw = self.answers.readline()
        if not raw:
            raise self.failure()
        data: dict[str, Any] = json.loads(raw)
        return data

    def take(self, count: int) -> bytes:
        """`count` bytes from the child. Raises FailedError when it dies before."""
        raw = self.answers.read(count)
        if len(raw) != count:
            raise self.failure()
        return raw

    def send(self, data: bytes) -> None:
        """Raises FailedError when the child has died."""
        try:
            self.requests.write(data)
            self.requests.flush()
        except BrokenPipeError as error:
            raise self.failure() from error

    def failure(self, reason: str = "") -> FailedError:
        """Close the child and say what it said last."""
        said = reason or self._last_words()
        self.close()
        return FailedError(
            f"{self._path}: llama.cpp could not run the file ({said}); "
            "export it again, or update llama.cpp if it is older than the model's architecture."
        )

    def close(self) -> None:
        """End the child; safe to call twice."""
        if self._process.poll() is None:
            with contextlib.suppress(BrokenPipeError):
                self.requests.close()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        self.answers.close()
        self._log.close()

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if any(word in line.lower() for word in _TELLING)]
        code = self._process.returncode
        ended = f"it ended with signal {-code}" if code is not None and code < 0 else f"it ended with code {code}"
        return telling[0][:200] if telling else ended
