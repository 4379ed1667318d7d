"""An artifact as an ordinary transformers model, with the decoded weights in place of the quantised ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from signround.architecture import EMBEDDING, HEAD
from signround.artifact import QuantizedCheckpoint


def load(artifact: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """A `PreTrainedModel` in eval mode whose linears hold exactly the tuned weights (exact in float32).

    The whole model is in memory: this is for use and study; the library itself streams (`signround.blocks`).
    Raises RefusedError when `artifact` is not a finished artifact.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = QuantizedCheckpoint(artifact)
    config = AutoConfig.from_pretrained(checkpoint.folder / "model", local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = {name: checkpoint.weight(name).to(dtype) for name in [*checkpoint.layers, *checkpoint.kept]}
    if checkpoint.plan.architecture.tied:
        weights[HEAD] = weights[EMBEDDING]
    model.load_state_dict(weights, assign=True, strict=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval()
