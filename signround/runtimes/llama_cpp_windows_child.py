"""The child of `llama_cpp_windows`: holds the model in llama-cpp-python and answers on its standard output.

A JSON line {"do": "logits", "tokens": n} followed by n int32 is answered with a JSON line and n x vocabulary float32;
{"do": "speed", "tokens": n, "prompt": m} followed by n int32, and {"do": "tokenize", "bytes": n, ...} followed by n
bytes of text, with a JSON line. Imports no torch: it starts at once.
"""

from __future__ import annotations

import json
import sys
import time
from typing import IO, Any

import numpy as np

from signround.errors import FailedError
from signround.runtimes.llama_cpp_child import answer, private_output


class _Model:
    """llama.cpp's model and context; a longer window makes a new context."""

    def __init__(self, path: str, threads: int, repack: bool) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._threads = threads
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.use_extra_bufts = repack
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise FailedError("the model cannot be loaded")  # the log says why; the parent reads it
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary: int = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self._context: Any = None
        self._length = 0

    def _prepare(self, length: int) -> None:
        api = self._api
        if length <= self._length:
            api.llama_memory_clear(api.llama_get_memory(self._context), True)
            return
        if self._context is not None:
            api.llama_free(self._context)
        parameters = api.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = length
        parameters.n_ubatch = min(length, 512)
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.type_k = parameters.type_v = api.GGML_TYPE_F32
        parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise FailedError(f"no context of {length} tokens can be made")
        self._length = length

    def logits(self, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """int32 [n] -> float32 [n, vocabulary]; the array belongs to llama.cpp until the next call."""
        self._prepare(len(tokens))
        self._decode(tokens, 0, every=True)
        return np.ctypeslib.as_array(self._api.llama_get_logits(self._context), shape=(len(tokens), self.vocabulary))

    def speed(self, tokens: np.ndarray[Any, Any], prompt: int) -> dict[str, float]:
        """Seconds of the first `prompt` tokens at once, and of the others one at a time."""
        self._prepare(len(tokens))
        started = time.perf_counter()
        self._decode(tokens[:prompt], 0, every=False)
        read = time.perf_counter()
        for position in range(prompt, len(tokens)):
            self._decode(tokens[position : position + 1], position, every=False)
        return {"prefill": read - started, "decode": time.perf_counter() - read}

    def _decode(self, tokens: np.ndarray[Any, Any], first: int, *, every: bool) -> None:
        """Run `tokens` at positions from `first` on; logits are made of every position or of the last one."""
        api, count = self._api, len(tokens)
        batch = api.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for index in range(count):
            batch.token[index], batch.pos[index] = int(tokens[index]), first + index
            batch.logits[index] = every or index == count - 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        status = api.llama_decode(self._context, batch)
        api.llama_synchronize(self._context)
        api.llama_batch_free(batch)
        if status != 0:
            raise FailedError(f"llama_decode gave {status}")

    def tokenize(self, raw: bytes, add_special: bool, parse_special: bool) -> list[int]:
        buffer = (self._api.llama_token * (len(raw) + 8))()
        count = self._api.llama_tokenize(
            self._vocabulary, raw, len(raw), buffer, len(buffer), add_special, parse_special
        )
        return list(buffer[:count])


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    model = _Model(**json.loads(sys.argv[1]))
    import llama_cpp

    answer(answers, {"vocabulary": model.vocabulary, "version": llama_cpp.__version__})
    while line := requests.readline():
        request = json.loads(line)
        if request["do"] == "logits":
            tokens = np.frombuffer(requests.read(request["tokens"] * 4), dtype=np.int32)
            found = model.logits(tokens)
            answer(answers, {"rows": len(found)})
            answers.write(found.data)
            answers.flush()
        elif request["do"] == "speed":
            tokens = np.frombuffer(requests.read(request["tokens"] * 4), dtype=np.int32)
            answer(answers, model.speed(tokens, request["prompt"]))
        else:
            raw = requests.read(request["bytes"])
            answer(answers, {"ids": model.tokenize(raw, request["add_special"], request["parse_special"])})


if __name__ == "__main__":
    _serve(sys.stdin.buffer, private_output())
