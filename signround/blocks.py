"""Decoder blocks one at a time: transformers' own modules, filled from any source of named tensors.

The forward pass is never rewritten here: what is tuned is what transformers runs (stacked experts excepted, which are
run one by one: `signround.experts`). Nothing here keeps a block: whoever asks for one holds it.
Attention is causal over whole windows; there is no padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from signround.architecture import BLOCK, EMBEDDING, FINAL_NORM, HEAD, Architecture, Scales, read_architecture
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
        self._skeleton = _skeleton(config, self.architecture)
        self._rotary = self._skeleton.rotary.to(self.device)

    def block(self, index: int) -> nn.Module:
        """Block `index` with the weights of the source, float32, in eval mode, no gradients."""
        prefix = BLOCK.format(index)
        names = [*self.architecture.block_linears(index), *self.architecture.block_kept(index)]
        weights = {module_name(name.removeprefix(prefix)): self._float(name) for name in names}
        block = self._skeleton.layer(index)
        block.load_state_dict(weights, assign=True, strict=True)
        return block.requires_grad_(False).eval()

    def parameter(self, block: nn.Module, name: str) -> nn.Parameter:
        """The parameter of `block` that checkpoint tensor `name` (within the block) fills."""
        return block.get_parameter(module_name(name))

    def linear(self, block: nn.Module, name: str) -> nn.Module:
        """The linear of `block` whose weight checkpoint tensor `name` (within the block) fills."""
        return block.get_submodule(module_name(name).removesuffix(".weight"))

    def embed(self, tokens: Tensor, weight: Tensor | None = None) -> Tensor:
        """int64 [windows, tokens] -> float32 [windows, tokens, hidden] on the CPU, by the embedding of the source or
        another one of its shape. Raises RefusedError for a token that the embedding does not have (tokenizers may know
        more tokens than the model was given rows)."""
        last = int(tokens.max())
        if last >= self.architecture.vocabulary:
            raise refuse(
                f"the text holds token {last}, the embedding has {self.architecture.vocabulary} rows",
                "check that tokenizer and weights belong together",
                EMBEDDING,
            )
        table = self.read(EMBEDDING) if weight is None else weight
        return nn.functional.embedding(tokens, table).float() * self.architecture.scales.embedding

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
            "position_embeddings": self._rotary(hidden, positions, **self._skeleton.rotary_arguments(index)),
        }
        with self.products(fast=fast):
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

    def final_norm(self) -> nn.Module:
        """The norm between the last block and the head, float32 on the device."""
        norm = copy.deepcopy(self._skeleton.norm)
        norm.load_state_dict({"weight": self._float(FINAL_NORM)}, assign=True)
        return norm.requires_grad_(False)

    def head(self) -> Head:
        """Final norm and head, float32 on the device."""
        weight = self._float(EMBEDDING if self.architecture.tied else HEAD)
        return Head(self.final_norm(), weight, self.architecture.scales)

    def products(self, *, fast: bool) -> Any:
        """A context in which matrix products run in `compute` if `fast`, else in float32."""
        if not fast or self.compute == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _float(self, name: str) -> Tensor:
        return self.read(name).to(self.device, torch.float32)

    def _mask(self, index: int, tokens: int) -> Tensor | None:
        """None is causal attention to sdpa; a sliding window needs the mask written out once it is narrower than the
        text, and eager attention always adds it to the scores."""
        window = self.architecture.windows[index]
        eager = self._skeleton.config._attn_implementation == "eager"
        if not eager and (window is None or tokens <= window):
            return None
        positions = torch.arange(tokens, device=self.device)
        distance = positions[:, None] - positions[None, :]
        seen = (distance >= 0) & (distance < (window or tokens))
        if not eager:
            return seen[None, None]
        return torch.zeros(1, 1, tokens, tokens, device=self.device).masked_fill_(~seen, torch.finfo(torch.float32).min)


@dataclass(frozen=True)
class Head:
    """What lies behind the last block: the final norm, and the head's `weight` float32 [vocabulary, hidden]."""

    norm: nn.Module
    weight: Tensor
    scales: Scales

    def __call__(self, hidden: Tensor) -> Tensor:
        """[windows, tokens, hidden], wherever it lies -> float32 logits [windows, tokens, vocabulary], no gradients."""
        with torch.no_grad():
            return self.logits(hidden.to(self.weight.device, torch.float32))

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [.., hidden] on the head's device -> logits [.., vocabulary]."""
        found = nn.functional.linear(self.norm(hidden), self.weight)
        if self.scales.logits != 1.0:
            found /= self.scales.logits
        return found if self.scales.logits_cap is None else capped(found, self.scales.logits_cap)


def capped(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap), in place as far as gradients allow."""
    bent = logits.div_(cap).tanh_()
    return bent * cap if bent.requires_grad else bent.mul_(cap)


@dataclass(frozen=True)
class _Skeleton:
    """What transformers builds from one configuration: its class of decoder layers, the final norm (no storage) and the
    rotary embedding (computed)."""

    config: Any
    layer_class: Callable[[Any, int], nn.Module]
    norm: nn.Module
    rotary: nn.Module
    local_rope: bool

    def layer(self, index: int) -> nn.Module:
        """Decoder layer `index` without storage; layers of one model may differ in windows and positions."""
        with torch.device("meta"):
            return apart(self.layer_class(self.config, index))

    def rotary_arguments(self, index: int) -> dict[str, str]:
        """What the rotary embedding wants to know of a block, where blocks differ."""
        return {"layer_type": self.config.layer_types[index]} if self.local_rope else {}


def _skeleton(config: Mapping[str, Any], architecture: Architecture) -> _Skeleton:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "auto_map")}
    whole = AutoConfig.for_model(config["model_type"], **copy.deepcopy(fields))
    one_layer = copy.deepcopy(whole)
    one_layer.num_hidden_layers = 1
    # sdpa has no place for a cap on the scores
    whole._attn_implementation = "sdpa" if architecture.scales.attention_cap is None else "eager"
    with torch.device("meta"):  # eager is what every class takes; this model is never run
        model = AutoModelForCausalLM.from_config(one_layer, dtype=torch.float32, attn_implementation="eager")
    rotary = type(model.model.rotary_emb)(config=whole)
    local = architecture.family.local_rope
    return _Skeleton(whole, type(model.model.layers[0]), model.model.norm, rotary, local)
