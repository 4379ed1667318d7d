"""After the rounding, the scales: codes stay, and each stored fp16 scale or minimum is multiplied by a learned factor.

    minimise over f of one block:   || B(W, X) - B(decode(codes, fp16(f * fields)), X') ||^2,   f = 1 at first, Adam

While V learns, a scale that moves rounds its whole group anew, which sign steps cannot aim (docs/decisions.md); once
the codes are settled, the loss is smooth in what multiplies them. Direct scales learn (`Grid.direct`). Super-scales do
not, since one of them moves 256 weights and gains nothing (docs/decisions.md), nor do zero points and power-of-two
scales, which are integers. Not in the paper; AQLM (arXiv 2401.06118) tunes scales of settled codes by block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from signround.grid import grouped, half_through, ungrouped
from signround.qtensor import QuantizedTensor

EPSILON = 1e-16  # gradients are 1e-7 and less, each a share of one block's loss: Adam's usual 1e-8 is not small there


class ScaledLayer:
    """One linear whose codes are settled, on the tuning device. `factors`: float32, by the field that they multiply."""

    def __init__(self, tensor: QuantizedTensor, device: torch.device) -> None:
        self._tensor = tensor
        _, self._columns = tensor.shape
        self._codes = grouped(tensor.codes.to(device).float(), tensor.grid.group_of(self._columns))
        self._fields = {name: field.to(device) for name, field in tensor.fields.items()}
        self.factors = {
            name: torch.ones(field.shape, device=device, requires_grad=True)
            for name, field in self._fields.items()
            if field.dtype == torch.float16 and tensor.grid.direct
        }

    def decoded(self) -> Tensor:
        """The weight that the file will decode to, float32 [rows, columns], with gradients to the factors."""
        return ungrouped(self._tensor.grid.decode(self._codes, self._fields | self._stored()), self._columns)

    def frozen(self) -> QuantizedTensor:
        """The same codes with the scales for good."""
        with torch.no_grad():
            stored = {name: field.half().cpu() for name, field in self._stored().items()}
        return QuantizedTensor(self._tensor.grid, self._tensor.codes, {**self._tensor.fields, **stored})

    def _stored(self) -> dict[str, Tensor]:
        return {name: half_through(self._fields[name].float() * factor) for name, factor in self.factors.items()}


class ScaleDescent:
    """Adam on the factors of some layers, at least one of them direct, in steps of `rate` times what is left of the
    way."""

    def __init__(self, layers: Sequence[ScaledLayer], rate: float) -> None:
        self.parameters = [factor for layer in layers for factor in layer.factors.values()]
        self._rate = rate
        self._adam = torch.optim.Adam(self.parameters, lr=rate, eps=EPSILON)

    def step(self, gradients: Sequence[Tensor], left: float) -> None:
        """One update in place, without a look at any value on the host."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        for group in self._adam.param_groups:
            group["lr"] = self._rate * left
        self._adam.step()
