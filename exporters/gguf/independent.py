"""The tensors of a .gguf file as gguf-py, the reader of the llama.cpp project, finds and decodes them.

Reads rows as they are asked for, so that one expert of a stack is in memory at a time. Refuses files of types that the
installed gguf-py does not know (Q2_0): it stops at the first of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from exporters.gguf.container import GgufFile
from exporters.gguf.layout import TYPE_BYTES
from exporters.gguf.packing import BLOCK_TYPES
from signround.errors import unavailable

if TYPE_CHECKING:
    from gguf import ReaderTensor


@dataclass(frozen=True)
class IndependentTensor:
    """One tensor; its rows are those of a matrix or of a stack of them, or the elements of a vector."""

    path: Path
    tensor: ReaderTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost first."""
        return tuple(int(size) for size in self.tensor.shape[::-1])

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]

    def read(self, first: int, last: int) -> npt.NDArray[np.float32]:
        """float32 [last - first, columns], of a vector [last - first]. Read, not mapped: the pages that gguf-py's own
        view touches would stay resident until the last tensor."""
        from gguf.quants import dequantize

        data = self.tensor.data
        width = data.size // self.rows
        offset = self.tensor.data_offset + first * width * data.itemsize
        raw = np.fromfile(self.path, data.dtype, (last - first) * width, offset=offset)
        weight: npt.NDArray[np.float32] = dequantize(raw.reshape(last - first, width), self.tensor.tensor_type)
        return weight.reshape(-1) if len(self.shape) == 1 else weight


def independent_tensors(paths: Sequence[Path]) -> dict[str, IndependentTensor]:
    """GGUF name -> tensor, over the parts of one model. Raises UnavailableError for a type that gguf-py does not
    know."""
    from gguf import GGMLQuantizationType, GGUFReader

    known = {kind.value for kind in GGMLQuantizationType}
    used = {entry.type for path in paths for entry in GgufFile(path, TYPE_BYTES).tensors.values()}
    unknown = [kind.name for kind in BLOCK_TYPES if kind.code in used - known]
    if unknown:
        problem = f"the installed gguf-py does not know {', '.join(unknown)}"
        raise unavailable(problem, "update the gguf package once a release does", str(paths[0]))
    return {tensor.name: IndependentTensor(path, tensor) for path in paths for tensor in GGUFReader(path).tensors}
