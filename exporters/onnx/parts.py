"""What every room of the decoder graph works with: the builder, the flavour, and weights by their checkpoint names."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from exporters.onnx.builder import GraphBuilder
from exporters.onnx.contrib import ContribFlavour
from exporters.onnx.flavour import Flavour
from exporters.onnx.linear import Accuracy, LinearWriter, TableWriter
from exporters.onnx.tensors import TensorSource
from signround.plan import KeptTensor, LayerPlan, ModelPlan

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray


class DecoderParts:
    """One graph in the making."""

    def __init__(self, plan: ModelPlan, source: TensorSource, accuracy: Accuracy) -> None:
        self.plan = plan
        self.architecture = plan.architecture
        self.builder = GraphBuilder()
        self.flavour: Flavour = ContribFlavour(self.builder, self.architecture)
        self.linears = LinearWriter(self.builder, source, accuracy)
        self.tables = TableWriter(self.builder, source)
        self._source = source

    @cached_property
    def layers(self) -> dict[str, LayerPlan]:
        """Quantised matrices by name."""
        return {layer.name: layer for layer in self.plan.layers()}

    @cached_property
    def kept(self) -> dict[str, KeptTensor]:
        """Unquantised tensors by name."""
        return {kept.name: kept for kept in self.plan.kept()}

    def linear(self, prefix: str, linear: str, value: ir.Value) -> ir.Value:
        """value [.., columns] -> [.., rows] through one linear of a block, such as `mlp.down_proj`."""
        layer = self.layers[f"{prefix}{linear}.weight"]
        return self.linears.add(f"{prefix}{linear}", value, [layer], self.architecture.has_bias(linear))

    def norm_weight(self, name: str) -> ir.Value:
        """What a norm multiplies by, float32: the operators compute in the dtype of their weight. Gemma's is the
        checkpoint's weight + 1, added once, in float32 as transformers adds it at each call."""
        import onnx_ir as ir

        added = norm_addend(self.plan)

        def read() -> NDArray[np.float32]:
            return (self._source.tensor(name).to(torch.float32) + added).numpy()

        return self.builder.lazy(name, ir.DataType.FLOAT, self.kept[name].shape, read)


def norm_addend(plan: ModelPlan) -> float:
    """What is added to the weight of every norm: 1 in families that multiply by weight + 1."""
    return 1.0 if plan.architecture.family.norm_plus_one else 0.0
