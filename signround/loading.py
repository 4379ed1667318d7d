"""Whole models in memory, for use and study: the library itself streams block by block (`signround.blocks`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signround.architecture import EMBEDDING, HEAD
from signround.artifact import QuantizedCheckpoint
from signround.experts import stacked


def load(artifact: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The tuned model of an artifact as a transformers `PreTrainedModel` in eval mode; its linears hold exactly the
    decoded weights (exact in float32).

    Raises RefusedError when `artifact` is not a finished artifact.
    """
    checkpoint = QuantizedCheckpoint(artifact)
    names = [*checkpoint.layers, *checkpoint.kept]
    return whole_model(checkpoint.folder / "model", names, lambda name: checkpoint.weight(name).to(dtype), dtype)


def whole_model(folder: Path, names: Iterable[str], read: Callable[[str], Tensor], dtype: torch.dtype) -> Any:
    """The model described by `folder`/config.json, filled with `read(name)` of every name; tied heads follow the
    embedding."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    weights = stacked(names, read, shapes, dtype)
    if config.tie_word_embeddings:
        weights[HEAD] = weights[EMBEDDING]
    model.load_state_dict(weights, assign=True, strict=True)
    model.tie_weights()
    _compute_buffers(model, config, dtype)
    return model.eval()


def _compute_buffers(model: Any, config: Any, dtype: torch.dtype) -> None:
    """Tables that are in no checkpoint were on the meta device too."""
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            assert name == "model.embed_tokens.embed_scale", f"{name} is not known"
            model.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5, dtype=dtype)
