"""One position at a time through xllamacpp's embedded llama-server, on localhost with a random key.

llama-server gives log-probabilities of the next token only, so a window of n tokens is n requests; the prompt cache
makes each a single decoding step.
"""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from signround.runtimes.llama_cpp_child import Child
from signround.runtimes.protocol import Speed
from signround.runtimes.speed import any_tokens, best_speed

CHILD = "signround.runtimes.llama_cpp_server_child"
CONTEXT_STEP = 256
FORCING_BIAS = 1000.0
ANSWERED_TOKENS = 1 << 21
LEAST_POSITIONS = 32


class ServerRuntime:
    """`Runtime` over xllamacpp; values are log-probabilities. Raises FailedError when the file cannot be loaded."""

    def __init__(self, path: Path, threads: int, repack: bool) -> None:
        self._settings = {"path": str(path), "threads": threads, "repack": repack, "key": secrets.token_urlsafe(24)}
        self._path = path
        self._start(CONTEXT_STEP)
        self.vocabulary: int = self._get("/v1/models")["data"][0]["meta"]["n_vocab"]
        # The server samples a token whatever it is asked, and one that is part of a character has no probabilities in
        # its answer; so a plain letter is forced. The probabilities asked for are those before that bias.
        self._letter = self.tokenize("a")[-1]
        kernels = "" if repack else ", plain kernels"
        self.name = f"llama.cpp (xllamacpp {self._version}), float32 KV cache, no flash attention{kernels}"
        # An answer spells out the whole vocabulary: about 10 us a token (46 ms at 4096, 330 ms at 32 thousand).
        self.affordable_positions: int | None = max(LEAST_POSITIONS, ANSWERED_TOKENS // self.vocabulary)

    def _start(self, context: int) -> None:
        self._context = context
        self._child = Child(CHILD, {**self._settings, "context": context}, self._path)
        ready = self._child.line()
        self._version: str = ready["version"]
        address = urlsplit(ready["address"])
        self._connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port)

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """As `Runtime.logits`: log-probabilities, one window at a time, one request a position."""
        tokens = windows.shape[1]
        self._make_room(tokens)
        for window in windows.tolist():
            rows = [self._next(window[:end]) for end in range(1, tokens + 1)]
            yield torch.stack(rows).unsqueeze(0)

    def speed(self, prompt: int = 128, new: int = 16) -> Speed | None:
        """As `Runtime.speed`, timed by llama-server; a step takes the likeliest token, as a user's would."""
        self._make_room(prompt + new + 1)
        # The first new token comes out of the prompt's pass, and the server's clock starts at it.
        request = {
            "prompt": any_tokens(prompt, self.vocabulary),
            "n_predict": new + 1,
            "cache_prompt": False,
            "ignore_eos": True,
            "samplers": ["top_k"],
            "top_k": 1,
        }

        def one_pass() -> tuple[float, float]:
            timings = self._post("/completion", request)["timings"]
            if (timings["prompt_n"], timings["predicted_n"]) != (prompt, new + 1):
                raise self._child.failure(f"{timings['prompt_n']} + {timings['predicted_n']} tokens were timed")
            return timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000

        return best_speed(one_pass, prompt, new)

    def _make_room(self, tokens: int) -> None:
        """A longer context is another server."""
        if tokens >= self._context:
            self.close()
            self._start(tokens // CONTEXT_STEP * CONTEXT_STEP + CONTEXT_STEP)

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """As `LlamaCpp.tokenize`."""
        request = {"content": text, "add_special": add_special, "parse_special": parse_special}
        ids: list[int] = self._post("/tokenize", request)["tokens"]
        return ids

    def close(self) -> None:
        self._connection.close()
        self._child.close()

    def _next(self, prompt: list[int]) -> Tensor:
        """float32 [vocabulary]: log-probabilities of the token after `prompt`."""
        request = {
            "prompt": prompt,
            "n_predict": 1,
            "n_probs": self.vocabulary,
            "temperature": -1,
            "cache_prompt": True,
            "logit_bias": [[self._letter, FORCING_BIAS]],
        }
        entries = self._post("/completion", request)["completion_probabilities"][0]["top_logprobs"]
        if len(entries) != self.vocabulary:
            raise self._child.failure(f"{len(entries)} of {self.vocabulary} log-probabilities were given")
        row = torch.empty(self.vocabulary)
        row[torch.tensor([entry["id"] for entry in entries])] = torch.tensor([entry["logprob"] for entry in entries])
        return row

    def _get(self, route: str) -> dict[str, Any]:
        return self._exchange("GET", route, None)

    def _post(self, route: str, request: dict[str, Any]) -> dict[str, Any]:
        return self._exchange("POST", route, json.dumps(request))

    def _exchange(self, method: str, route: str, body: str | None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._settings['key']}", "Content-Type": "application/json"}
        for attempt in range(2):  # the server closes a kept-alive connection after a while
            try:
                self._connection.request(method, route, body, headers)
                response = self._connection.getresponse()
                raw = response.read()
                break
            except (http.client.HTTPException, ConnectionError) as error:
                self._connection.close()
                if attempt:
                    raise self._child.failure() from error
        if response.status != http.client.OK:
            raise self._child.failure(raw.decode(errors="replace")[:200])
        data: dict[str, Any] = json.loads(raw)
        return data
