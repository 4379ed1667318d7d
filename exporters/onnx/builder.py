"""GraphBuilder: nodes and constants of an ONNX graph, put together one operator at a time.

Constants of any size are lazy: the graph is laid out from shapes alone, and each tensor is read when it is written.
It knows nothing of language models, and refuses (ValueError) to give two constants one name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.onnx.streamed import streamed_tensor

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    Attribute = int | float | str | Sequence[int]

MICROSOFT = "com.microsoft"
ATTRIBUTE_BYTES, METADATA_BYTES, CONSTANT_BYTES = 11, 9, 98  # around their texts, in protobuf


@dataclass(frozen=True)
class View:
    """A constant that is the bytes of another one, `of`, in another shape; it takes no room in the file."""

    value: ir.Value
    of: ir.Value


class GraphBuilder:
    """Collects inputs, outputs, nodes and constants; `model` puts them together. `views` become constants when the file
    is written (`data_files.py`): only then it is known where the bytes lie. `float_type` is what the graph computes in:
    of its activations, and of the constants that meet them."""

    def __init__(self, float_type: ir.DataType | None = None) -> None:
        import onnx_ir as ir

        self.float_type = ir.DataType.FLOAT if float_type is None else float_type
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.constants: dict[str, ir.Value] = {}
        self.views: list[View] = []

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """A graph input; strings are symbolic dimensions."""
        self.inputs.append(_value(name, dtype, shape))
        return self.inputs[-1]

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make `value` the graph output `name`."""
        import onnx_ir as ir

        value.name = name
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        self.outputs.append(value)

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A small constant that is there already; a second call with the same name gives the first one."""
        import onnx_ir as ir

        if name not in self.constants:
            tensor = ir.tensor(array, name=name)
            self.constants[name] = _value(name, tensor.dtype, array.shape)
            self.constants[name].const_value = tensor
        return self.constants[name]

    def number(self, value: float) -> ir.Value:
        """A scalar of `float_type`; equal numbers are one constant."""
        return self.constant(f"constant.{value!r}", np.array(value, self.float_type.numpy()))

    def lazy(self, name: str, dtype: ir.DataType, shape: Sequence[int], load: Callable[[], NDArray[Any]]) -> ir.Value:
        """A constant whose array is asked for only while the file is written, and forgotten afterwards: one piece."""

        def read() -> Iterator[NDArray[Any]]:
            array = load()
            if array.shape != tuple(shape):
                raise ValueError(f"{name} must have shape {tuple(shape)}, got {array.shape}")
            yield array

        return self.streamed(name, dtype, shape, read)

    def streamed(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], pieces: Callable[[], Iterator[NDArray[Any]]]
    ) -> ir.Value:
        """A lazy constant of which one piece is in memory at a time: arrays that follow each other along axis 0."""
        if name in self.constants:
            raise ValueError(f"constant {name} exists already")
        self.constants[name] = _value(name, dtype, shape)
        self.constants[name].const_value = streamed_tensor(name, dtype, shape, pieces)
        return self.constants[name]

    def view(self, name: str, of: ir.Value, shape: Sequence[int]) -> ir.Value:
        """The constant `of` in another shape of as many elements: a second name for the same bytes of the file."""
        import onnx_ir as ir

        assert of.const_value is not None
        value = ir.Value(name=name, type=ir.TensorType(of.const_value.dtype), shape=ir.Shape(shape))
        self.views.append(View(value, of))
        return value

    def op(
        self,
        kind: str,
        name: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        outputs: int = 1,
        unused: Sequence[int] = (),
        attributes: Mapping[str, Attribute] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> list[ir.Value]:
        """Add a node and give its outputs, those at the places `unused` left out."""
        import onnx_ir as ir

        values = [ir.Value(name="" if index in unused else f"{name}.{index}") for index in range(outputs)]
        node = ir.node(
            kind,
            list(inputs),
            dict(attributes or {}),
            domain=domain,
            outputs=values,
            name=name,
            metadata_props=dict(metadata or {}),
        )
        self.nodes.append(node)
        return [value for index, value in enumerate(values) if index not in unused]

    def graph_bytes(self) -> int:
        """About what nodes and names take in the file: protobuf spends two or three bytes around each text."""
        nodes = sum(
            sum(len(text or "") + 3 for text in (node.name, node.op_type, node.domain))
            + sum(len(value.name or "") + 2 for value in [*node.inputs, *node.outputs] if value is not None)
            + sum(len(key) + ATTRIBUTE_BYTES for key in node.attributes)
            + sum(len(key) + len(value) + METADATA_BYTES for key, value in node.metadata_props.items())
            for node in self.nodes
        )
        return nodes + sum(len(name) + CONSTANT_BYTES for name in self.constants)

    def model(self, name: str, opset: int, ir_version: int, producer: str, version: str) -> ir.Model:
        """The finished model. Constants of odd byte length come last, so that all floats lie on 4-byte offsets."""
        import onnx_ir as ir

        constants = sorted(self.constants.values(), key=_byte_count_is_odd)
        domains = {MICROSOFT: 1} if any(node.domain == MICROSOFT for node in self.nodes) else {}
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=constants,
            opset_imports={"": opset, **domains},
            name=name,
        )
        return ir.Model(graph, ir_version=ir_version, producer_name=producer, producer_version=version)


def _byte_count_is_odd(value: ir.Value) -> bool:
    assert value.const_value is not None
    return value.const_value.nbytes % 4 != 0


def _value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    import onnx_ir as ir

    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
