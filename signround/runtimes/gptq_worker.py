"""The child process that runs GPTQ files as their users do: transformers + optimum + gptqmodel, on a CPU, in float32.

Started by `signround.runtimes.gptq` and by the exporter's independent check; speaks the protocol of `gptq_child`:

    load {folder, exact_products} -> {model, vocabulary, versions}      a model; any number at once
    logits {model}, [int64 windows] -> [float32 logits]
    unload {model}
    tensors {folder} -> {tensors: name -> file}                         names as the file has them
    decode {folder, file, module, format} -> [float32 [out, in]]        one linear through gptqmodel's torch kernel
    tensor {folder, file, name} -> [float32]                            one kept tensor
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from signround.runtimes.gptq_child import Array, Message, serve

BACKEND = "gptq_torch"


class Worker:
    """State of the child: the models that are loaded."""

    def __init__(self) -> None:
        self._models: dict[int, Any] = {}
        self._numbers = itertools.count()

    def answer(self, body: Mapping[str, Any], arrays: Sequence[Array]) -> Message:
        """Dispatch one request on its `do`."""
        match body["do"]:
            case "load":
                return self._load(Path(body["folder"]), body["exact_products"]), []
            case "logits":
                with torch.inference_mode():
                    logits = self._models[body["model"]](torch.from_numpy(arrays[0]), use_cache=False).logits
                return {}, [logits.float().numpy()]
            case "unload":
                del self._models[body["model"]]
                return {}, []
            case "tensors":
                return {"tensors": tensor_files(Path(body["folder"]))}, []
            case "decode":
                return {}, [decode(Path(body["folder"]) / body["file"], body["module"], body["format"])]
            case "tensor":
                return {}, [read(Path(body["folder"]) / body["file"], body["name"]).float().numpy()]
            case unknown:
                raise ValueError(f"unknown request {unknown!r}")

    def _load(self, folder: Path, exact_products: bool) -> dict[str, Any]:
        import json

        from transformers import AutoModelForCausalLM, GPTQConfig

        bits = json.loads((folder / "config.json").read_text())["quantization_config"]["bits"]
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            device_map="cpu",
            local_files_only=True,
            quantization_config=GPTQConfig(bits=bits, backend=BACKEND),
            output_loading_info=True,
        )
        wrong = {key: sorted(map(str, value)) for key, value in report.items() if value}
        if wrong:
            raise ValueError(f"transformers did not load every tensor: {wrong}")
        kernels = _kernels(model)
        if exact_products:
            for kernel in kernels:
                kernel.scales = kernel.scales.float()
        number = next(self._numbers)
        self._models[number] = model.eval()
        return {
            "model": number,
            "vocabulary": model.config.vocab_size,
            "linears": len(kernels),
            "scale_dtype": str(kernels[0].scales.dtype).removeprefix("torch."),
            "versions": {name: version(name) for name in ("transformers", "optimum", "gptqmodel")},
        }


def _kernels(model: torch.nn.Module) -> list[Any]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return [module for module in model.modules() if isinstance(module, TorchLinear)]


def tensor_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, as the safetensors library lists them."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    return found


def read(path: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor.clone()


def decode(path: Path, module: str, gptq: Mapping[str, Any]) -> Array:
    """float32 [out, in]: gptqmodel unpacks, shifts v1 zero points and multiplies. With float32 scales the product of an
    11-bit scale and an 8-bit integer is exact; with the fp16 scales of the file the kernel would round it to fp16."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    parts = {part: read(path, f"{module}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
    kernel = TorchLinear(
        bits=gptq["bits"],
        group_size=gptq["group_size"],
        sym=gptq["sym"],
        desc_act=gptq["desc_act"],
        in_features=parts["g_idx"].numel(),
        out_features=parts["scales"].shape[1],
    )
    kernel.qweight, kernel.qzeros, kernel.g_idx = parts["qweight"], parts["qzeros"], parts["g_idx"]
    kernel.scales = parts["scales"].float()
    if gptq["checkpoint_format"] == "gptq":
        convert_gptq_v1_to_v2_format_module(kernel, bits=gptq["bits"], pack_dtype=torch.int32)
    kernel.post_init()
    weight: Array = kernel.eval().dequantize_weight().T.contiguous().numpy()
    del kernel
    gc.collect(1)  # a kernel holds itself: some thirty of them would be in memory before anyone collects them
    return weight


if __name__ == "__main__":
    serve(Worker().answer)
