"""Whole windows through llama-cpp-python's C interface: one forward pass gives the logits of every position."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from signround.runtimes.llama_cpp_child import Child
from signround.runtimes.protocol import Speed
from signround.runtimes.speed import any_tokens, best_speed

CHILD = "signround.runtimes.llama_cpp_windows_child"


class WindowRuntime:
    """`Runtime` over llama-cpp-python. Raises FailedError when the file cannot be loaded."""

    affordable_positions: int | None = None

    def __init__(self, path: Path, threads: int, repack: bool) -> None:
        settings = {"path": str(path), "threads": threads, "repack": repack}
        self._child = Child(CHILD, settings, path)
        ready = self._child.line()
        self.vocabulary: int = ready["vocabulary"]
        kernels = "" if repack else ", plain kernels"
        self.name = f"llama.cpp (llama-cpp-python {ready['version']}), float32 KV cache, no flash attention{kernels}"

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """As `Runtime.logits`: true logits, one window at a time."""
        for window in windows:
            tokens = window.to(torch.int32).contiguous().numpy()
            request = {"do": "logits", "tokens": len(tokens)}
            self._child.send(json.dumps(request).encode() + b"\n" + tokens.tobytes())
            self._child.line()
            raw = bytearray(self._child.take(len(tokens) * self.vocabulary * 4))
            yield torch.frombuffer(raw, dtype=torch.float32).view(1, len(tokens), self.vocabulary)

    def speed(self, prompt: int = 128, new: int = 16) -> Speed | None:
        """As `Runtime.speed`, timed in the child: llama_decode alone."""

        tokens = torch.tensor(any_tokens(prompt + new, self.vocabulary), dtype=torch.int32).numpy()
        request = {"do": "speed", "tokens": len(tokens), "prompt": prompt}

        def one_pass() -> tuple[float, float]:
            self._child.send(json.dumps(request).encode() + b"\n" + tokens.tobytes())
            seconds = self._child.line()
            return seconds["prefill"], seconds["decode"]

        return best_speed(one_pass, prompt, new)

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """As `LlamaCpp.tokenize`."""
        raw = text.encode()
        request = {"do": "tokenize", "bytes": len(raw), "add_special": add_special, "parse_special": parse_special}
        self._child.send(json.dumps(request).encode() + b"\n" + raw)
        ids: list[int] = self._child.line()["ids"]
        return ids

    def close(self) -> None:
        self._child.close()
