"""The `contrib` flavour: norms and attention as onnxruntime's own operators (opset 21, com.microsoft 1).

GroupQueryAttention rotates q and k itself and can grow the KV cache in place; the Skip norm carries the residual. Where
its rotary kernel cannot (`rotates_inside`), RotaryEmbedding of the same domain rotates before it.
Refuses head sizes that the CPU kernel refuses (`refusals`).
Source: schemas of com.microsoft 1; wiring as in onnxruntime-genai's model builder. Conventions measured on the CPU
kernel of onnxruntime 1.31: a local window counts the token itself (from 1.24 on, see `notes`), scores are scaled and
then capped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from exporters.onnx.builder import MICROSOFT, GraphBuilder
from exporters.onnx.flavour import DecoderInputs
from exporters.onnx.lengths import Lengths
from exporters.onnx.operands import apart, rotary_caches
from exporters.onnx.rope import RotaryTable, rotary_tables
from signround.architecture import Architecture
from signround.errors import Refusal

if TYPE_CHECKING:
    import onnx_ir as ir

HEAD_MULTIPLE = 8  # of GroupQueryAttention
ROTARY_MULTIPLE = 16  # of its rotary kernel: of the head and of what rotates in it


class ContribFlavour:
    """Fulfils `Flavour`."""

    opset = 21
    ir_version = 10  # what onnxruntime 1.18 and later load
    shares_cache = True

    def __init__(self, builder: GraphBuilder, architecture: Architecture) -> None:
        self._builder = builder
        self._architecture = architecture
        self._tables = rotary_tables(architecture)
        self._lengths: Lengths | None = None

    @staticmethod
    def refusals(architecture: Architecture) -> list[Refusal]:
        """See `Flavour.refusals`."""
        if architecture.head_dim % HEAD_MULTIPLE == 0:
            return []
        problem = f"heads of {architecture.head_dim} are not possible in GroupQueryAttention, which takes multiples of "
        step = "add `--set onnx.flavour=std`, whose Attention takes them, or export to gguf or gptq"
        return [Refusal(f"{problem}{HEAD_MULTIPLE}", step, "onnx")]

    @staticmethod
    def notes(architecture: Architecture) -> list[str]:
        """What runtimes do otherwise."""
        windows = {window for window in architecture.windows if window is not None and window < architecture.context}
        if not windows:
            return []
        sizes = " and ".join(map(str, sorted(windows)))
        return [
            f"onnx: onnxruntime before 1.24 lets each token see one more than the {sizes} tokens of its sliding window."
        ]

    def norm(self, name: str, value: ir.Value, weight: ir.Value) -> ir.Value:
        """See `Flavour.norm`."""
        attributes = {"axis": -1, "epsilon": self._architecture.norm_epsilon, "stash_type": 1}
        return self._builder.op("SimplifiedLayerNormalization", name, [value, weight], attributes=attributes)[0]

    def add_and_norm(
        self, name: str, residual: ir.Value, delta: ir.Value, weight: ir.Value, last: bool
    ) -> tuple[ir.Value, ir.Value]:
        """See `Flavour.add_and_norm`."""
        outputs = self._builder.op(
            "SkipSimplifiedLayerNormalization",
            name,
            [residual, delta, weight],
            domain=MICROSOFT,
            outputs=1 if last else 4,
            unused=() if last else (1, 2),
            attributes={"epsilon": self._architecture.norm_epsilon},
        )
        return outputs[0], outputs[-1]

    def attention(
        self,
        name: str,
        block: int,
        projections: Sequence[ir.Value | None],
        past: tuple[ir.Value, ir.Value],
        inputs: DecoderInputs,
    ) -> list[ir.Value]:
        """See `Flavour.attention`."""
        architecture, lengths = self._architecture, self._lengths_of(inputs)
        rope, window = architecture.ropes[block], architecture.windows[block]
        table = None if rope is None else self._tables[rope]
        inside = table is not None and rotates_inside(architecture.head_dim, table)
        if table is not None and not inside:
            projections = self._rotated(name, projections, table, lengths)
        attributes: dict[str, int | float] = {
            "num_heads": architecture.heads,
            "kv_num_heads": architecture.kv_heads,
            "scale": architecture.scales.attention,
            "softcap": architecture.scales.attention_cap or 0.0,
            "do_rotary": int(inside),
            "rotary_interleaved": 0,
            "local_window_size": -1 if window is None else window,
        }
        values = [*projections, *past, lengths.last, lengths.total]
        if inside and table is not None:
            values += rotary_caches(self._builder, table)
            values += [] if table.switch is None else [lengths.positions(table.switch)]
        return self._builder.op("GroupQueryAttention", name, values, domain=MICROSOFT, outputs=3, attributes=attributes)

    def table_product(self, name: str, value: ir.Value, table: ir.Value, shape: tuple[int, int]) -> ir.Value:
        """See `Flavour.table_product`. Measured (50000 x 1024, onnxruntime 1.31): FusedMatMul with transB loads with
        one prepacked copy; Transpose + MatMul peaks at two."""
        attributes = {"transA": 0, "transB": 1, "alpha": 1.0}
        return self._builder.op("FusedMatMul", name, [value, table], domain=MICROSOFT, attributes=attributes)[0]

    def _rotated(
        self, name: str, projections: Sequence[ir.Value | None], table: RotaryTable, lengths: Lengths
    ) -> list[ir.Value | None]:
        """q, k, v with q and k rotated, by an operator of its own."""
        query, key, value = apart(self._builder, self._architecture, name, projections)
        positions, caches = lengths.positions(table.switch), rotary_caches(self._builder, table)
        heads = {"q": (query, self._architecture.heads), "k": (key, self._architecture.kv_heads)}
        rotated: list[ir.Value | None] = []
        for part, (projection, count) in heads.items():
            attributes = {"interleaved": 0, "num_heads": count, "rotary_embedding_dim": 2 * table.width}
            values = [projection, positions, *caches]
            rotated += self._builder.op(
                "RotaryEmbedding", f"{name}.{part}_rotated", values, domain=MICROSOFT, attributes=attributes
            )
        return [*rotated, value]

    def _lengths_of(self, inputs: DecoderInputs) -> Lengths:
        if self._lengths is None:
            self._lengths = Lengths(self._builder, inputs)
        return self._lengths


def rotates_inside(head_dim: int, table: RotaryTable) -> bool:
    """Whether GroupQueryAttention's own rotary kernel takes these heads (measured: it refuses all others)."""
    return head_dim % ROTARY_MULTIPLE == 0 and 2 * table.width % ROTARY_MULTIPLE == 0
