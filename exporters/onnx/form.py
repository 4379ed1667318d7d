"""What shape a graph takes: its operators, how weights lie in it, what it computes in. Plain values, and what excludes
what; the operators themselves lie in the flavours and writers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporters.onnx import dequantize
from exporters.onnx.contrib import ContribFlavour
from exporters.onnx.linear import Accuracy
from exporters.onnx.packing import CONTAINER
from exporters.onnx.std import StdFlavour
from signround.architecture import EMBEDDING
from signround.errors import Refusal
from signround.plan import ModelPlan
from signround.runtimes.ort import FUSED_LEVEL

if TYPE_CHECKING:
    import onnx_ir as ir

FLAVOURS: dict[str, type[ContribFlavour | StdFlavour]] = {"contrib": ContribFlavour, "std": StdFlavour}
WEIGHTS = ("matmulnbits", "dequantize")
DTYPES = {"fp32": "FLOAT", "fp16": "FLOAT16"}  # what a graph computes in -> its name in onnx_ir
OPSET_2_BITS, IR_2_BITS = 25, 13  # the first with int2 and uint2
SHIPPED = Accuracy(4, exact_down=False)


@dataclass(frozen=True)
class GraphForm:
    """`flavour`, `weights` and `dtype` are keys of the tables above."""

    flavour: str = "contrib"
    weights: str = "matmulnbits"
    dtype: str = "fp32"
    accuracy: Accuracy = SHIPPED

    @property
    def float_type(self) -> ir.DataType:
        import onnx_ir as ir

        return ir.DataType[DTYPES[self.dtype]]

    @property
    def operators(self) -> type[ContribFlavour | StdFlavour]:
        return FLAVOURS[self.flavour]

    def opset(self, plan: ModelPlan) -> int:
        """The lowest that has what the graph needs: older runtimes load it."""
        return max(self.operators.opset, OPSET_2_BITS) if self._has_int2(plan) else self.operators.opset

    def ir_version(self, plan: ModelPlan) -> int:
        """The lowest likewise."""
        return max(self.operators.ir_version, IR_2_BITS) if self._has_int2(plan) else self.operators.ir_version

    def _has_int2(self, plan: ModelPlan) -> bool:
        return self.weights == "dequantize" and any(CONTAINER[layer.grid.bits] == 2 for layer in plan.layers())

    @property
    def session_options(self) -> dict[str, str]:
        """What a session must be told that the file cannot hold: DequantizeLinear has no accuracy_level, and
        onnxruntime fuses it with 4 unless told otherwise."""
        if self.weights != "dequantize" or self.accuracy.level == 4:
            return {}
        return {FUSED_LEVEL: str(self.accuracy.level)}

    def refusals(self, plan: ModelPlan) -> list[Refusal]:
        """Names that are not known, and combinations that do not exist; grids are judged elsewhere."""
        found = [
            Refusal(f"{name} {value!r} does not exist; allowed are {', '.join(allowed)}", "choose one of them", "onnx")
            for name, value, allowed in (
                ("flavour", self.flavour, tuple(FLAVOURS)),
                ("weights", self.weights, WEIGHTS),
                ("dtype", self.dtype, tuple(DTYPES)),
            )
            if value not in allowed
        ]
        if found:
            return found
        found = self.operators.refusals(plan.architecture)
        if plan.architecture.mixture and (self.weights != "matmulnbits" or self.dtype != "fp32"):
            problem = "a mixture of experts is a QMoE node in float32, which weights=dequantize and dtype=fp16 exclude"
            found.append(Refusal(problem, "leave weights and dtype as they are", "onnx"))
        return found + self._dequantize_refusals(plan) if self.weights == "dequantize" else found

    def notes(self, plan: ModelPlan) -> Iterator[str]:
        """What the choice costs, and which runtimes it needs."""
        if self.operators is ContribFlavour:
            yield from ContribFlavour.notes(plan.architecture)
        if self._has_int2(plan):
            yield f"onnx: 2-bit integers are of opset {OPSET_2_BITS}, which onnxruntime loads from 1.24 on."
        if self.dtype == "fp16" and any(CONTAINER[layer.grid.bits] == 2 for layer in plan.layers()):
            yield "onnx: before 1.30 onnxruntime had no fp16 products of 2 bits on a CPU: such a graph does not load."
        if self.flavour == "std" and plan.architecture.scales.attention_cap is not None:
            yield "onnx: before 1.27 onnxruntime capped scores of Attention after it masked them: do not use it."
        if self.session_options:
            yield (
                "onnx: DequantizeLinear has no accuracy_level; onnxruntime computes at 4 unless the session option "
                f"{FUSED_LEVEL} is {self.accuracy.level}, as genai_config.json says. No other layout can say so."
            )
        if self.dtype == "fp16" and plan.architecture.family.norm_plus_one:
            yield (
                f"onnx: hidden values of published {plan.architecture.family.hf_class} models can pass 65504, where "
                "fp16 ends; look at the logits in the report before you ship it."
            )

    def _dequantize_refusals(self, plan: ModelPlan) -> list[Refusal]:
        found = dequantize.refusals(plan)
        if any(layer.name == EMBEDDING for layer in plan.layers()):
            problem = "a quantised embedding is looked up by GatherBlockQuantized, which weights=dequantize excludes"
            found.append(Refusal(problem, "use weights=matmulnbits, or leave the embedding as it is", "onnx"))
        if self.flavour != "std":
            problem = f"weights=dequantize is a part of flavour=std, not of flavour={self.flavour}"
            found.append(Refusal(problem, "add `--set onnx.flavour=std`", "onnx"))
        if self.accuracy.exact_down or self.accuracy.keep_fast:
            name = "exact_down_proj" if self.accuracy.exact_down else "keep_fast"
            problem = f"{name} sets the accuracy_level of single nodes, and weights=dequantize has one for all"
            found.append(Refusal(problem, "use accuracy_level=0, or weights=matmulnbits", "onnx"))
        return found
