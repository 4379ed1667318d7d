"""Decoder blocks one at a time: transformers' own modules, filled from any source of named tensors.

The forward pass is never rewritten here: what is tuned is what transformers runs (stacked experts excepted, which are
run one by one: `signround.experts`). At no time is more than one block
(or the embedding, or the head) in memory. Attention is causal over whole windows; there is no padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from signround.architecture import BLOCK, EMBEDDING, FINAL_NORM, HEAD, Architecture, read_architecture
from signround.errors import refuse
from signround.experts import apart, module_name

ReadTensor = Callable[[str], Tensor]


class DecoderBlocks:
    """The skeleton of one model. `read` gives a tensor by its checkpoint name in any float dtype.

    Blocks are float32 on `device`, and so are targets, hidden states and chosen losses. Only the many steps of tuning
    run their matrix products in bfloat16 (`fast`, when `compute` is "bf16"), under autocast with a float32 residual
    stream: at 4 bits the noise of bfloat16 targets costs a tenth of what tuning gains (docs/decisions.md).
    """

    def __init__(self, config: Mapping[str, Any], read: ReadTensor, device: str = "cpu", compute: str = "fp32") -> None:
        self.architecture: Architecture = read_architecture(config)
        self.read = read
        self.device = torch.device(device)
        self.compute = compute
        self._template, self._norm, self._rotary = _skeleton(config)
        self._rotary = self._rotary.to(self.device)

    def block(self, index: int) -> nn.Module:
        """Block `index` with the weights of the source, float32, in eval mode, no gradients."""
        prefix = BLOCK.format(index)
        names = [*self.architecture.block_linears(index), *self.architecture.block_kept(index)]
        weights = {module_name(name.removeprefix(prefix)): self._float(name) for name in names}
        block = copy.deepcopy(self._template)
        block.load_state_dict(weights, assign=True, strict=True)
        return block.requires_grad_(False).eval()

    def parameter(self, block: nn.Module, name: str) -> nn.Parameter:
        """The parameter of `block` that checkpoint tensor `name` (within the block) fills."""
        return block.get_parameter(module_name(name))

    def linear(self, block: nn.Module, name: str) -> nn.Module:
        """The linear of `block` whose weight checkpoint tensor `name` (within the block) fills."""
        return block.get_submodule(module_name(name).removesuffix(".weight"))

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [windows, tokens] -> float32 [windows, tokens, hidden] on the CPU. Raises RefusedError for a token
        that the embedding does not have (tokenizers may know more tokens than the model was given rows)."""
        last = int(tokens.max())
        if last >= self.architecture.vocabulary:
            raise refuse(
                f"the text holds token {last}, the embedding has {self.architecture.vocabulary} rows",
                "check that tokenizer and weights belong together",
                EMBEDDING,
            )
        return nn.functional.embedding(tokens, self.read(EMBEDDING)).float()

    def run(
        self,
        block: nn.Module,
        hidden: Tensor,
        index: int,
        weights: Mapping[str, Tensor] | None = None,
        *,
        fast: bool = False,
    ) -> Tensor:
        """Forward of block `index` over float32 [windows, tokens, hidden] on the device; `weights` replace its
        parameters by their checkpoint names within the block (with gradients)."""
        tokens = hidden.shape[1]
        positions = torch.arange(tokens, device=hidden.device)[None]
        arguments = {
            "attention_mask": self._mask(index, tokens),
            "position_ids": positions,
            "position_embeddings": self._rotary(hidden, positions),
        }
        with self._autocast(fast):
            if weights is None:
                output = block(hidden, **arguments)
            else:
                named = {module_name(name): weight for name, weight in weights.items()}
                output = torch.func.functional_call(block, named, (hidden,), arguments)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result.float()

    def run_all(self, block: nn.Module, hidden: Tensor, index: int, batch: int = 8) -> None:
        """Replace `hidden` [windows, tokens, hidden], wherever it lies, by the block's outputs, in place."""
        with torch.no_grad():
            for start in range(0, len(hidden), batch):
                part = hidden[start : start + batch]
                part.copy_(self.run(block, part.to(self.device, torch.float32), index))

    def head(self) -> Callable[[Tensor], Tensor]:
        """Final norm and head: [windows, tokens, hidden] -> float32 logits [windows, tokens, vocabulary]."""
        norm = copy.deepcopy(self._norm)
        norm.load_state_dict({"weight": self._float(FINAL_NORM)}, assign=True)
        weight = self._float(EMBEDDING if self.architecture.tied else HEAD)

        def logits(hidden: Tensor) -> Tensor:
            with torch.no_grad():
                return nn.functional.linear(norm(hidden.to(self.device, torch.float32)), weight)

        return logits

    def _float(self, name: str) -> Tensor:
        return self.read(name).to(self.device, torch.float32)

    def _autocast(self, fast: bool) -> Any:
        if not fast or self.compute == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _mask(self, index: int, tokens: int) -> Tensor | None:
        """None is causal attention; a sliding window needs the mask written out once it is narrower than the text."""
        window = self.architecture.windows[index]
        if window is None or tokens <= window:
            return None
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
        return ((distance >= 0) & (distance < window)).to(self.device)[None, None]


def _skeleton(config: Mapping[str, Any]) -> tuple[nn.Module, nn.Module, nn.Module]:
    """One empty decoder layer and norm (no storage), and the rotary embedding (computed), of this configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "auto_map")}
    fields["num_hidden_layers"] = 1
    if fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:1]
    one_layer = AutoConfig.for_model(config["model_type"], **fields)
    one_layer._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(one_layer, dtype=torch.float32, attn_implementation="sdpa")
    rotary = type(model.model.rotary_emb)(config=one_layer)
    return apart(model.model.layers[0]), model.model.norm, rotary
