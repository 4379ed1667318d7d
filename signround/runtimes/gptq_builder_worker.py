"""The child process that reads GPTQ files with the onnxruntime-genai builder, a reader that shares no code with ours.

Started by `signround.runtimes.gptq` and by the exporter's independent check; speaks the protocol of `gptq_child`:

    convert {folder, out, cache} -> {}                     an ONNX model in `out`, 2, 4 or 8 bits
    open {folder} -> {linears, kept}                       load the folder through the builder's GPTQ loader
    linear {name} -> [codes uint8 [out, G, g], scales fp16 [out, G], zeros uint8 [out, G]]
    kept {name} -> [float32]

The loader gives integers in ONNX Runtime's MatMulNBits order (block-wise rows, lowest bits first), with the minus one
of v1 zero points undone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signround.runtimes.gptq_child import Array, Message, serve

LINEARS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
# The head is int4-rounded by default, an embedding tied to it as well: both are left as they are.
EXCLUDED = ("/lm_head/MatMul", "/model/embed_tokens/Gather")


class Worker:
    """State of the child: the folder that is open."""

    def __init__(self) -> None:
        self._linears: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}

    def answer(self, body: Mapping[str, Any], arrays: Sequence[Array]) -> Message:
        """Dispatch one request on its `do`."""
        match body["do"]:
            case "convert":
                convert(Path(body["folder"]), Path(body["out"]), Path(body["cache"]))
                return {}, []
            case "open":
                self._open(Path(body["folder"]))
                return {"linears": list(self._linears), "kept": list(self._kept)}, []
            case "linear":
                return {}, unpacked(self._linears[body["name"]])
            case "kept":
                return {}, [self._kept[body["name"]].float().numpy()]
            case unknown:
                raise ValueError(f"unknown request {unknown!r}")

    def _open(self, folder: Path) -> None:
        from onnxruntime_genai.models.loaders.quant_model import QuantModel

        config = json.loads((folder / "config.json").read_text())
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        model = QuantModel.from_pretrained(
            "gptq",
            input_path=str(folder),
            quant_attrs={"config": config["quantization_config"], "use_g_idx": False},
            q_size=heads * head_dim,
            kv_size=(config.get("num_key_value_heads") or heads) * head_dim,
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
        )
        self._linears = {}
        self._kept = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.final_norm.weight}
        if not config.get("tie_word_embeddings", False):
            self._kept["lm_head.weight"] = model.lm_head.weight
        for layer in model.layers:
            self._add_layer(f"model.layers.{layer.layer_id}", layer)

    def _add_layer(self, prefix: str, layer: Any) -> None:
        norms = {
            "input_layernorm": layer.input_layernorm.weight,
            "post_attention_layernorm": layer.post_attention_layernorm.weight,
            "self_attn.q_norm": layer.self_attn.q_norm.weight,
            "self_attn.k_norm": layer.self_attn.k_norm.weight,
        }
        self._kept |= {f"{prefix}.{name}.weight": weight for name, weight in norms.items() if weight is not None}
        for part, names in LINEARS.items():
            for name in names:
                linear = getattr(getattr(layer, part), name)
                self._linears[f"{prefix}.{part}.{name}.weight"] = linear
                if linear.bias is not None:
                    self._kept[f"{prefix}.{part}.{name}.bias"] = linear.bias


def unpacked(linear: Any) -> list[Array]:
    """MatMulNBits order -> codes [out, G, g], scales [out, G], zero points [out, G]."""
    codes = fields(linear.qweight.numpy(), linear.bits)
    rows, groups = codes.shape[:2]
    zeros = fields(linear.qzeros.numpy().reshape(rows, -1), linear.bits)[:, :groups]
    return [codes, linear.scales.numpy().reshape(rows, groups), zeros]


def fields(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """uint8 [..., n] -> uint8 [..., n * 8 / bits], lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    spread: NDArray[np.uint8] = packed[..., None] >> shifts & np.uint8(2**bits - 1)
    return spread.reshape(*packed.shape[:-1], -1)


def convert(folder: Path, out: Path, cache: Path) -> None:
    """Let the builder write an ONNX decoder with float32 activations (accuracy level 0) and a float head."""
    from onnxruntime_genai.models import builder

    place = ("", str(folder), str(out), "int4", "cpu", str(cache))
    excluded = ",".join(EXCLUDED)
    options = ["hf_token=false", "accuracy_level=0", "shared_embeddings=false", f"nodes_to_exclude={excluded}"]
    builder.create_model(*place, **builder.parse_extra_options(*place, options))


if __name__ == "__main__":
    serve(Worker().answer)
