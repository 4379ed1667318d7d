"""Every tensor of a GPTQ folder as a reader that is not ours decodes it.

gptqmodel's torch kernel when it is installed: it unpacks, shifts the zero points and multiplies, for 2, 3, 4 and 8
bits, v1 and v2. Else the GPTQ loader of the onnxruntime-genai builder (extra `genai`), which knows neither 3 bits nor
v2, nor all families; it gives ONNX-ordered integers, zero points and scales. Both run in a child process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from signround.errors import unavailable
from signround.exporting import ExportedModel
from signround.runtimes.gptq import (
    BUILDER_BITS,
    BUILDER_FAMILIES,
    BUILDER_LOADERS,
    LOADERS,
    start_builder_child,
    start_gptq_child,
)
from signround.runtimes.gptq_child import Child

from .config import V1, GptqFormat
from .packing import PARTS

WEIGHT = ".weight"


def decoded_by_other_reader(exported: ExportedModel, gptq: GptqFormat) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, float32). Raises UnavailableError that names the extra to install when no reader is there."""
    if all(find_spec(name) for name in LOADERS):
        return decoded_by_gptqmodel(exported, gptq)
    family = json.loads((exported.target / "config.json").read_text())["model_type"]
    known = gptq.bits in BUILDER_BITS and gptq.checkpoint_format == V1 and family in BUILDER_FAMILIES
    if known and all(find_spec(name) for name in BUILDER_LOADERS):
        return decoded_by_builder(exported)
    raise unavailable(
        f"no independent reader of {gptq.bits}-bit {gptq.checkpoint_format} files of {family} models is installed",
        "install one with `pip install signround[gptq]`",
        "gptq",
    )


def decoded_by_gptqmodel(
    exported: ExportedModel, gptq: GptqFormat, running: Child | None = None
) -> Iterator[tuple[str, Tensor]]:
    """One linear at a time through `TorchLinear.dequantize_weight`, in a `running` worker or a new one."""
    folder = str(exported.target.resolve())
    with nullcontext(running) if running else start_gptq_child() as child:
        files = child.ask({"do": "tensors", "folder": folder})[0]["tensors"]
        suffix = f".{PARTS[0]}"
        modules = [name.removesuffix(suffix) for name in files if name.endswith(suffix)]
        for module in modules:
            where = {"folder": folder, "file": files[f"{module}{suffix}"], "module": module}
            _, (weight,) = child.ask({"do": "decode", **where, "format": gptq.to_json()})
            yield module + WEIGHT, torch.from_numpy(weight)
        packed = {f"{module}.{part}" for module in modules for part in PARTS}
        for name in [name for name in files if name not in packed]:
            _, (tensor,) = child.ask({"do": "tensor", "folder": folder, "file": files[name], "name": name})
            yield name, torch.from_numpy(tensor)


def decoded_by_builder(exported: ExportedModel, running: Child | None = None) -> Iterator[tuple[str, Tensor]]:
    """The whole folder through the builder's loader; its integers are multiplied here: scale * (code - zero point)."""
    with nullcontext(running) if running else start_builder_child() as child:
        names = child.ask({"do": "open", "folder": str(exported.target.resolve())})[0]
        for name in names["linears"]:
            _, (codes, scales, zeros) = child.ask({"do": "linear", "name": name})
            step = torch.from_numpy(scales).float().unsqueeze(-1)
            level = torch.from_numpy(codes).float() - torch.from_numpy(zeros).float().unsqueeze(-1)
            yield name, (step * level).flatten(1)
        for name in names["kept"]:
            _, (tensor,) = child.ask({"do": "kept", "name": name})
            yield name, torch.from_numpy(tensor)
