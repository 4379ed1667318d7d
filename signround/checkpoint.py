"""SourceCheckpoint: a Hugging Face folder, read one tensor at a time. Refuses what it cannot read safely."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signround.errors import Refusal, RefusedError, refuse
from signround.files import sha256_of

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
CARD = "README.md"  # licence and base model, for exporters; not part of what the model is


def additional_templates(folder: Path) -> list[Path]:
    """Chat templates with a name of their own, as transformers saves them."""
    return sorted((folder / "additional_chat_templates").glob("*.jinja"))


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SourceCheckpoint:
    """A local Hugging Face folder with safetensors weights (one file or shards).

    Raises RefusedError at birth for a missing folder or config.json, pickle weights, or damaged safetensors.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            found = "it is a file" if self.folder.exists() else "it does not exist"
            raise refuse(
                f"a model folder is needed, but {found}",
                "give the path of a Hugging Face folder with config.json and *.safetensors",
                str(folder),
            )
        self.config = self._read_config()
        self.tensors = self._read_index()

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        if not path.is_file():
            raise refuse(
                "the folder has no config.json",
                "give the folder of a Hugging Face causal language model",
                str(self.folder),
            )
        try:
            config = json.loads(path.read_text())
        except (ValueError, UnicodeDecodeError) as error:
            raise refuse(f"not valid JSON ({error})", "download the file again", str(path)) from error
        if not isinstance(config, dict):
            raise refuse("must hold a JSON object", "download the file again", str(path))
        return config

    def _read_index(self) -> dict[str, TensorInfo]:
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern)]
            if pickles:
                raise refuse(
                    f"the weights are pickle files ({', '.join(sorted(pickles)[:3])}), which can run code when loaded; "
                    "only safetensors are read",
                    "convert them once with `model.save_pretrained(folder, safe_serialization=True)`",
                    str(self.folder),
                )
            raise refuse(
                "the folder has no *.safetensors file",
                "download the weights into it",
                str(self.folder),
            )
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            files = self._shards(index)
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            tensors |= _read_header(file)
        return tensors

    def _shards(self, index: Path) -> list[Path]:
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if not all(isinstance(name, str) for name in names):
                raise ValueError("a shard name is not a string")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise refuse("not a valid shard index", "download the file again", str(index)) from error
        bad = [name for name in names if Path(name).name != name]
        if bad:
            raise refuse(f"shard name {bad[0]!r} leaves the folder", "do not use this checkpoint", str(index))
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise refuse(
                f"{len(missing)} of {len(names)} shards are missing ({missing[0]}, ...)",
                "download the missing files",
                str(self.folder),
            )
        return [self.folder / name for name in names]

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype, copied: nothing of the file stays mapped."""
        from safetensors import safe_open

        with safe_open(self.tensors[name].file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor

    @property
    def files(self) -> list[Path]:
        """Config, tokenizer files, named chat templates in their folder, and model card: what an artifact carries."""
        names = ("config.json", *TOKENIZER_FILES, CARD)
        found = [self.folder / name for name in names if (self.folder / name).is_file()]
        return found + additional_templates(self.folder)

    @cached_property
    def sha256(self) -> str:
        """One hash over config, tokenizer and weight files, names included; independent of the folder's place."""
        weights = sorted({info.file for info in self.tensors.values()})
        described = [path for path in self.files if path.name != CARD]
        digest = hashlib.sha256()
        for path in sorted([*described, *weights], key=lambda path: path.name):
            digest.update(f"{path.name}:{sha256_of(path)}\n".encode())
        return digest.hexdigest()

    @property
    def parameters(self) -> int:
        return sum(math.prod(info.shape) for info in self.tensors.values())

    def non_finite(self) -> list[Refusal]:
        """One refusal for each tensor that holds NaN or Inf; reads every weight once, one tensor resident."""
        return [
            Refusal(
                "the weight holds NaN or Inf",
                "restore the tensor from the model's publisher; a model with such weights cannot be quantised",
                name,
            )
            for name in self.tensors
            if not bool(torch.isfinite(self.read(name)).all())
        ]


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensor table of one safetensors file. The library checks the layout; we add dtypes and a sentence."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise refuse(
            f"not a whole safetensors file ({str(error).splitlines()[0]})",
            "download the file again",
            str(file),
        ) from error
    header.pop("__metadata__", None)
    unknown = {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] not in DTYPES}
    if unknown:
        raise RefusedError(
            [
                Refusal(
                    f"dtype {dtype} is not supported; allowed are {', '.join(DTYPES)}",
                    "start from the original float checkpoint",
                    name,
                )
                for name, dtype in unknown.items()
            ]
        )
    return {name: TensorInfo(file, tuple(entry["shape"]), DTYPES[entry["dtype"]]) for name, entry in header.items()}
