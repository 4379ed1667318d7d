"""Feeding an exported decoder piece by piece in raw onnxruntime: prompts, chunks, single tokens, padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Stepper:
    """One conversation, or several side by side; keys and values grow from call to call."""

    session: Any
    cache: dict[str, Any] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    width: int = 0

    def feed(self, ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Logits of `ids` int64 [rows, tokens] after all that was fed before; row i has `lengths[i]` tokens, and then
        padding."""
        rows, tokens = ids.shape
        if not self.cache:
            shapes = {value.name: value.shape for value in self.session.get_inputs() if value.name.startswith("past")}
            types = {value.name: value.type for value in self.session.get_inputs()}
            self.cache = {
                name: np.zeros((rows, shape[1], 0, shape[3]), np.float16 if "float16" in types[name] else np.float32)
                for name, shape in shapes.items()
            }
            self.lengths = [0] * rows
        new = [tokens] * rows if lengths is None else list(lengths)
        self.lengths = [old + more for old, more in zip(self.lengths, new, strict=True)]
        self.width += tokens
        mask = np.arange(self.width)[None, :] < np.array(self.lengths)[:, None]
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask.astype(np.int64), **self.cache}
        names = [value.name for value in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(None, feeds), strict=True))
        self.cache = {name: found[name.replace("past_key_values", "present")] for name in self.cache}
        return torch.from_numpy(found["logits"]).float()


def stepper(folder: Path) -> Stepper:
    """A fresh conversation with the graph in `folder`, as it was written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = str(folder / "model.onnx")
    return Stepper(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))


def tokens_of(count: int, tokens: int) -> Tensor:
    """int64 [count, tokens] for vocabularies of 512, the same at each call."""
    return torch.randint(512, (count, tokens), generator=torch.Generator().manual_seed(tokens))
