"""From the first block to the last: the float chain gives targets, the quantised chain gives inputs.

This is the only place that moves hidden states. Blocks that the artifact already holds are run, not tuned, so a
resumed run sees the very hidden states of an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from signround.architecture import BLOCK, EMBEDDING, HEAD
from signround.artifact import ArtifactWriter, BlockRecord, QuantizedCheckpoint
from signround.blocks import DecoderBlocks
from signround.checkpoint import SourceCheckpoint
from signround.events import BlockTuned, Listener, StageAdvanced
from signround.experts import is_expert, unit_of
from signround.importance import Importance, InputSquares
from signround.measure import peak_memory, return_freed_memory
from signround.plan import BlockPlan, LayerPlan, ModelPlan
from signround.qtensor import QuantizedTensor
from signround.tuning.ahead import Ahead, NextBlock, NextHead
from signround.tuning.inputs import LinearInputs, recorded, squares_of, tokens_of
from signround.tuning.layer import TunedLayer
from signround.tuning.loop import BlockOutcome, tune_block
from signround.tuning.outer import HeadProblem, quantized_in_slices, tuned_head
from signround.tuning.problem import BlockProblem
from signround.tuning.rtn import rounded, rounded_unseen
from signround.tuning.signround import SignDescent, descent_for
from signround.tuning.start import plain_start, searched_start

# An expert that fewer calibration tokens reach is rounded: what it would learn from them does not hold for others
# (docs/decisions.md has the measurement).
LEAST_EXPERT_TOKENS = 128
HEAD_SAMPLES = 8  # windows for the importance of a tied head


class TuningChain:
    """Tunes the blocks of one model in order and commits each.

    `tokens` int64 [samples, seqlen] are the calibration windows, the held-out ones last.
    """

    def __init__(
        self,
        checkpoint: SourceCheckpoint,
        plan: ModelPlan,
        writer: ArtifactWriter,
        tokens: Tensor,
        on_event: Listener,
        given: Importance | None = None,
    ) -> None:
        self.checkpoint, self.plan, self.writer, self.on_event = checkpoint, plan, writer, on_event
        self.settings = plan.tuning
        self.descent: SignDescent = descent_for(self.settings.method, self.settings.start)
        self.blocks = DecoderBlocks(plan.config, checkpoint.read, self.settings.device, self.settings.compute)
        self.tokens = tokens
        self.given = given

    def run(self) -> None:
        """Commit everything that is not there yet."""
        blocks = all(self.writer.has_block(block.index) for block in self.plan.blocks)
        if blocks and all(self.writer.has_outer(layer.name) for layer in self.plan.outer_layers):
            return
        if self.settings.method == "rtn":
            self._round_all()
            return
        dtype = torch.float32 if self.settings.hidden_states == "fp32" else torch.bfloat16
        home = self._home(dtype)
        embedding = self._embedding()
        float_chain = self.blocks.embed(self.tokens).to(home, dtype)
        if embedding is None:
            quantized_chain = float_chain.clone()
        else:
            quantized_chain = self.blocks.embed(self.tokens, embedding).to(home, dtype)
        for block_plan in self.plan.blocks:
            float_chain, quantized_chain = self._block(block_plan, float_chain, quantized_chain)
        self._head(float_chain, quantized_chain)

    def _home(self, dtype: torch.dtype) -> torch.device:
        """Hidden states lie in RAM, or on the GPU when three of them fit in a quarter of its free memory."""
        if self.blocks.device.type != "cuda":
            return torch.device("cpu")
        size = self.tokens.numel() * self.plan.architecture.hidden * dtype.itemsize * 3
        free, _ = torch.cuda.mem_get_info(self.blocks.device)
        return self.blocks.device if size < free / 4 else torch.device("cpu")

    def _block(self, plan: BlockPlan, float_chain: Tensor, quantized_chain: Tensor) -> tuple[Tensor, Tensor]:
        started = time.monotonic()
        return_freed_memory()
        committed = self.writer.has_block(plan.index)
        block = self.blocks.block(plan.index)
        inputs = quantized_chain if self.descent.quantized_inputs else float_chain.clone()
        batch = self.settings.batch_size
        if committed:
            self.blocks.run_all(block, float_chain, plan.index, batch)
            tensors = self._committed(plan)
        else:
            seen = self._float_pass(plan, block, float_chain)
            outcome = self._tune(plan, block, seen, inputs, float_chain)
            tensors = outcome.tensors
            self._commit(plan, outcome, time.monotonic() - started, seen)
        self._advance(block, tensors, quantized_chain, plan.index)
        return float_chain, quantized_chain

    def _committed(self, plan: BlockPlan) -> dict[str, QuantizedTensor]:
        reader = QuantizedCheckpoint(self.writer.folder, allow_unfinished=True)
        record = next(record for record in reader.records() if record.index == plan.index)
        self._announce(record, resumed=True)
        prefix = BLOCK.format(plan.index)
        return {layer.name.removeprefix(prefix): reader.quantized(layer.name) for layer in plan.layers}

    def _float_pass(self, plan: BlockPlan, block: nn.Module, hidden: Tensor) -> dict[str, LinearInputs]:
        """Float outputs in place of `hidden`; returns what the linears saw: all of them where the start is searched,
        else the experts alone, to know which ones no token reached."""
        prefix = BLOCK.format(plan.index)
        names = [layer.name.removeprefix(prefix) for layer in plan.layers]
        if self.settings.start != "search":
            names = [name for name in names if is_expert(name)]
        with recorded({name: self.blocks.linear(block, name) for name in names}) as seen:
            self.blocks.run_all(block, hidden, plan.index, self.settings.batch_size)
        return seen

    def _round_unrouted(
        self, plan: BlockPlan, block: nn.Module, seen: Mapping[str, LinearInputs]
    ) -> dict[str, QuantizedTensor]:
        """Experts that hardly any token reached, rounded here and in `block`: there is nothing to tune them on."""
        tensors = {}
        for layer in plan.layers:
            name = layer.name.removeprefix(BLOCK.format(plan.index))
            if is_expert(name) and (name not in seen or seen[name].tokens < LEAST_EXPERT_TOKENS):
                weight = self.blocks.parameter(block, name)
                tensors[name] = rounded_unseen(layer.grid, weight)
                with torch.no_grad():
                    weight.copy_(tensors[name].decode())
        return tensors

    def _tune(
        self, plan: BlockPlan, block: nn.Module, seen: Mapping[str, LinearInputs], inputs: Tensor, targets: Tensor
    ) -> BlockOutcome:
        prefix = BLOCK.format(plan.index)
        unrouted = self._round_unrouted(plan, block, seen)
        layers = {}
        for layer in plan.layers:
            name = layer.name.removeprefix(prefix)
            if name in unrouted:
                continue
            weight = self.blocks.parameter(block, name)
            if self.settings.start == "search":
                given = self._given(layer.name)
                importance = seen[name].mean_square if given is None else given.means()[0].to(weight.device)
                start = searched_start(layer.grid, weight, importance)
            else:
                start = plain_start(layer.grid, weight)
            layers[name] = TunedLayer(layer.grid, weight, start)
        ahead = self._ahead(plan.index + 1, targets) if self.settings.lookahead else None
        problem = BlockProblem(self.blocks, block, plan.index, inputs, targets, self.settings.held_out, ahead)

        def on_step(done: int, total: int) -> None:
            self.on_event(StageAdvanced("tune", done, total, f"block {plan.index + 1}/{len(self.plan.blocks)}"))

        outcome = tune_block(problem, layers, self.settings, self.descent, on_step)
        tensors = outcome.tensors | unrouted
        kept = outcome.kept | {name: f"rounded ({tokens_of(seen, name)} tokens)" for name in unrouted}
        names = [layer.name.removeprefix(prefix) for layer in plan.layers]
        return replace(
            outcome, tensors={name: tensors[name] for name in names}, kept={name: kept[name] for name in names}
        )

    def _ahead(self, index: int, hidden: Tensor) -> Ahead:
        """What the outputs `hidden` of the float chain go through next: block `index`, or the head."""
        if index == len(self.plan.blocks):
            return NextHead(self.blocks, self.blocks.head())
        block, targets = self.blocks.block(index), hidden.clone()
        self.blocks.run_all(block, targets, index, self.settings.batch_size)
        return NextBlock(self.blocks, block, index, targets)

    def _advance(self, block: nn.Module, tensors: Mapping[str, QuantizedTensor], hidden: Tensor, index: int) -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.blocks.parameter(block, name).copy_(tensor.decode())
        self.blocks.run_all(block, hidden, index, self.settings.batch_size)

    def _commit(
        self, plan: BlockPlan, outcome: BlockOutcome, seconds: float, seen: Mapping[str, LinearInputs] | None = None
    ) -> None:
        prefix = BLOCK.format(plan.index)
        rss, device = peak_memory()
        experts = {unit_of(name): tokens_of(seen or {}, name) for name in outcome.tensors if is_expert(name)}
        record = BlockRecord(
            plan.index, seconds, outcome.loss_rounded, outcome.loss_tuned, outcome.kept, rss, device,
            expert_tokens=experts if seen is not None else {},
        )  # fmt: skip
        quantized = {prefix + name: tensor for name, tensor in outcome.tensors.items()}
        kept = {kept.name: self.checkpoint.read(kept.name) for kept in plan.kept}
        inputs = {
            layer.name: self._given(layer.name) or squares_of(seen, layer.name.removeprefix(prefix), layer.columns)
            for layer in plan.layers
            if seen is not None and self.settings.start == "search"
        }
        self.writer.commit_block(plan.index, quantized, kept, record, inputs)
        self._announce(record)

    def _outer_layer(self, name: str) -> LayerPlan | None:
        return next((layer for layer in self.plan.outer_layers if layer.name == name), None)

    def _embedding(self) -> Tensor | None:
        """The embedding as the file will decode it, quantised and committed if it is not there yet; None when it is
        not quantised."""
        layer = self._outer_layer(EMBEDDING)
        if layer is None:
            return None
        if not self.writer.has_outer(EMBEDDING):
            inputs, importance = None, None
            if self.settings.start == "search":
                inputs = self._given(EMBEDDING) or (self._head_inputs() if self.plan.architecture.tied else None)
                importance = torch.ones(layer.columns) if inputs is None else inputs.means()[0]
            weight = self.checkpoint.read(EMBEDDING)
            tensor = quantized_in_slices(layer.grid, weight, importance, self.blocks.device)
            self.writer.commit_outer_layer(EMBEDDING, tensor, inputs)
        return QuantizedCheckpoint(self.writer.folder, allow_unfinished=True).weight(EMBEDDING)

    def _head_inputs(self) -> InputSquares:
        """What the head sees in the float model, on the first few windows: column sums need no more."""
        tokens = self.tokens[:HEAD_SAMPLES]
        hidden = self.blocks.embed(tokens).to(self.blocks.device)
        for index in range(self.plan.architecture.layers):
            self.blocks.run_all(self.blocks.block(index), hidden, index, self.settings.batch_size)
        return self._squares(hidden)

    def _squares(self, hidden: Tensor) -> InputSquares:
        norm = self.blocks.final_norm()
        sums = torch.zeros(hidden.shape[-1], device=self.blocks.device)
        with torch.no_grad():
            for part in torch.split(hidden, self.settings.batch_size):
                sums += norm(part.to(self.blocks.device, torch.float32)).square().sum((0, 1))
        return InputSquares(sums[None].cpu(), torch.tensor([hidden.shape[0] * hidden.shape[1]]))

    def _head(self, float_chain: Tensor, quantized_chain: Tensor) -> None:
        """Tune and commit a head of its own; the chains are used up."""
        layer = self._outer_layer(HEAD)
        if layer is None or self.writer.has_outer(HEAD):
            return
        weight = self.checkpoint.read(HEAD)
        if self.settings.start != "search":
            tensor = quantized_in_slices(layer.grid, weight, None, self.blocks.device)
            self.writer.commit_outer_layer(HEAD, tensor, None)
            return
        inputs = self._given(HEAD) or self._squares(float_chain)
        norm = self.blocks.final_norm()
        with torch.no_grad():
            for chain in (float_chain, quantized_chain):
                for part in torch.split(chain, self.settings.batch_size):
                    part.copy_(norm(part.to(self.blocks.device, torch.float32)))

        def problem_of(rows: Tensor) -> HeadProblem:
            values = rows.to(self.blocks.device, torch.float32)
            return HeadProblem(quantized_chain, float_chain, values, self.settings.held_out)

        def on_step(done: int, total: int) -> None:
            self.on_event(StageAdvanced("tune", done, total, "head"))

        architecture = self.plan.architecture
        shapes = [architecture.block_linears(index).values() for index in range(architecture.layers)]
        largest = max(sum(rows * columns for rows, columns in block) for block in shapes)
        importance = inputs.means()[0].to(self.blocks.device)
        tensor = tuned_head(layer, weight, problem_of, importance, self.settings, self.descent, largest, on_step)
        self.writer.commit_outer_layer(HEAD, tensor, inputs)

    def _given(self, name: str) -> InputSquares | None:
        return self.given.squares.get(name) if self.given else None

    def _round_all(self) -> None:
        """`--method rtn`: no hidden states, one block in memory."""
        for layer in self.plan.outer_layers:
            if not self.writer.has_outer(layer.name):
                weight = self.checkpoint.read(layer.name)
                tensor = quantized_in_slices(layer.grid, weight, None, self.blocks.device)
                self.writer.commit_outer_layer(layer.name, tensor, None)
        for plan in self.plan.blocks:
            if self.writer.has_block(plan.index):
                continue
            started = time.monotonic()
            prefix = BLOCK.format(plan.index)
            tensors = {
                layer.name.removeprefix(prefix): rounded(layer.grid, self.checkpoint.read(layer.name).float())
                for layer in plan.layers
            }
            outcome = BlockOutcome(tensors, dict.fromkeys(tensors, "rounded"), 0.0, 0.0)
            self._commit(plan, outcome, time.monotonic() - started)

    def _announce(self, record: BlockRecord, *, resumed: bool = False) -> None:
        self.on_event(
            BlockTuned(
                record.index,
                len(self.plan.blocks),
                record.seconds,
                record.loss_rounded,
                record.loss_tuned,
                record.kept,
                resumed,
            )
        )
