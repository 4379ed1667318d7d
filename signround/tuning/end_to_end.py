"""All scales of the model together: Adam on every stored fp16 scale, against the logits of the float model.

Blocks are tuned one after the other against their own outputs; this last pass looks at what the whole model says. The
codes stay as they are. Each scale (and minimum, and super-scale) is multiplied by 1 + gamma and rounded to fp16
(straight through), gamma starts at 0:

    minimise over gamma:   KL(softmax(float logits) || softmax(quantised logits))   averaged over tokens

The idea is that of EfficientQAT's second phase (arXiv 2407.11062: end-to-end training of the step sizes alone), here
with the float model as the teacher. Measurements: docs/decisions.md.

One block is in memory at a time: the forward pass keeps each block's inputs for a batch, the backward pass goes through
the blocks in reverse and runs each again. The best point on the held-out samples wins, the start included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from signround.architecture import BLOCK, EMBEDDING
from signround.artifact import QuantizedCheckpoint
from signround.blocks import DecoderBlocks
from signround.grid import grouped, half_through, ungrouped
from signround.plan import BlockPlan, LayerPlan, ModelPlan

RATE = 2e-3  # of Adam, on gamma: a scale moves by about this part of itself a step
BETAS = (0.9, 0.95)
WARM_UP = 10  # steps
CHECKS = 4  # looks at the held-out samples after the first
LOGIT_BYTES = 1 << 28  # of the logits that are held at once


@dataclass(frozen=True)
class EndToEndOutcome:
    """`fields`: (weight name, field) -> fp16 values that differ from the artifact's; empty where nothing was better.
    The losses are mean KL on the held-out samples, in nats."""

    fields: Mapping[tuple[str, str], Tensor]
    loss_before: float
    loss_after: float


class EndToEnd:
    """`tokens` int64 [samples, seqlen]; `final` [samples, seqlen, hidden]: outputs of the last block of the float model
    for them, before the final norm. The last `held_out` samples are only looked at."""

    def __init__(
        self, plan: ModelPlan, artifact: QuantizedCheckpoint, blocks: DecoderBlocks, tokens: Tensor, final: Tensor
    ) -> None:
        self.plan, self.artifact, self.blocks = plan, artifact, blocks
        self.tokens, self.final = tokens, final
        self.gammas = {
            (layer.name, field): torch.zeros(shape, device=blocks.device, requires_grad=True)
            for block in plan.blocks
            for layer in block.layers
            for field, (shape, dtype) in layer.grid.layout(layer.rows, layer.columns).items()
            if dtype.is_floating_point
        }
        self.teacher = blocks.head()
        self.student = blocks.head(artifact.weight)

    def run(self, steps: int, batch: int, held_out: int, seed: int, on_step: Callable[[int], None]) -> EndToEndOutcome:
        """`steps` updates on batches of `batch` samples."""
        parameters = list(self.gammas.values())
        optimizer = torch.optim.Adam(parameters, lr=RATE, betas=BETAS)
        checks = {round(steps * check / CHECKS) for check in range(CHECKS + 1)}
        best = [parameter.detach().clone() for parameter in parameters]
        before = lowest = math.inf
        picks = self._picks(steps, batch, held_out, seed)
        for step in range(steps + 1):
            if step in checks:
                loss = self._held_out_loss(batch, held_out)
                if step == 0:
                    before = lowest = loss
                elif loss < lowest:
                    lowest, best = loss, [parameter.detach().clone() for parameter in parameters]
            on_step(step)
            if step == steps:
                break
            warm, falling = min(1.0, (step + 1) / WARM_UP), 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = RATE * warm * falling
            self._backward(picks[step])
            optimizer.step()
        with torch.no_grad():
            for parameter, kept in zip(parameters, best, strict=True):
                parameter.copy_(kept)
        return EndToEndOutcome(self._stored() if lowest < before else {}, before, lowest)

    def _picks(self, steps: int, batch: int, held_out: int, seed: int) -> Tensor:
        """int64 [steps, batch] samples to train on, from the seed alone."""
        generator = torch.Generator().manual_seed(seed * 100_003 + 77_777)
        training = len(self.tokens) - held_out
        rounds = [torch.randperm(training, generator=generator) for _ in range(-(-steps * batch // training))]
        return torch.cat(rounds)[: steps * batch].view(steps, batch)

    def _backward(self, picks: Tensor) -> None:
        """Gradients of every gamma for one batch, in `.grad`."""
        inputs = self._forward(picks)
        gradient = self._logits_gradient(inputs.pop(), picks)
        for plan, hidden in zip(reversed(self.plan.blocks), reversed(inputs), strict=True):
            hidden.requires_grad_(True)
            shell, weights = self._block(plan)
            gammas = [self.gammas[key] for key in self._keys(plan)]
            output = self.blocks.run(shell, hidden, plan.index, weights, fast=True)
            gradient, *found = torch.autograd.grad(
                output, [hidden, *gammas], gradient, allow_unused=True, materialize_grads=True
            )
            for gamma, part in zip(gammas, found, strict=True):
                gamma.grad = part

    def _forward(self, picks: Tensor) -> list[Tensor]:
        """The inputs of every block, and the outputs of the last."""
        embedding = self.artifact.weight(EMBEDDING) if self.plan.outer_layers else None
        states = [self.blocks.embed(self.tokens[picks], embedding).to(self.blocks.device)]
        with torch.no_grad():
            for plan in self.plan.blocks:
                shell, weights = self._block(plan)
                states.append(self.blocks.run(shell, states[-1], plan.index, weights, fast=True))
        return states

    def _logits_gradient(self, last: Tensor, picks: Tensor) -> Tensor:
        """d loss / d `last`, a few samples at a time."""
        gradients: list[Tensor] = []
        for hidden, targets in self._parts(last, picks):
            hidden.requires_grad_(True)
            loss = self._divergence(hidden, targets).sum() / (len(picks) * last.shape[1])
            gradients += torch.autograd.grad(loss, [hidden])
        return torch.cat(gradients)

    def _held_out_loss(self, batch: int, held_out: int) -> float:
        total = 0.0
        samples = torch.arange(len(self.tokens) - held_out, len(self.tokens))
        with torch.no_grad():
            for picks in torch.split(samples, batch):
                last = self._forward(picks)[-1]
                total += sum(self._divergence(*part).sum().item() for part in self._parts(last, picks))
        return total / (held_out * self.tokens.shape[1])

    def _parts(self, last: Tensor, picks: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Outputs of both models, in pieces whose logits fit LOGIT_BYTES."""
        samples = max(1, LOGIT_BYTES // (last.shape[1] * self.plan.architecture.vocabulary * 4))
        targets = self.final[picks.to(self.final.device)].to(self.blocks.device, torch.float32)
        return list(zip(torch.split(last.detach(), samples), torch.split(targets, samples), strict=True))

    def _divergence(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """KL of each token, [samples, tokens]."""
        with torch.no_grad():
            wanted = self.teacher(targets).log_softmax(-1)
        found = self.student(hidden).log_softmax(-1)
        return nn.functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1)

    def _block(self, plan: BlockPlan) -> tuple[nn.Module, dict[str, Tensor]]:
        """A block without linears, and its linears as the file would decode them now."""
        prefix = BLOCK.format(plan.index)
        weights = {layer.name.removeprefix(prefix): self._weight(layer) for layer in plan.layers}
        return self.blocks.shell(plan.index, weights), weights

    def _weight(self, layer: LayerPlan) -> Tensor:
        tensor = self.artifact.quantized(layer.name)
        device = self.blocks.device
        codes = grouped(tensor.codes.to(device).float(), layer.grid.group_of(layer.columns))
        fields = {name: field.to(device).float() for name, field in tensor.fields.items()}
        fields |= {name: self._moved(layer.name, name, field) for name, field in fields.items()}
        return ungrouped(layer.grid.decode(codes, fields), layer.columns)

    def _moved(self, name: str, field: str, value: Tensor) -> Tensor:
        gamma = self.gammas.get((name, field))
        return value if gamma is None else half_through(value * (1 + gamma))

    def _field(self, name: str, field: str) -> Tensor:
        return self.artifact.quantized(name).fields[field].to(self.blocks.device).float()

    def _keys(self, plan: BlockPlan) -> list[tuple[str, str]]:
        names = {layer.name for layer in plan.layers}
        return [key for key in self.gammas if key[0] in names]

    def _stored(self) -> dict[tuple[str, str], Tensor]:
        with torch.no_grad():
            return {
                (name, field): self._moved(name, field, self._field(name, field)).half().cpu()
                for name, field in self.gammas
            }
