"""What every room of the decoder graph works with: the builder, the flavour, and weights by their checkpoint names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from exporters.onnx.builder import GraphBuilder
from exporters.onnx.dequantize import DequantizeWriter
from exporters.onnx.experts import ExpertWriter
from exporters.onnx.flavour import Flavour
from exporters.onnx.form import GraphForm
from exporters.onnx.linear import LinearWriter, TableWriter, bias_name, can_fuse
from exporters.onnx.tensors import TensorSource, floats
from signround.plan import KeptTensor, LayerPlan, ModelPlan

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray


class DecoderParts:
    """One graph in the making."""

    def __init__(self, plan: ModelPlan, source: TensorSource, form: GraphForm) -> None:
        self.plan = plan
        self.architecture = plan.architecture
        self.builder = GraphBuilder(form.float_type)
        self.flavour: Flavour = form.operators(self.builder, self.architecture)
        self.packer = LinearWriter(self.builder, source, form.accuracy)
        self.linears = DequantizeWriter(self.builder, self.packer) if form.weights == "dequantize" else self.packer
        self.tables = TableWriter(self.builder, source, self.flavour)
        self.experts = ExpertWriter(self.builder, source, form.accuracy)
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
        weight, biased = f"{prefix}{linear}.weight", self.architecture.has_bias(linear)
        if weight in self.layers:
            return self.linears.add(f"{prefix}{linear}", value, [self.layers[weight]], biased)
        bias = self.kept[bias_name(weight)] if biased else None
        return self.tables.product(f"{prefix}{linear}", value, self.kept[weight], bias)

    def has(self, prefix: str, linear: str) -> bool:
        """Whether the model has this linear, quantised or not."""
        weight = f"{prefix}{linear}.weight"
        return weight in self.layers or weight in self.kept

    def together(self, prefix: str, linears: Sequence[str]) -> list[LayerPlan] | None:
        """These linears of a block as layers that one node can hold; None where it cannot."""
        weights = [f"{prefix}{linear}.weight" for linear in linears]
        layers = [self.layers[weight] for weight in weights if weight in self.layers]
        biases = [self.architecture.has_bias(linear) for linear in linears]
        return layers if len(layers) == len(linears) and can_fuse(layers, biases) else None

    def norm_weight(self, name: str) -> ir.Value:
        """What a norm multiplies by, in the graph's dtype: the operators compute in the dtype of their weight. Gemma's
        is the checkpoint's weight + 1, added once, in float32 as transformers adds it at each call."""
        added, dtype = norm_addend(self.plan), self.builder.float_type

        def read() -> NDArray[Any]:
            return floats(name, self._source.tensor(name).to(torch.float32) + added, dtype)

        return self.builder.lazy(name, dtype, self.kept[name].shape, read)


def norm_addend(plan: ModelPlan) -> float:
    """What is added to the weight of every norm: 1 in families that multiply by weight + 1."""
    return 1.0 if plan.architecture.family.norm_plus_one else 0.0
