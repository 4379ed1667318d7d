"""Linear layers of the decoder: quantised ones as MatMulNBits, those that are kept as a float product; and the
embedding, float or quantised (GatherBlockQuantized).

Several weights over the same input become one node, row below row, when their layouts agree; the node's metadata names
them, their rows and their grid, so that the file can be read back without the artifact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.onnx.builder import MICROSOFT, GraphBuilder
from exporters.onnx.flavour import Flavour
from exporters.onnx.packing import Layout, Packed, empty, has_float_kernel, layout_of, pack
from exporters.onnx.tensors import TensorSource, floats, onnx_dtype, to_numpy
from signround.files import canonical_json
from signround.plan import KeptTensor, LayerPlan

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

WEIGHTS_KEY = "signround.weights"  # node metadata: JSON list of [weight name, rows]
GRID_KEY = "signround.grid"  # node metadata: the grid as JSON
COLUMNS_KEY = "signround.columns"  # node metadata of an embedding: its width without padding
DOWN = (".down_proj.weight", ".w2.weight")  # of a feed-forward network, of an expert
FAST_LEVEL = 4  # int8 activations
SLICE_WEIGHTS = 1 << 19  # weights of one matrix that are unpacked in memory at a time


@dataclass(frozen=True)
class Accuracy:
    """accuracy_level of the nodes: `level` of all; 0 for down projections when these are to be `exact_down`, where the
    kernel is fast; with `keep_fast` 4 where no other level is.

    The inputs of down projections hold the outliers of a gated feed-forward: with int8 activations (level 4) they
    alone make about half of the difference to float32 (measured on trained models of 4 and 26 million weights).
    """

    level: int
    exact_down: bool
    keep_fast: bool = False

    def of(self, layers: Sequence[LayerPlan]) -> int:
        if not has_float_kernel(layers[0].grid):
            return FAST_LEVEL if self.keep_fast else self.level
        return 0 if self.exact_down and is_down_projection(layers[0]) else self.level


def is_down_projection(layer: LayerPlan) -> bool:
    return layer.name.endswith(DOWN)


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


@dataclass(frozen=True)
class Constants:
    """The constant inputs of one weight in the graph."""

    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None


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
        """Slices of rows go straight to their places: unpacked codes are there for one slice only."""
        whole, first = empty(linear.layout), 0
        for layer in linear.layers:
            for rows in slices(layer.rows, layer.columns):
                part = pack(self._source.quantized(layer.name, rows))
                for array, piece in zip(whole.arrays(), part.arrays(), strict=True):
                    array[first + rows.start : first + rows.stop] = piece
            first += layer.rows
        return whole

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

    def _constants(self, name: str, linear: FusedLinear, *, flat: bool = False) -> Constants:
        """The constants called `name`, made at the first call. `flat`: codes as [rows, bytes a row]."""
        import onnx_ir as ir

        known, lazy, layout = self._builder.constants, self._builder.lazy, linear.layout
        if f"{name}.codes" in known:
            return Constants(known[f"{name}.codes"], known[f"{name}.scales"], known.get(f"{name}.zero_points"))
        shape = layout.flat_shape if flat else layout.codes_shape
        dtype = self._builder.float_type
        scales = lazy(
            f"{name}.scales", dtype, layout.scales_shape, lambda: self._packed(linear).scales.astype(dtype.numpy())
        )
        codes = lazy(f"{name}.codes", ir.DataType.UINT8, shape, lambda: self._packed(linear).codes.reshape(shape))
        zeros = None
        if layout.has_zero_points:
            zeros = lazy(
                f"{name}.zero_points", ir.DataType.UINT8, layout.zero_points_shape, lambda: self._zero_points(linear)
            )
        return Constants(codes, scales, zeros)

    def gather(self, name: str, layer: LayerPlan, ids: ir.Value, *, shared: bool) -> ir.Value:
        """ids [batch, tokens] -> float32 [batch, tokens, columns], decoded as in the product. `shared`: the constants
        are also those of a product (`add` with `constants=name`), which wants the codes in blocks: the same bytes of
        the file get a second shape, because a Reshape would be folded into a second table while the model is loaded."""
        linear = FusedLinear((layer,))
        layout = linear.layout
        constants = self._constants(name, linear, flat=not shared)
        codes = self._builder.view(f"{name}.rows", constants.codes, layout.flat_shape) if shared else constants.codes
        inputs = [codes, ids, constants.scales]
        if constants.zero_points is not None:
            inputs.append(constants.zero_points)
        attributes = {"bits": layout.bits, "block_size": layout.block, "gather_axis": 0, "quantize_axis": 1}
        metadata = {**linear.metadata, COLUMNS_KEY: str(layout.columns)}
        rows = self._builder.op(
            "GatherBlockQuantized", name, inputs, domain=MICROSOFT, attributes=attributes, metadata=metadata
        )[0]
        if layout.blocks * layout.block == layout.columns:
            return rows
        start, end, axis = (
            self._builder.constant(f"{name}.{part}", np.array([value], np.int64))
            for part, value in (("first", 0), ("columns", layout.columns), ("axis", -1))
        )
        return self._builder.op("Slice", f"{name}.unpadded", [rows, start, end, axis])[0]

    def add(
        self, name: str, value: ir.Value, layers: Sequence[LayerPlan], biased: bool, *, constants: str = ""
    ) -> ir.Value:
        """value [.., columns] -> [.., rows of all layers]. `constants`: what the weight is called if not `name`."""
        linear = FusedLinear(tuple(layers))
        layout = linear.layout
        weight = self._constants(constants or name, linear)
        inputs: list[ir.Value | None] = [value, weight.codes, weight.scales]
        if weight.zero_points is not None:
            inputs.append(weight.zero_points)
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
    """Adds the unquantised tables: embedding, head and linears that are kept, each stored once in the checkpoint's own
    dtype.

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

        def pieces() -> Iterator[NDArray[Any]]:
            for rows in slices(kept.shape[0], math.prod(kept.shape[1:])):
                tensor = self._source.tensor(kept.name, rows)
                as_stored = dtype == onnx_dtype(kept.torch_dtype)
                yield to_numpy(tensor) if as_stored else floats(kept.name, tensor, dtype)

        return self._builder.streamed(kept.name, dtype, kept.shape, pieces)

    def gather(self, name: str, kept: KeptTensor, ids: ir.Value) -> ir.Value:
        """ids [batch, tokens] -> [batch, tokens, columns]."""
        rows = self._builder.op("Gather", name, [self.table(kept), ids], attributes={"axis": 0})[0]
        return self._as_float(f"{name}.float", rows, kept)

    def product(self, name: str, value: ir.Value, kept: KeptTensor, bias: KeptTensor | None = None) -> ir.Value:
        """value [.., columns] -> [.., rows]."""
        table = self._as_float(f"{name}.float", self.table(kept), kept)
        product = self._flavour.table_product(name, value, table, (kept.shape[0], kept.shape[1]))
        if bias is None:
            return product
        addend = self._as_float(f"{name}.bias.float", self.table(bias), bias)
        return self._builder.op("Add", f"{name}.biased", [product, addend])[0]

    def _stored(self, kept: KeptTensor) -> ir.DataType:
        import onnx_ir as ir

        half = self._builder.float_type == ir.DataType.FLOAT16
        return ir.DataType.FLOAT16 if half else onnx_dtype(kept.torch_dtype)

    def _as_float(self, name: str, value: ir.Value, kept: KeptTensor) -> ir.Value:
        dtype = self._builder.float_type
        if self._stored(kept) == dtype:
            return value
        return self._builder.op("Cast", name, [value], attributes={"to": int(dtype)})[0]


def slices(rows: int, columns: int) -> Iterator[range]:
    """`rows` of `columns` weights, cut so that each slice has at most SLICE_WEIGHTS of them, or one row."""
    step = max(1, SLICE_WEIGHTS // columns)
    for start in range(0, rows, step):
        yield range(start, min(start + step, rows))


def bias_name(weight: str) -> str:
    return weight.removesuffix(".weight") + ".bias"
