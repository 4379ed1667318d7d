"""Linear layers of the decoder: quantised ones as MatMulNBits, the head as a float product with its table.

Several weights over the same input become one node, row below row, when their layouts agree; the node's metadata names
them, their rows and their grid, so that the file can be read back without the artifact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from exporters.onnx.builder import MICROSOFT, GraphBuilder
from exporters.onnx.packing import Layout, Packed, layout_of, pack, stack
from exporters.onnx.tensors import TensorSource, onnx_dtype, to_numpy
from signround.files import canonical_json
from signround.plan import KeptTensor, LayerPlan

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

WEIGHTS_KEY = "signround.weights"  # node metadata: JSON list of [weight name, rows]
GRID_KEY = "signround.grid"  # node metadata: the grid as JSON


@dataclass(frozen=True)
class Accuracy:
    """accuracy_level of the nodes: `level` of all, 0 for down projections when these are to be `exact_down`.

    Their inputs hold the outliers of a gated feed-forward: with int8 activations (level 4) they alone make about half
    of the difference to float32 (measured on trained models of 4 and 26 million weights).
    """

    level: int
    exact_down: bool

    def of(self, layers: Sequence[LayerPlan]) -> int:
        return 0 if self.exact_down and layers[0].name.endswith("mlp.down_proj.weight") else self.level


@dataclass(frozen=True)
class FusedLinear:
    """One MatMulNBits node over one or several layers of the plan; all of one grid and one input."""

    layers: tuple[LayerPlan, ...]

    @property
    def layout(self) -> Layout:
        first = self.layers[0]
        return layout_of(first.grid, sum(layer.rows for layer in self.layers), first.columns)

    @property
    def metadata(self) -> dict[str, str]:
        return {
            WEIGHTS_KEY: canonical_json([[layer.name, layer.rows] for layer in self.layers]),
            GRID_KEY: canonical_json(self.layers[0].grid.to_json()),
        }


def can_fuse(layers: Sequence[LayerPlan], biases: Sequence[bool]) -> bool:
    """Whether one node can hold these layers: one grid, one input width, biases on all or none."""
    kinds = {(layer.grid, layer.columns, bias) for layer, bias in zip(layers, biases, strict=True)}
    return len(kinds) == 1


class LinearWriter:
    """Adds MatMulNBits nodes; keeps the arrays of the latest one, because B and scales are asked for in turn."""

    def __init__(self, builder: GraphBuilder, source: TensorSource, accuracy: Accuracy) -> None:
        self._builder = builder
        self._source = source
        self._accuracy = accuracy
        self._packed = lru_cache(maxsize=1)(self._pack)

    def _pack(self, linear: FusedLinear) -> Packed:
        return stack([pack(self._source.quantized(layer.name)) for layer in linear.layers])

    def _zero_points(self, linear: FusedLinear) -> NDArray[np.uint8]:
        zeros = self._packed(linear).zero_points
        assert zeros is not None
        return zeros

    def _biases(self, linear: FusedLinear) -> NDArray[np.float32]:
        parts = [self._source.tensor(bias_name(layer.name)).float() for layer in linear.layers]
        return np.concatenate([part.numpy() for part in parts])

    def add(self, name: str, value: ir.Value, layers: Sequence[LayerPlan], biased: bool) -> ir.Value:
        """value [.., columns] -> [.., rows of all layers]."""
        import onnx_ir as ir

        linear = FusedLinear(tuple(layers))
        layout = linear.layout
        lazy = self._builder.lazy
        scales = lazy(f"{name}.scales", ir.DataType.FLOAT, layout.scales_shape, lambda: self._packed(linear).scales)
        codes = lazy(f"{name}.codes", ir.DataType.UINT8, layout.codes_shape, lambda: self._packed(linear).codes)
        inputs: list[ir.Value | None] = [value, codes, scales]
        if layout.has_zero_points:
            inputs.append(
                lazy(
                    f"{name}.zero_points",
                    ir.DataType.UINT8,
                    layout.zero_points_shape,
                    lambda: self._zero_points(linear),
                )
            )
        if biased:
            inputs += [None] * (5 - len(inputs))
            inputs.append(lazy(f"{name}.bias", ir.DataType.FLOAT, (layout.rows,), lambda: self._biases(linear)))
        attributes = {
            "K": layout.columns,
            "N": layout.rows,
            "bits": layout.bits,
            "block_size": layout.block,
            "accuracy_level": self._accuracy.of(layers),
        }
        return self._builder.op(
            "MatMulNBits", name, inputs, domain=MICROSOFT, attributes=attributes, metadata=linear.metadata
        )[0]


class TableWriter:
    """Adds the unquantised tables: embedding and head, each stored once in the checkpoint's own dtype.

    16-bit tables are exact and half the size; a Cast follows. onnxruntime folds the head's Cast while it loads, and
    casts only the gathered rows of the embedding. Measured (50000 x 1024, onnxruntime 1.31): a FusedMatMul with transB
    on the shared table loads with one prepacked copy; Transpose + MatMul peaks at two.
    """

    def __init__(self, builder: GraphBuilder, source: TensorSource) -> None:
        self._builder = builder
        self._source = source

    def table(self, kept: KeptTensor) -> ir.Value:
        """The table [rows, columns] in its stored dtype; a second call gives the same constant."""
        if kept.name in self._builder.constants:
            return self._builder.constants[kept.name]
        dtype = onnx_dtype(kept.torch_dtype)
        return self._builder.lazy(kept.name, dtype, kept.shape, lambda: to_numpy(self._source.tensor(kept.name)))

    def gather(self, name: str, kept: KeptTensor, ids: ir.Value) -> ir.Value:
        """ids [batch, tokens] -> float32 [batch, tokens, columns]."""
        rows = self._builder.op("Gather", name, [self.table(kept), ids], attributes={"axis": 0})[0]
        return self._as_float(f"{name}.float", rows, kept)

    def product(self, name: str, value: ir.Value, kept: KeptTensor) -> ir.Value:
        """value [.., columns] -> [.., rows]."""
        table = self._as_float(f"{name}.float", self.table(kept), kept)
        attributes = {"transA": 0, "transB": 1, "alpha": 1.0}
        return self._builder.op("FusedMatMul", name, [value, table], domain=MICROSOFT, attributes=attributes)[0]

    def _as_float(self, name: str, value: ir.Value, kept: KeptTensor) -> ir.Value:
        import onnx_ir as ir

        if kept.torch_dtype == torch.float32:
            return value
        return self._builder.op("Cast", name, [value], attributes={"to": int(ir.DataType.FLOAT)})[0]


def bias_name(weight: str) -> str:
    return weight.removesuffix(".weight") + ".bias"
