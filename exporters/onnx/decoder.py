"""The decoder graph of a plan: input_ids, attention_mask and past keys and values in; logits of every position out.

Built from the plan's shapes alone (tensors are read while the file is written); no transformers, no tracing. Knows the
Llama shape and its relatives (Mistral, Qwen2, Qwen3); what differs between runtimes lies in the flavour.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exporters.onnx.builder import GraphBuilder
from exporters.onnx.contrib import ContribFlavour
from exporters.onnx.linear import Accuracy, LinearWriter, TableWriter, bias_name, can_fuse
from exporters.onnx.tensors import TensorSource
from signround.architecture import BLOCK, EMBEDDING, FINAL_NORM, HEAD
from signround.plan import BlockPlan, ModelPlan

if TYPE_CHECKING:
    import onnx_ir as ir


def build_decoder(plan: ModelPlan, source: TensorSource, accuracy: Accuracy) -> GraphBuilder:
    """The whole graph, its tensors lazy."""
    return _Decoder(plan, source, accuracy).build()


class _Decoder:
    def __init__(self, plan: ModelPlan, source: TensorSource, accuracy: Accuracy) -> None:
        self.plan = plan
        self.source = source
        self.architecture = plan.architecture
        self.builder = GraphBuilder()
        self.flavour = ContribFlavour(self.builder, self.architecture)
        self.linears = LinearWriter(self.builder, source, accuracy)
        self.tables = TableWriter(self.builder, source)
        self.layers = {layer.name: layer for layer in plan.layers()}
        self.kept = {kept.name: kept for kept in plan.kept()}

    def build(self) -> GraphBuilder:
        import onnx_ir as ir

        ids = self.builder.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        mask = self.builder.input("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
        residual, delta = self._embedded(ids), None
        presents: list[ir.Value] = []
        for block in self.plan.blocks:
            residual, delta = self._block(block, residual, delta, mask, presents)
        assert delta is not None
        hidden, _ = self.flavour.add_and_norm("final_norm", residual, delta, self._vector(FINAL_NORM), last=True)
        logits = self._logits(hidden)
        shape: list[int | str] = ["batch_size", "sequence_length", self.architecture.vocabulary]
        self.builder.output(logits, "logits", ir.DataType.FLOAT, shape)
        for index, present in enumerate(presents):
            name = f"present.{index // 2}.{('key', 'value')[index % 2]}"
            self.builder.output(present, name, ir.DataType.FLOAT, self._cache_shape("total_sequence_length"))
        return self.builder

    def _embedded(self, ids: ir.Value) -> ir.Value:
        if EMBEDDING in self.layers:
            return self.linears.gather("embedding", self.layers[EMBEDDING], ids, shared=self.architecture.tied)
        return self.tables.gather("embedding", self.kept[EMBEDDING], ids)

    def _logits(self, hidden: ir.Value) -> ir.Value:
        name = EMBEDDING if self.architecture.tied else HEAD
        if name not in self.layers:
            return self.tables.product("head", hidden, self.kept[name])
        shared = "embedding" if self.architecture.tied else ""
        return self.linears.add("head", hidden, [self.layers[name]], False, constants=shared)

    def _block(
        self, block: BlockPlan, residual: ir.Value, delta: ir.Value | None, mask: ir.Value, presents: list[ir.Value]
    ) -> tuple[ir.Value, ir.Value]:
        """(residual, what is still to be added to it) after one decoder block."""
        prefix = BLOCK.format(block.index)
        weight = self._vector(f"{prefix}input_layernorm.weight")
        if delta is None:
            normed = self.flavour.norm(f"{prefix}input_norm", residual, weight)
        else:
            normed, residual = self.flavour.add_and_norm(f"{prefix}input_norm", residual, delta, weight, last=False)
        attended = self._attention(block.index, prefix, normed, mask, presents)
        weight = self._vector(f"{prefix}post_attention_layernorm.weight")
        name = f"{prefix}feed_forward_norm"
        normed, residual = self.flavour.add_and_norm(name, residual, attended, weight, last=False)
        return residual, self._feed_forward(prefix, normed)

    def _attention(
        self, index: int, prefix: str, normed: ir.Value, mask: ir.Value, presents: list[ir.Value]
    ) -> ir.Value:
        import onnx_ir as ir

        key, value = (
            self.builder.input(
                f"past_key_values.{index}.{part}", ir.DataType.FLOAT, self._cache_shape("past_sequence_length")
            )
            for part in ("key", "value")
        )
        attended, *present = self.flavour.attention(
            f"{prefix}attention",
            self._projections(prefix, normed),
            (key, value),
            self.architecture.windows[index],
            mask,
        )
        presents += present
        return self._linear(prefix, "self_attn.o_proj", attended)

    def _projections(self, prefix: str, normed: ir.Value) -> list[ir.Value | None]:
        """q, k and v; packed into one node where their layouts agree and nothing lies between them and attention."""
        names = [f"self_attn.{part}_proj" for part in "qkv"]
        weights = [f"{prefix}{name}.weight" for name in names]
        layers = [self.layers[name] for name in weights if name in self.layers]
        biases = [self.architecture.has_bias(name) for name in names]
        if len(layers) == len(names) and can_fuse(layers, biases) and not self.architecture.family.qk_norm:
            return [self.linears.add(f"{prefix}self_attn.qkv_proj", normed, layers, biases[0]), None, None]
        query, key, value = (self._linear(prefix, name, normed) for name in names)
        if self.architecture.family.qk_norm:
            query = self._head_norm(prefix, "q", query, self.architecture.heads)
            key = self._head_norm(prefix, "k", key, self.architecture.kv_heads)
        return [query, key, value]

    def _head_norm(self, prefix: str, part: str, value: ir.Value, heads: int) -> ir.Value:
        """RMS norm over each head: [batch, tokens, heads * head_dim] seen as [batch, tokens, heads, head_dim]."""
        name, size = f"{prefix}self_attn.{part}_norm", self.architecture.head_dim
        apart = self.builder.constant(f"constant.{part}_heads", np.array([0, 0, heads, size], np.int64))
        joined = self.builder.constant(f"constant.{part}_joined", np.array([0, 0, heads * size], np.int64))
        split = self.builder.op("Reshape", f"{name}.split", [value, apart])[0]
        normed = self.flavour.norm(name, split, self._vector(f"{name}.weight"))
        return self.builder.op("Reshape", f"{name}.join", [normed, joined])[0]

    def _feed_forward(self, prefix: str, normed: ir.Value) -> ir.Value:
        gate = self._linear(prefix, "mlp.gate_proj", normed)
        up = self._linear(prefix, "mlp.up_proj", normed)
        sigmoid = self.builder.op("Sigmoid", f"{prefix}mlp.sigmoid", [gate])
        silu = self.builder.op("Mul", f"{prefix}mlp.silu", [gate, *sigmoid])
        gated = self.builder.op("Mul", f"{prefix}mlp.gated", [*silu, up])
        return self._linear(prefix, "mlp.down_proj", gated[0])

    def _linear(self, prefix: str, linear: str, value: ir.Value) -> ir.Value:
        weight, biased = f"{prefix}{linear}.weight", self.architecture.has_bias(linear)
        if weight in self.layers:
            return self.linears.add(f"{prefix}{linear}", value, [self.layers[weight]], biased)
        bias = self.kept[bias_name(weight)] if biased else None
        return self.tables.product(f"{prefix}{linear}", value, self.kept[weight], bias)

    def _vector(self, name: str) -> ir.Value:
        """A norm's weight, float32: the operators compute in the dtype of their weight."""
        import onnx_ir as ir

        size = self.architecture.head_dim if "self_attn" in name else self.architecture.hidden
        return self.builder.lazy(name, ir.DataType.FLOAT, (size,), lambda: self.source.tensor(name).float().numpy())

    def _cache_shape(self, length: str) -> list[int | str]:
        return ["batch_size", self.architecture.kv_heads, length, self.architecture.head_dim]
