"""Linear layers of the decoder: quantised ones as MatMulNBits, the head as a float product with its table.

Several weights over the same input become one node, row below row, when their layouts agree; the node's metadata names
them, their rows and their grid, so that the file can be read back without the artifact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.onnx.builder import MICROSOFT, GraphBuilder
from exporters.onnx.flavour import Flavour
from exporters.onnx.packing import Layout, Packed, layout_of, pack, stack
from exporters.onnx.tensors import TensorSource, floats, onnx_dtype, to_numpy
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

    def packed(self, linear: FusedLinear) -> Packed:
        """The arrays of a linear, whichever operators they are for."""
        return self._packed(linear)

    def bias(self, name: str, linear: FusedLinear) -> ir.Value:
        """The bias of a linear [rows]."""
        names, dtype = [bias_name(layer.name) for layer in linear.layers], self._builder.float_type

        def read() -> NDArray[Any]:
            return np.concatenate([floats(bias, self._source.tensor(bias), dtype) for bias in names])

        return self._builder.lazy(f"{name}.bias", dtype, (linear.layout.rows,), read)

    def add(self, name: str, value: ir.Value, layers: Sequence[LayerPlan], biased: bool) -> ir.Value:
        """value [.., columns] -> [.., rows of all layers]."""
        import onnx_ir as ir

        linear = FusedLinear(tuple(layers))
        layout = linear.layout
        lazy = self._builder.lazy
        dtype = self._builder.float_type
        scales = lazy(
            f"{name}.scales", dtype, layout.scales_shape, lambda: self._packed(linear).scales.astype(dtype.numpy())
        )
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
            inputs.append(self.bias(name, linear))
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
    casts only the gathered rows of the embedding. A graph that computes in fp16 holds fp16 tables: its runtimes know
    no bfloat16.
    """

    def __init__(self, builder: GraphBuilder, source: TensorSource, flavour: Flavour) -> None:
        self._builder = builder
        self._source = source
        self._flavour = flavour

    def table(self, kept: KeptTensor) -> ir.Value:
        """The table [rows, columns] in its stored dtype; a second call gives the same constant."""
        if kept.name in self._builder.constants:
            return self._builder.constants[kept.name]
        dtype = self._stored(kept)

        def read() -> NDArray[Any]:
            tensor = self._source.tensor(kept.name)
            return to_numpy(tensor) if dtype == onnx_dtype(kept.torch_dtype) else floats(kept.name, tensor, dtype)

        return self._builder.lazy(kept.name, dtype, kept.shape, read)

    def gather(self, name: str, kept: KeptTensor, ids: ir.Value) -> ir.Value:
        """ids [batch, tokens] -> [batch, tokens, columns]."""
        rows = self._builder.op("Gather", name, [self.table(kept), ids], attributes={"axis": 0})[0]
        return self._as_float(f"{name}.float", rows, kept)

    def product(self, name: str, value: ir.Value, kept: KeptTensor) -> ir.Value:
        """value [.., columns] -> [.., rows]."""
        table = self._as_float(f"{name}.float", self.table(kept), kept)
        return self._flavour.table_product(name, value, table, kept.shape[0])

    def _stored(self, kept: KeptTensor) -> ir.DataType:
        import onnx_ir as ir

        half = self._builder.float_type == ir.DataType.FLOAT16
        return ir.DataType.FLOAT16 if half else onnx_dtype(kept.torch_dtype)

    def _as_float(self, name: str, value: ir.Value, kept: KeptTensor) -> ir.Value:
        dtype = self._builder.float_type
        if self._stored(kept) == dtype:
            return value
        return self._builder.op("Cast", name, [value], attributes={"to": int(dtype)})[0]


def bias_name(weight: str) -> str:
    return weight.removesuffix(".weight") + ".bias"
