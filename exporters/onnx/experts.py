"""A mixture of experts as one QMoE node a block (com.microsoft 1), its router and shared expert around it.

Experts lie one after the other, each as in MatMulNBits (`packing`), rows and scales of gate and up in turn because the
CPU kernel knows no other order:

    fc1   [experts, 2 * intermediate, hidden * bits / 8]    row 2i of an expert: gate's row i; row 2i + 1: up's row i
    fc2   [experts, hidden, intermediate * bits / 8]        down

with scales float32 [experts, rows, columns / block], and zero points packed along the blocks. One block size holds for
both, and must divide every row. Measured on the CPU kernel of onnxruntime 1.31 (docs/decisions.md): 4 bits have a
float32 kernel; 8 bits compute with int8 activations at every level; 2 bits do so through lookup tables; 4 bits in one
stack and 8 in the other are not implemented.
Refuses 2 bits, experts of one block on different grids, and rows that no block divides. The node's metadata names the
weights and their grids. Source: schema of com.microsoft::QMoE; `accuracy_level` exists from onnxruntime 1.31 on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.onnx.builder import MICROSOFT
from exporters.onnx.linear import Accuracy
from exporters.onnx.packing import BLOCKS, CONTAINER, Layout, Packed, layout_of, pack
from exporters.onnx.tensors import TensorSource
from signround.architecture import BLOCK
from signround.errors import Refusal
from signround.files import canonical_json
from signround.plan import LayerPlan, ModelPlan

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from exporters.onnx.builder import GraphBuilder

OPERATOR = "QMoE"
EXPERTS_KEY = "signround.experts"  # node metadata: JSON list of [gate, up, down], weight names
GRIDS_KEY = "signround.grids"  # node metadata: JSON list of the grids of fc1 and fc2
BITS = (4, 8)
WHOLE_ROWS = 128
FC1, FC2 = ("fc1", "fc2")


@dataclass(frozen=True)
class ExpertStack:
    """One constant input of QMoE with its scales: `experts` holds, for each expert, the weights whose rows lie in turn
    (gate and up, or down alone)."""

    name: str
    experts: tuple[tuple[LayerPlan, ...], ...]
    block: int

    @property
    def layout(self) -> Layout:
        """Of one expert."""
        parts = self.experts[0]
        return layout_of(parts[0].grid, len(parts) * parts[0].rows, parts[0].columns, self.block)

    @property
    def codes_shape(self) -> tuple[int, int, int]:
        return len(self.experts), self.layout.rows, self.layout.blocks * self.layout.block * self.layout.bits // 8

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        return len(self.experts), *self.layout.scales_shape

    @property
    def zero_points_shape(self) -> tuple[int, int, int]:
        return len(self.experts), *self.layout.zero_points_shape


def stacks_of(layers: Sequence[Sequence[LayerPlan]], name: str) -> tuple[ExpertStack, ExpertStack]:
    """The two stacks of experts given as [gate, up, down] each; `expert_refusals` must have let them pass."""
    block = _common_block(tuple(layer for expert in layers for layer in expert))
    assert block is not None
    fc1 = ExpertStack(f"{name}.{FC1}", tuple((gate, up) for gate, up, _ in layers), block)
    return fc1, ExpertStack(f"{name}.{FC2}", tuple((down,) for *_, down in layers), block)


def expert_refusals(plan: ModelPlan) -> list[Refusal]:
    """Why QMoE cannot hold the experts of a plan; each reason once."""
    if plan.architecture.mixture is None:
        return []
    blocks = (expert_layers(plan, index) for index in range(plan.architecture.layers))
    return list(dict.fromkeys(refusal for experts in blocks for refusal in _block_refusals(experts)))


def _block_refusals(experts: Sequence[Sequence[LayerPlan]]) -> Iterator[Refusal]:
    if any(len(expert) < 3 for expert in experts):
        yield _refusal("some experts stay unquantised, and QMoE holds quantised ones alone")
        return
    every = tuple(layer for expert in experts for layer in expert)
    outer, inner = ({layer.grid for expert in experts for layer in expert[part]} for part in (slice(2), slice(2, 3)))
    for kind, grids in (("gate and up", outer), ("down", inner)):
        if len(grids) > 1:
            yield _refusal(f"the {kind} linears of a block's experts lie on {len(grids)} grids, QMoE has one")
    widths = {CONTAINER.get(grid.bits) for grid in outer | inner}
    if len(widths) > 1:
        yield _refusal("gate, up and down of a block's experts take fields of different widths, QMoE has one")
    if 2 in widths:
        yield _TWO_BITS
    if _common_block(every) is None:
        columns = " and ".join(map(str, sorted({layer.columns for layer in every})))
        yield _refusal(f"no block of {', '.join(map(str, BLOCKS))} divides the experts' groups and rows of {columns}")


def expert_notes(plan: ModelPlan) -> list[str]:
    """What users of a mixture should know."""
    if plan.architecture.mixture is None:
        return []
    notes = ["onnx: experts are one QMoE node a block; its accuracy_level needs onnxruntime 1.31 or later."]
    if any(CONTAINER.get(layer.grid.bits) == 8 for expert in expert_layers(plan, 0) for layer in expert):
        notes.append("onnx: onnxruntime computes 8-bit experts with int8 activations at every accuracy_level.")
    return notes


def expert_layers(plan: ModelPlan, index: int) -> list[list[LayerPlan]]:
    """[gate, up, down] of each expert of block `index`, as far as they are quantised."""
    mixture = plan.architecture.mixture
    assert mixture is not None
    layers = {layer.name: layer for layer in plan.blocks[index].layers}
    prefix = f"{BLOCK.format(index)}{mixture.names.module}.experts"
    names = [[f"{prefix}.{expert}.{part}.weight" for part in mixture.names.parts] for expert in range(mixture.experts)]
    return [[layers[name] for name in expert if name in layers] for expert in names]


def _refusal(problem: str) -> Refusal:
    return Refusal(problem, "choose a scheme of one grid such as w4g32, or export this model to gguf", "onnx")


_TWO_BITS = Refusal(
    "onnxruntime's QMoE computes experts of 2 bits with int8 lookup tables at every level, which cannot be checked",
    "choose 3, 4 or 8 bits, or export this model to gguf",
    "onnx",
)


def _common_block(layers: Sequence[LayerPlan]) -> int | None:
    """The largest block that divides every group and every row; for whole rows at most that of MatMulNBits."""
    sizes = [size for layer in layers for size in (layer.columns, layer.grid.group or WHOLE_ROWS)]
    common = math.gcd(*sizes)
    return next((block for block in reversed(BLOCKS) if common % block == 0), None)


class ExpertWriter:
    """Adds QMoE nodes; keeps the arrays of the latest stack, because codes and scales are asked for in turn. While a
    stack is written, all experts of one block are in memory, packed, and one of them unpacked."""

    def __init__(self, builder: GraphBuilder, source: TensorSource, accuracy: Accuracy) -> None:
        self._builder = builder
        self._source = source
        self._accuracy = accuracy
        self._latest: tuple[ExpertStack, Packed] | None = None

    def add(
        self,
        name: str,
        value: ir.Value,
        router: ir.Value,
        weights: ir.Value | None,
        layers: Sequence[Sequence[LayerPlan]],
        used: int,
    ) -> ir.Value:
        """value [.., hidden] -> [.., hidden]. `router` [tokens, experts] chooses. Outputs are multiplied by `weights`,
        of that shape, or without them by the softmax of `router` over the chosen ones."""
        fc1, fc2 = stacks_of(layers, name)
        inputs: list[ir.Value | None] = [value, router, *self._weight(fc1), None, *self._weight(fc2)]
        inputs += [None] * (11 - len(inputs)) + [self._zeros(fc1), self._zeros(fc2), None, weights]
        while inputs[-1] is None:
            inputs.pop()
        attributes: dict[str, Any] = {
            "k": used,
            "quant_type": "int",
            "expert_weight_bits": fc1.layout.bits,
            "block_size": fc1.block,
            "activation_type": "swiglu",  # g * sigmoid(alpha * g) * (l + beta): silu gates
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "swiglu_fusion": 1,
            "normalize_routing_weights": int(weights is None),
            "accuracy_level": self._accuracy.of([fc2.experts[0][0]]),
            "weights_prepacked": 0,
        }
        metadata = {
            EXPERTS_KEY: canonical_json([[layer.name for layer in expert] for expert in layers]),
            GRIDS_KEY: canonical_json([stack.experts[0][0].grid.to_json() for stack in (fc1, fc2)]),
        }
        return self._builder.op(OPERATOR, name, inputs, domain=MICROSOFT, attributes=attributes, metadata=metadata)[0]

    def _weight(self, stack: ExpertStack) -> list[ir.Value]:
        """Codes and scales."""
        import onnx_ir as ir

        scales = self._constant(stack, "scales", ir.DataType.FLOAT, stack.scales_shape, lambda packed: packed.scales)
        codes = self._constant(stack, "codes", ir.DataType.UINT8, stack.codes_shape, lambda packed: packed.codes)
        return [codes, scales]

    def _zeros(self, stack: ExpertStack) -> ir.Value | None:
        import onnx_ir as ir

        if not stack.layout.has_zero_points:
            return None
        return self._constant(
            stack,
            "zero_points",
            ir.DataType.UINT8,
            stack.zero_points_shape,
            lambda packed: _present(packed.zero_points),
        )

    def _constant(
        self,
        stack: ExpertStack,
        part: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        array: Callable[[Packed], NDArray[Any]],
    ) -> ir.Value:
        return self._builder.lazy(f"{stack.name}.{part}", dtype, shape, lambda: array(self._packed(stack)))

    def _packed(self, stack: ExpertStack) -> Packed:
        if self._latest is None or self._latest[0] is not stack:
            self._latest = None  # the one before is gone before the next is built
            self._latest = stack, self._pack(stack)
        return self._latest[1]

    def _pack(self, stack: ExpertStack) -> Packed:
        """All experts of a stack, expert by expert into its place."""
        zeros = np.empty(stack.zero_points_shape, np.uint8) if stack.layout.has_zero_points else None
        whole = Packed(np.empty(stack.codes_shape, np.uint8), np.empty(stack.scales_shape, np.float32), zeros)
        for expert, layers in enumerate(stack.experts):
            for place, layer in enumerate(layers):
                part = pack(self._source.quantized(layer.name), stack.block)
                rows = slice(place, None, len(layers))
                whole.codes[expert, rows] = part.codes.reshape(layer.rows, -1)
                whole.scales[expert, rows] = part.scales
                if zeros is not None:
                    zeros[expert, rows] = _present(part.zero_points)
        return whole


def _present(zeros: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    assert zeros is not None
    return zeros
