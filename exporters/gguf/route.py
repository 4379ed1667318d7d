"""Two ways to the same file: laid out from the plan alone, for families that we know, or from a template.

Both tell at plan time what they refuse, and give the table of contents in parts and the data of each tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from exporters.gguf import hyperparameters
from exporters.gguf.card import read_card
from exporters.gguf.container import PartsOf
from exporters.gguf.layout import AUTO
from exporters.gguf.pre_tokenizer import AUTO as AUTO_PRE
from exporters.gguf.probing import transformers_notes
from exporters.gguf.splits import Part
from exporters.gguf.tokenizer import read_tokenizer
from exporters.gguf.vocabulary import CarriedTokenizer
from exporters.gguf.writer import UNKNOWN, planned_parts, tensor_data
from signround.artifact import QuantizedCheckpoint
from signround.errors import Refusal, RefusedError
from signround.experts import is_expert
from signround.gguf_names import gguf_name
from signround.grid import Grid
from signround.plan import ModelPlan


class Route(Protocol):
    """What the exporter asks of either."""

    def refusals(self, plan: ModelPlan) -> list[Refusal]:
        """Every reason why this plan cannot be written this way."""
        ...

    def notes(self, plan: ModelPlan) -> list[str]:
        """What the user should know, without the name of the format."""
        ...

    def parts(self, plan: ModelPlan, limit: int | None, fingerprint: str = UNKNOWN) -> Sequence[Part]:
        """The files to come. Raises ValueError when a tensor does not fit into `limit` bytes."""
        ...

    def data(self, artifact: QuantizedCheckpoint) -> PartsOf:
        """What reads and lays out one tensor: its parts in order, to be made in any thread."""
        ...


@dataclass(frozen=True)
class FromPlan:
    """Names, metadata and tokenizer of a family that we know. See `GgufExporter` for the options."""

    float_type: str = AUTO
    pre: str = AUTO_PRE

    def refusals(self, plan: ModelPlan) -> list[Refusal]:
        """The family, its stacks of experts, and the tokenizer."""
        found = hyperparameters.refusals(plan.architecture) + _stack_refusals(plan)
        try:
            self._tokenizer(plan)
        except RefusedError as error:
            found += error.refusals
        return found

    def notes(self, plan: ModelPlan) -> list[str]:
        """What llama.cpp ignores, and how its tokenizer differs. `hyperparameters` names the format itself."""
        found = [note.removeprefix("gguf: ") for note in hyperparameters.notes(plan.architecture)]
        if self.float_type != AUTO:
            found.append(f"unquantised matrices are stored as {self.float_type}")
        problem = read_card(plan.files).problem
        if problem:
            found.append(problem)
        with contextlib.suppress(RefusedError):  # `refusals` names it
            found += [*self._tokenizer(plan).notes, *transformers_notes(plan.files)]
        return found

    def parts(self, plan: ModelPlan, limit: int | None, fingerprint: str = UNKNOWN) -> Sequence[Part]:
        """See `Route.parts`."""
        return planned_parts(plan, self._tokenizer(plan), self.float_type, limit, fingerprint)

    def data(self, artifact: QuantizedCheckpoint) -> PartsOf:
        """See `Route.data`. Raises FailedError when a kept matrix does not fit the dtype asked for."""
        return tensor_data(artifact.plan, self.float_type, artifact.quantized, artifact.tensor)

    def _tokenizer(self, plan: ModelPlan) -> CarriedTokenizer:
        return read_tokenizer(plan.files, plan.config, plan.architecture.vocabulary, self.pre)


def _stack_refusals(plan: ModelPlan) -> list[Refusal]:
    """The experts of a block are one tensor, and a tensor has one type."""
    grids: dict[str, set[Grid | None]] = {}
    grid_of: list[tuple[str, Grid | None]] = [(layer.name, layer.grid) for layer in plan.layers()]
    for name, grid in [*grid_of, *((kept.name, None) for kept in plan.kept())]:
        if is_expert(name):
            grids.setdefault(gguf_name(name), set()).add(grid)
    mixed = [name for name, found in grids.items() if len(found) > 1]
    if not mixed:
        return []
    problem = f"the experts in {mixed[0]} have different grids (and {len(mixed) - 1} more); llama.cpp keeps them as one"
    return [Refusal(problem, "give all experts of a block the same type", "gguf")]
