"""The child of `llama_cpp_server`: hosts xllamacpp's llama-server on localhost until its standard input is closed."""

from __future__ import annotations

import importlib.metadata
import json
import sys

from signround.runtimes.llama_cpp_child import answer, private_output


def _serve(path: str, threads: int, repack: bool, key: str, context: int) -> None:
    answers = private_output()
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = context
    parameters.n_gpu_layers = 0
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.no_extra_bufts = not repack
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_ram_mib = 0  # no copies of old prompts
    parameters.swa_full = True  # the narrow cache of sliding windows is not rolled back rightly between prompts
    parameters.fit_params = False  # the context asked for, whatever memory seems free
    parameters.api_keys = [key]
    server = xllamacpp.Server(parameters)
    answer(answers, {"address": server.listening_address, "version": importlib.metadata.version("xllamacpp")})
    sys.stdin.buffer.read()


if __name__ == "__main__":
    _serve(**json.loads(sys.argv[1]))
