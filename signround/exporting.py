"""What the pipeline asks of an exporter, and how it finds one. The exporters themselves live in another room.

A third party ships one class that fits `Exporter` and one line of packaging:

    [project.entry-points."signround.exporters"]
    myformat = "my_package:MyExporter"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from signround.artifact import QuantizedCheckpoint
from signround.errors import Refusal, refuse
from signround.events import Listener
from signround.grid import Grid
from signround.plan import ModelPlan
from signround.qtensor import QuantizedTensor

GROUP = "signround.exporters"
KINDS = {bool: "true or false", int: "a whole number", float: "a number"}  # of options, as errors say them


@dataclass(frozen=True)
class ExportedModel:
    """What an exporter wrote. `target` is the path a user gives to the runtime (a file or a folder); `kept_dtype` is
    the dtype that unquantised matrices were stored in (None: each in its own, so nothing was lost); `added` says what
    the format adds, in float32, to every value of a kept tensor (Gemma's norms in GGUF: weight + 1); `untouched` names
    the kept matrices that are stored in float32 whatever `kept_dtype` says (routers to experts); `casts_vectors` says
    that norms and biases have `kept_dtype` too."""

    format: str
    target: Path
    files: tuple[Path, ...]
    kept_dtype: torch.dtype | None = None
    added: Mapping[str, float] = dataclasses.field(default_factory=dict)
    untouched: frozenset[str] = frozenset()
    casts_vectors: bool = False


@runtime_checkable
class Exporter(Protocol):
    """Lays out the bits of an artifact for one runtime. Never rounds; never sees a float weight of a quantised layer.

    An exporter is a frozen dataclass whose fields are its options, so that every option has a type and a default.
    """

    @property
    def name(self) -> str:
        """The word after `--to`, and the name of the output folder."""
        ...

    @property
    def zero_floor(self) -> int:
        """The lowest zero point that the format can hold; the tuner keeps to it (GPTQ v1: 1)."""
        ...

    @property
    def file_types(self) -> bool:
        """Whether `--scheme q4_k_m` and its like, llama.cpp's mixes of types, mean something to this format. Names that
        are a grid as well (q4_0) mean the mix only where every wanted format says yes."""
        ...

    def holds(self, grid: Grid, columns: int) -> bool:
        """Whether rows of `columns` weights on this grid can be stored; the table of schemes asks."""
        ...

    def refusals(self, plan: ModelPlan) -> list[Refusal]:
        """Every reason why this plan cannot be written, all at once, before any work."""
        ...

    def notes(self, plan: ModelPlan) -> list[str]:
        """What the user should know before the work: containers that grow, loaders that will refuse the file. Each
        note begins with the name of the format and a colon."""
        ...

    def estimated_bytes(self, plan: ModelPlan) -> int:
        """Size of the files to come, within a few per cent."""
        ...

    def export(self, artifact: QuantizedCheckpoint, out: Path, on_event: Listener) -> ExportedModel:
        """Write into the folder `out` (whole or absent). Raises FailedError when the disk is full."""
        ...

    def more_exact(self, plan: ModelPlan) -> Exporter | None:
        """The same exporter with less rounding of activations in the runtime, at a price in speed; None when there
        is no such step. The pipeline takes it when the file is exact but the runtime misses its gate."""
        ...

    def opened(self, target: Path) -> ExportedModel:
        """Describe files written earlier, from the files alone. Raises RefusedError when they are not ours to read."""
        ...

    def read_back(self, exported: ExportedModel) -> Iterator[tuple[str, QuantizedTensor]]:
        """Parse our own file again: (weight name of the checkpoint, integers and fields)."""
        ...

    def decode_independently(self, exported: ExportedModel) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model as a reader that is not ours decodes it: (checkpoint name, float32 tensor in the
        checkpoint's orientation and row order, with what `ExportedModel.added` says). Quantised and kept tensors
        alike; a tied head is left out."""
        ...


@runtime_checkable
class ForeignFiles(Protocol):
    """An exporter that can look into files of its format that others wrote, and into damaged ones of ours."""

    def inspected(self, target: Path) -> dict[str, Any]:
        """JSON values: `ours` (whether this exporter wrote it), `problems` (texts, each with the name it is about) and
        what the format's own words for its content are. Raises RefusedError when nothing can be read."""
        ...


def missing_packages(modules: Sequence[str], extra: str, subject: str) -> list[Refusal]:
    """One refusal when some of `modules`, which the extra `extra` of signround installs, cannot be imported."""
    absent = [name for name in modules if find_spec(name) is None]
    if not absent:
        return []
    problem = f"{', '.join(absent)} must be installed, and {'is' if len(absent) == 1 else 'are'} not"
    return [Refusal(problem, f"run `pip install 'signround[{extra}]'`", subject)]


def available_exporters() -> dict[str, EntryPoint]:
    """Name -> entry point of every installed exporter, in alphabetical order; `.load()` gives the class, and a broken
    plug-in then raises its own ImportError without harming the others."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def make_exporters(names: Sequence[str], options: Mapping[str, Mapping[str, str]] | None = None) -> list[Exporter]:
    """Exporters by name, each with its options (strings are converted to the type of the default).

    Raises RefusedError for an unknown name or option, an option of a format that is not asked for, and a bad value.
    """
    classes = available_exporters()
    options = options or {}
    for name in [*names, *options]:
        if name not in classes:
            raise refuse(
                f"format {name!r} is not known; installed are {', '.join(classes)}", "choose one of them", "--to"
            )
    unused = [name for name in options if name not in names]
    if unused:
        option = next(iter(options[unused[0]]))
        raise refuse(
            f"the option {unused[0]}.{option} is given, but {unused[0]} is not exported",
            f"add --to {unused[0]}, or leave the option out",
            "--to",
        )
    return [_configured(name, classes[name].load(), options.get(name, {})) for name in dict.fromkeys(names)]


def changed_options(before: Exporter, after: Exporter) -> str:
    """What sets `after` apart from `before`, an exporter of the same class, as `--set` would say it."""
    names = [field.name for field in dataclasses.fields(cast("Any", after))]
    values = {name: (getattr(before, name), getattr(after, name)) for name in names}
    return " ".join(f"{after.name}.{name}={_spelled(new)}" for name, (old, new) in values.items() if old != new)


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _configured(name: str, kind: type[Any], options: Mapping[str, str]) -> Exporter:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, text in options.items():
        if key not in fields:
            allowed = ", ".join(fields) or "none"
            raise refuse(f"{name} has no option {key!r}; its options are: {allowed}", "choose one of them", "--set")
        default = fields[key].default
        try:
            values[key] = _parsed(text, default)
        except ValueError as error:
            raise refuse(
                f"{name}.{key} needs {KINDS.get(type(default), 'text')}, got {text!r}", "give such a value", "--set"
            ) from error
    exporter: Exporter = kind(**values)
    return exporter


def _parsed(text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return type(default)(text)
