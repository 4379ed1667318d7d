"""llama.cpp as a runtime: logits of a .gguf file, on the processor, in a process of its own.

Two bindings run the same code: llama-cpp-python gives the logits of whole windows; xllamacpp, a prebuilt wheel, gives
log-probabilities through its embedded server, one request a position. Both run with a float32 KV cache and without
flash attention, so what differs from the tuned model is llama.cpp's 8-bit activations and nothing else. The child
process keeps native logs off the terminal and turns a native crash into a FailedError. Native tools on PATH are not
used: `llama-perplexity` keeps log-probabilities in 16 bits, for the second half of each window only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from signround.errors import refuse, unavailable
from signround.measure import processors
from signround.runtimes.llama_cpp_server import ServerRuntime
from signround.runtimes.llama_cpp_windows import WindowRuntime
from signround.runtimes.protocol import Runtime


class LlamaCpp(Runtime, Protocol):
    """A `Runtime` that also tells how llama.cpp cuts a text into tokens."""

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text`; `add_special` puts BOS and EOS around it as the file says, `parse_special` reads
        special tokens written in the text."""
        ...


_BINDINGS: tuple[tuple[str, Callable[[Path, int, bool], LlamaCpp]], ...] = (
    ("llama_cpp", WindowRuntime),
    ("xllamacpp", ServerRuntime),
)


def open_llama_cpp(path: str | Path, threads: int | None = None, repack: bool = True) -> LlamaCpp:
    """Load a .gguf file with the best binding that is installed. `repack=False` runs the plain kernels.

    Raises RefusedError when there is no such file, UnavailableError without a binding, FailedError when
    llama.cpp cannot load the file.
    """
    path = Path(path)
    if not path.is_file():
        raise refuse("no such .gguf file", "check the path", str(path))
    count = threads or processors()
    for module, runtime in _BINDINGS:
        if importlib.util.find_spec(module) is not None:
            return runtime(path, count, repack)
    raise unavailable(
        "running a .gguf file needs llama.cpp, and neither llama-cpp-python nor xllamacpp is installed",
        "pip install 'signround[llama-cpp]' (prebuilt) or 'signround[llama-cpp-python]' (compiles, faster to evaluate)",
        str(path),
    )
