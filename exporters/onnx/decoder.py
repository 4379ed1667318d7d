"""The decoder graph of a plan: input_ids, attention_mask and past keys and values in; logits of every position out.

Built from the plan's shapes alone (tensors are read while the file is written); no transformers, no tracing. What sets
families apart is read from `signround.architecture`; what differs between runtimes lies in the flavour.

A block is residual + attention, then residual + feed-forward, each with a norm before it, after it, or both. The sum
is left to the next norm, which adds and norms in one operator: `residual` and `delta` travel side by side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporters.onnx.attention import self_attention
from exporters.onnx.builder import GraphBuilder
from exporters.onnx.elementwise import capped, scaled
from exporters.onnx.feed_forward import feed_forward
from exporters.onnx.flavour import DecoderInputs
from exporters.onnx.form import GraphForm
from exporters.onnx.mixture import mixture_of_experts
from exporters.onnx.parts import DecoderParts
from exporters.onnx.tensors import TensorSource
from signround.architecture import BLOCK, EMBEDDING, FINAL_NORM, HEAD
from signround.families import Family
from signround.plan import ModelPlan

if TYPE_CHECKING:
    import onnx_ir as ir


def build_decoder(plan: ModelPlan, source: TensorSource, form: GraphForm) -> GraphBuilder:
    """The whole graph, its tensors lazy."""
    return _Decoder(DecoderParts(plan, source, form)).build()


class _Decoder:
    def __init__(self, parts: DecoderParts) -> None:
        self.parts = parts
        self.architecture = parts.architecture
        self.builder = parts.builder
        self.norms = _norms_around(self.architecture.family)

    def build(self) -> GraphBuilder:
        import onnx_ir as ir

        ids = self.builder.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        mask = self.builder.input("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
        residual, delta = self._embedded(ids), None
        presents: list[ir.Value] = []
        for index in range(self.architecture.layers):
            residual, delta = self._block(index, residual, delta, DecoderInputs(ids, mask), presents)
        assert delta is not None
        weight = self.parts.norm_weight(FINAL_NORM)
        hidden, _ = self.parts.flavour.add_and_norm("final_norm", residual, delta, weight, last=True)
        shape: list[int | str] = ["batch_size", "sequence_length", self.architecture.vocabulary]
        self.builder.output(self._logits(hidden), "logits", ir.DataType.FLOAT, shape)
        for index, present in enumerate(presents):
            name = f"present.{index // 2}.{('key', 'value')[index % 2]}"
            self.builder.output(present, name, self.builder.float_type, self._cache_shape("total_sequence_length"))
        return self.builder

    def _embedded(self, ids: ir.Value) -> ir.Value:
        if EMBEDDING in self.parts.layers:
            layer = self.parts.layers[EMBEDDING]
            rows = self.parts.packer.gather("embedding", layer, ids, shared=self.architecture.tied)
        else:
            rows = self.parts.tables.gather("embedding", self.parts.kept[EMBEDDING], ids)
        return scaled(self.builder, "embedding.scaled", rows, self.architecture.scales.embedding)

    def _logits(self, hidden: ir.Value) -> ir.Value:
        scales, name = self.architecture.scales, EMBEDDING if self.architecture.tied else HEAD
        small = scaled(self.builder, "head.scaled", self._product(hidden, name), 1 / scales.logits)
        return self._as_float32("head.float", capped(self.builder, "head.capped", small, scales.logits_cap))

    def _product(self, hidden: ir.Value, name: str) -> ir.Value:
        if name not in self.parts.layers:
            return self.parts.tables.product("head", hidden, self.parts.kept[name])
        layers = [self.parts.layers[name]]
        if self.architecture.tied:  # one table for both
            return self.parts.packer.add("head", hidden, layers, False, constants="embedding")
        return self.parts.linears.add("head", hidden, layers, False)

    def _as_float32(self, name: str, value: ir.Value) -> ir.Value:
        """Logits are float32 whatever the graph computes in: a Float32Array in a browser, numpy's default elsewhere."""
        import onnx_ir as ir

        if self.builder.float_type == ir.DataType.FLOAT:
            return value
        return self.builder.op("Cast", name, [value], attributes={"to": int(ir.DataType.FLOAT)})[0]

    def _block(
        self,
        index: int,
        residual: ir.Value,
        delta: ir.Value | None,
        inputs: DecoderInputs,
        presents: list[ir.Value],
    ) -> tuple[ir.Value, ir.Value]:
        """(residual, what is still to be added to it) after one decoder block."""
        prefix = BLOCK.format(index)
        (before_attention, after_attention), (before_feed_forward, after_feed_forward) = self.norms
        normed, residual = self._enter(f"{prefix}input_norm", residual, delta, prefix, before_attention)
        attended, present = self_attention(self.parts, index, prefix, normed, self._past(index), inputs)
        presents += present
        attended = self._leave(f"{prefix}attention", attended, prefix, after_attention)
        normed, residual = self._enter(f"{prefix}feed_forward_norm", residual, attended, prefix, before_feed_forward)
        mixture = self.architecture.mixture
        if mixture is None:
            fed = feed_forward(self.parts, prefix, normed)
        else:
            fed = mixture_of_experts(self.parts, mixture, index, prefix, normed)
        return residual, self._leave(f"{prefix}feed_forward", fed, prefix, after_feed_forward)

    def _enter(
        self, name: str, residual: ir.Value, delta: ir.Value | None, prefix: str, norm: str | None
    ) -> tuple[ir.Value, ir.Value]:
        """(what attention or feed-forward reads, the sum so far)."""
        if norm is None:
            total = residual if delta is None else self.builder.op("Add", name, [residual, delta])[0]
            return total, total
        weight = self.parts.norm_weight(f"{prefix}{norm}.weight")
        if delta is None:
            return self.parts.flavour.norm(name, residual, weight), residual
        return self.parts.flavour.add_and_norm(name, residual, delta, weight, last=False)

    def _leave(self, name: str, value: ir.Value, prefix: str, norm: str | None) -> ir.Value:
        """What is to be added to the residual."""
        if norm is not None:
            value = self.parts.flavour.norm(f"{name}.norm", value, self.parts.norm_weight(f"{prefix}{norm}.weight"))
        return scaled(self.builder, f"{name}.scaled", value, self.architecture.scales.residual)

    def _past(self, index: int) -> tuple[ir.Value, ir.Value]:
        shape, dtype = self._cache_shape("past_sequence_length"), self.builder.float_type
        key, value = (self.builder.input(f"past_key_values.{index}.{part}", dtype, shape) for part in ("key", "value"))
        return key, value

    def _cache_shape(self, length: str) -> list[int | str]:
        return ["batch_size", self.architecture.kv_heads, length, self.architecture.head_dim]


def _norms_around(family: Family) -> tuple[tuple[str | None, str | None], tuple[str | None, str | None]]:
    """(norm before, norm after) of attention, then of the feed-forward network. `post_attention_layernorm` stands after
    attention in families that norm after the feed-forward network too; in the others it is the one before that."""
    names = {norm.name for norm in family.norms}
    before = "input_layernorm" if "input_layernorm" in names else None
    if "post_feedforward_layernorm" not in names:
        return (before, None), ("post_attention_layernorm", None)
    between = "pre_feedforward_layernorm" if "pre_feedforward_layernorm" in names else None
    return (before, "post_attention_layernorm"), (between, "post_feedforward_layernorm")
