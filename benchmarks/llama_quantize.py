"""llama.cpp's own quantiser, as its users run it: an importance matrix over a text, then `llama_model_quantize`.

Needs llama-cpp-python for the second. The importance matrix is what `llama-imatrix` collects (the squares of each
linear's inputs over chunks of a text, each starting with BOS where the model has one), computed by transformers on the
float model; heads are left out, as `llama-imatrix` does unless told otherwise.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters.gguf.container import GgufFile
from exporters.gguf.imatrix import Imatrix
from exporters.gguf.layout import TYPE_BYTES
from signround.calibration import file_pieces, load_tokenizer, text_tokens
from signround.gguf_names import gguf_name
from signround.importance import InputSquares

# llama_ftype of include/llama.h
FILE_TYPES = {
    "q2_k": 10, "q2_k_s": 21, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16,
    "q5_k_m": 17, "q6_k": 18, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q8_0": 7, "iq4_nl": 25, "iq4_xs": 30,
    "mxfp4": 38, "q2_0": 41, "f16": 1,
}  # fmt: skip


def chunks_of(model: Path, text: Path, chunks: int, context: int, bos: int | None) -> Tensor:
    """int64 [chunks, context]: the beginning of the text, each chunk's first token replaced by BOS where there is one,
    as `llama-imatrix` cuts it."""
    tokens = text_tokens(load_tokenizer(model), file_pieces(text))
    count = min(chunks, len(tokens) // context)
    windows = tokens[: count * context].view(count, context).clone()
    if bos is not None:
        windows[:, 0] = bos
    return windows


def bos_of(float_file: Path) -> int | None:
    """The BOS token of a .gguf file, None where texts do not begin with one."""
    values = GgufFile(float_file, TYPE_BYTES).values
    return values["tokenizer.ggml.bos_token_id"] if values.get("tokenizer.ggml.add_bos_token") else None


def collect_importance(model: Path, windows: Tensor, dataset: str, batch: int = 8) -> Imatrix:
    """Sums of squares of the inputs of every linear within the blocks, in float64, over all tokens of `windows`."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    sums: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            sums[name] = torch.zeros(module.in_features, dtype=torch.float64)

            def add(module: torch.nn.Module, inputs: tuple[Tensor, ...], total: Tensor = sums[name]) -> None:
                total += inputs[0].flatten(0, -2).double().square().sum(0)

            module.register_forward_pre_hook(add)
    with torch.inference_mode():
        for part in windows.split(batch):
            network.model(part)
    count = torch.tensor([windows.numel()])
    squares = {
        gguf_name(f"{name}.weight"): InputSquares(total.float()[None], count.clone()) for name, total in sums.items()
    }
    return Imatrix(squares, (dataset,), len(windows), windows.shape[1])


def quantize(
    source: Path, target: Path, file_type: str, imatrix: Imatrix | None, types: Mapping[str, int] | None = None
) -> None:
    """`llama-quantize --imatrix ... SOURCE TARGET TYPE`. `types` (tensor name -> ggml type id) overrides its own mix.

    Raises RuntimeError with llama.cpp's last words.
    """
    import llama_cpp

    log: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda level, text, data: log.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FILE_TYPES[file_type], 1
    kept = [_importance_of(settings, imatrix), _overrides_of(settings, types)]  # llama.cpp holds pointers only
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))
    assert kept
    llama_cpp.llama_log_set(ctypes.cast(None, llama_cpp.llama_log_callback), ctypes.c_void_p(0))
    if status != 0:
        raise RuntimeError("".join(log).strip().splitlines()[-1])


def _importance_of(settings: Any, imatrix: Imatrix | None) -> Any:
    import llama_cpp

    if imatrix is None:
        return None
    means = {name: squares.means().flatten().contiguous() for name, squares in imatrix.entries.items()}
    rows = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()  # the empty one ends it
    for row, (name, values) in zip(rows, means.items(), strict=False):
        row.name, row.size = name.encode(), values.numel()
        row.data = ctypes.cast(values.data_ptr(), ctypes.POINTER(ctypes.c_float))
    settings.imatrix = rows
    return rows, means


def _overrides_of(settings: Any, types: Mapping[str, int] | None) -> Any:
    import llama_cpp

    if not types:
        return None
    rows = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
    for row, (name, code) in zip(rows, types.items(), strict=False):
        row.pattern, row.type = f"^{name.replace('.', '[.]')}$".encode(), code
    settings.tt_overrides = rows
    settings.token_embedding_type = types.get("token_embd.weight", settings.token_embedding_type)
    settings.output_tensor_type = types.get("output.weight", settings.output_tensor_type)
    return rows
