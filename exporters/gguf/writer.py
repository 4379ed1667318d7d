"""Write a GGUF file from a plan and two readers of tensors: sizes first, then slices, made in threads
and written in order.

Packs, permutes whole rows and casts kept matrices to the dtype asked for; never rounds a quantised weight. The caller
makes the file whole or absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import IO, Any

import numpy.typing as npt
import torch
from torch import Tensor

from exporters.gguf import metadata
from exporters.gguf.container import KeyValue, PartOfTensor, PartsOf, write
from exporters.gguf.hyperparameters import hyperparameters, rope_tensors
from exporters.gguf.layout import Slot, file_type, float_bytes, float_type_of, layout
from exporters.gguf.names import added, interleaved, rotated_heads_of
from exporters.gguf.packing import pack
from exporters.gguf.slices import row_slices
from exporters.gguf.splits import Part, split
from exporters.gguf.stripping import name_for_llama_cpp
from exporters.gguf.vocabulary import CarriedTokenizer
from signround.errors import FailedError
from signround.gguf_names import ARCHITECTURES
from signround.plan import KeptTensor, LayerPlan, ModelPlan
from signround.qtensor import QuantizedTensor

UNKNOWN = "0" * 64  # stands for the fingerprint of an artifact that is not tuned yet
ReadQuantized = Callable[[str, range], QuantizedTensor]  # some rows of a matrix, by its checkpoint name
ReadKept = Callable[[str, range], Tensor]


def entries_of(plan: ModelPlan, tokenizer: CarriedTokenizer, fingerprint: str, float_type: str) -> list[KeyValue]:
    """Every key-value of the file, in order."""
    general = metadata.general(plan, file_type(plan, float_type))
    return [
        *(_named(entry, tokenizer) for entry in general),
        *hyperparameters(plan.architecture),
        *tokenizer.entries(),
        *metadata.provenance(plan, fingerprint, float_type, metadata.planned_grids(plan)),
    ]


def _named(entry: KeyValue, tokenizer: CarriedTokenizer) -> KeyValue:
    """llama.cpp reads more out of the model's name than a name."""
    if entry.key != "general.name":
        return entry
    return replace(entry, value=name_for_llama_cpp(entry.value, strips=tokenizer.strips_right))


def planned_parts(
    plan: ModelPlan, tokenizer: CarriedTokenizer, float_type: str, limit: int | None, fingerprint: str = UNKNOWN
) -> list[Part]:
    """The files to come, with their exact sizes. Raises ValueError when a tensor does not fit into `limit` bytes."""
    entries = entries_of(plan, tokenizer, fingerprint, float_type)
    return split(entries, [slot.entry for slot in layout(plan, float_type)], limit)


def write_gguf(
    stream: IO[bytes],
    plan: ModelPlan,
    *,
    tokenizer: CarriedTokenizer,
    fingerprint: str,
    float_type: str,
    quantized: ReadQuantized,
    kept: ReadKept,
) -> Iterator[str]:
    """The whole model as one file; yields the GGUF name of each tensor after it is written."""
    (part,) = planned_parts(plan, tokenizer, float_type, None, fingerprint)
    for entry in write(stream, part.entries, part.tensors, tensor_data(plan, float_type, quantized, kept)):
        yield entry.name


def tensor_data(plan: ModelPlan, float_type: str, quantized: ReadQuantized, kept: ReadKept) -> PartsOf:
    """What reads and lays out one tensor of the file, in parts; `quantized` and `kept` read rows by checkpoint name,
    in several threads at once.

    A part raises FailedError when a kept matrix does not fit the dtype asked for.
    """
    slots = {slot.entry.name: slot for slot in layout(plan, float_type)}
    return lambda entry: _parts(slots[entry.name], plan, float_type, quantized, kept)


def _parts(
    slot: Slot, plan: ModelPlan, float_type: str, quantized: ReadQuantized, kept: ReadKept
) -> Iterator[PartOfTensor]:
    """The tensor's data, expert by expert where it is a stack of them, and slice by slice where a matrix is large."""
    if not slot.sources:
        yield lambda: rope_tensors(plan.architecture)[slot.entry.name]
    more = added(slot.entry.name, ARCHITECTURES[plan.architecture.family.model_type])
    heads = rotated_heads_of(slot.entry.name, plan.architecture)
    for source in slot.sources:
        count, columns = _sizes(source)
        head = count // heads if heads else 1

        def part(rows: range, source: LayerPlan | KeptTensor = source, head: int = head) -> npt.NDArray[Any]:
            if isinstance(source, LayerPlan):
                data: npt.NDArray[Any] = pack(quantized(source.name, rows))
            else:
                stored = _cast(kept(source.name, rows), source, float_type)
                data = float_bytes(stored + more if more else stored).numpy()
            return interleaved(data, len(rows) // head) if heads else data

        for rows in row_slices(count, columns, head):
            yield partial(part, rows)


def _sizes(source: LayerPlan | KeptTensor) -> tuple[int, int]:
    """Rows, and weights a row; a vector is a column."""
    if isinstance(source, LayerPlan):
        return source.rows, source.columns
    return source.shape[0], math.prod(source.shape[1:])


def _cast(tensor: Tensor, kept: KeptTensor, float_type: str) -> Tensor:
    cast = tensor.to(float_type_of(kept, float_type).dtype)
    if not bool(torch.isfinite(cast).all()):
        raise FailedError(
            f"{kept.name}: holds values beyond the range of {float_type}; "
            "export again with --set gguf.float_type=bf16 or auto."
        )
    return cast
