"""Logits and greedy text from onnxruntime-genai, the library that phones and laptops run an exported folder with.

Refuses folders without genai_config.json. One window at a time: the library fills its own cache token by token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from signround.errors import FailedError, refuse, unavailable
from signround.runtimes.protocol import Speed
from signround.runtimes.speed import any_tokens, best_speed

if TYPE_CHECKING:
    import onnxruntime_genai

CONFIG = "genai_config.json"


def open_genai(folder: Path) -> GenaiRuntime:
    """Load `folder`. Raises UnavailableError without the package, RefusedError without genai_config.json, FailedError
    when onnxruntime-genai cannot load the model."""
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise unavailable(
            "the package onnxruntime-genai is not installed", "run `pip install 'signround[genai]'`", "onnx"
        ) from error
    if not (folder / CONFIG).is_file():
        raise refuse(f"the folder has no {CONFIG}", "give a folder that `--to onnx` wrote", str(folder))
    try:
        model = onnxruntime_genai.Model(str(folder))
    except RuntimeError as error:
        raise FailedError(f"{folder}: onnxruntime-genai cannot load the model ({_first_line(error)}).") from error
    return GenaiRuntime(model, f"onnxruntime-genai {onnxruntime_genai.__version__}", folder)


class GenaiRuntime:
    """A loaded folder; fulfils `Runtime`, and generates."""

    affordable_positions: int | None = None

    def __init__(self, model: onnxruntime_genai.Model, name: str, folder: Path) -> None:
        self.name = name
        self._model: onnxruntime_genai.Model | None = model
        self._folder = folder
        self.vocabulary: int = json.loads((folder / CONFIG).read_text())["model"]["vocab_size"]

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """See `Runtime.logits`; each batch is one window."""
        import numpy as np

        for window in windows:
            generator = self._generator(window, 1)
            # Of the latest append_tokens, at every position; after a generated token it would be the last one only.
            yield torch.from_numpy(np.array(generator.get_output("logits"), dtype=np.float32))

    def greedy(self, prompt: Tensor, count: int) -> Tensor:
        """int64 [at most count]: the likeliest tokens after `prompt` (int64 [tokens]); an end token stops it."""
        generator = self._generator(prompt, count)
        while not generator.is_done() and generator.token_count() < len(prompt) + count:
            generator.generate_next_token()
        return torch.tensor([int(token) for token in generator.get_sequence(0)[len(prompt) :]])

    def speed(self, prompt: int = 128, new: int = 16) -> Speed | None:
        """See `Runtime.speed`; a step takes the likeliest token, as a user's would."""
        tokens = torch.tensor(any_tokens(prompt, self.vocabulary))

        def one_pass() -> tuple[float, float]:
            started = time.perf_counter()
            generator = self._generator(tokens, new)
            read = time.perf_counter()
            for _ in range(new):  # appended, not generated: an end token would stop it
                generator.append_tokens(tokens[:1].numpy().astype("int32"))
            return read - started, time.perf_counter() - read

        return best_speed(one_pass, prompt, new)

    def _generator(self, prompt: Tensor, more: int) -> onnxruntime_genai.Generator:
        import numpy as np
        import onnxruntime_genai

        if self._model is None:
            raise FailedError(f"{self._folder}: the runtime is closed.")
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        # genai_config.json may hold how its publisher samples the model: here the likeliest token, nothing else.
        parameters.set_search_options(
            max_length=len(prompt) + more, batch_size=1, do_sample=False, repetition_penalty=1.0,
            no_repeat_ngram_size=0, min_length=0,
        )  # fmt: skip
        try:
            generator = onnxruntime_genai.Generator(self._model, parameters)
            generator.append_tokens(prompt.numpy().astype(np.int32))
        except RuntimeError as error:
            raise FailedError(f"{self._folder}: onnxruntime-genai cannot run it ({_first_line(error)}).") from error
        return generator

    def close(self) -> None:
        """See `Runtime.close`."""
        self._model = None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
