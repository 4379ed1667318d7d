"""A worker in a process of its own, spoken to through pipes: one message out, one message back, arrays along with both.

GPTQ loaders set torch options, environment variables and loggers on import and print banners; none of that may reach
signround's own process. A message is one line of JSON followed by the bytes of its arrays. Whatever the loader
prints goes to the child's stderr, which is shown only when the child dies. Refuses nothing; a dead child is a
FailedError.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from signround.errors import FailedError

Array = NDArray[Any]
Message = tuple[Mapping[str, Any], Sequence[Array]]
# TORCHDYNAMO_DISABLE: gptqmodel compiles its kernel on first use, which needs a C++ compiler and 20 to 55 s.
CHILD_ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


def send(stream: IO[bytes], body: Mapping[str, Any], arrays: Sequence[Array] = ()) -> None:
    """Write one message and flush it."""
    kinds = [[array.dtype.str, array.shape] for array in arrays]
    stream.write(json.dumps({"body": body, "arrays": kinds}).encode() + b"\n")
    for array in arrays:
        stream.write(np.ascontiguousarray(array).data)
    stream.flush()


def receive(stream: IO[bytes]) -> Message | None:
    """Read one message; None when the other side has closed the pipe."""
    line = stream.readline()
    if not line:
        return None
    head = json.loads(line)
    arrays = []
    for kind, shape in head["arrays"]:
        dtype = np.dtype(kind)
        data = stream.read(dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
        arrays.append(np.frombuffer(bytearray(data), dtype).reshape(shape))
    return head["body"], arrays


def serve(answer: Callable[[Mapping[str, Any], Sequence[Array]], Message]) -> None:
    """The worker's loop: answer until the parent closes the pipe. An exception ends the process, its traceback is the
    reason that the parent shows. Stdout is kept for messages; what libraries print there goes to stderr."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        while (request := receive(sys.stdin.buffer)) is not None:
            send(replies, *answer(*request))


class Child:
    """A running worker module (`python -m module`). `ask` raises FailedError, with its last words, when it has died."""

    def __init__(self, module: str, purpose: str) -> None:
        self._purpose = purpose
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, **CHILD_ENVIRONMENT},
        )

    def ask(self, body: Mapping[str, Any], arrays: Sequence[Array] = ()) -> Message:
        """Send a request and wait for its reply."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            send(self._process.stdin, body, arrays)
            reply = receive(self._process.stdout)
        except BrokenPipeError:
            reply = None
        if reply is None:
            self._process.wait()
            raise FailedError(
                f"{self._purpose} failed ({self._last_words()}); check that the folder is whole "
                "and that the extras have the versions that pyproject.toml names."
            )
        return reply

    def close(self) -> None:
        """End the process; harmless when it has ended already."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        self._stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def _last_words(self) -> str:
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else f"the process ended with code {self._process.returncode} and said nothing"
