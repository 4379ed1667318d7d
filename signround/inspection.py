"""What is inside an artifact or an exported file: grids, sizes, how often each code occurs; and the scheme table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from signround.artifact import QuantizedCheckpoint
from signround.checkpoint import SourceCheckpoint
from signround.exporting import ForeignFiles, available_exporters, make_exporters
from signround.formats import grid_for, scheme_names
from signround.grid import Grid
from signround.mixes import FILE_TYPES, PRESETS
from signround.qtensor import QuantizedTensor
from signround.runtimes.targets import kind_of

TYPICAL_COLUMNS = 4096  # a row length that every group divides, for the table of schemes


def inspect_target(target: Path) -> dict[str, Any]:
    """JSON values: kind, files with sizes, and for each grid the number of linears, weights and the code histogram.
    Where the format can tell (ONNX), its problems by name, in files of others too."""
    kind = kind_of(target)
    found: dict[str, Any] = {"kind": kind, "path": str(target), "bytes": _bytes(target)}
    if kind == "checkpoint":
        checkpoint = SourceCheckpoint(target)
        return found | {"tensors": len(checkpoint.tensors), "parameters": checkpoint.parameters}
    if kind == "artifact":
        artifact = QuantizedCheckpoint(target, allow_unfinished=True)
        found |= {
            "scheme": artifact.plan.scheme,
            "complete": artifact.manifest["complete"],
            "fingerprint": artifact.fingerprint,
            "calibration": artifact.manifest["calibration"],
            "tuning": artifact.plan.tuning.to_json(),
            "blocks": {"finished": len(artifact.records()), "planned": len(artifact.plan.blocks)},
        }
        if not artifact.manifest["complete"]:
            return found | {"grids": []}
        tensors = ((name, artifact.quantized(name)) for name in artifact.layers)
        return found | {"grids": _grids(tensors)}
    exporter = make_exporters([kind])[0]
    if isinstance(exporter, ForeignFiles):
        found |= exporter.inspected(target)
        if found["problems"] or not found["ours"]:
            return found | {"grids": []}
    exported = exporter.opened(target)
    if target.is_file():  # it may be the first of several
        found["bytes"] = sum(path.stat().st_size for path in exported.files)
    return found | {"grids": _grids(exporter.read_back(exported))}


def _bytes(target: Path) -> int:
    if target.is_file():
        return target.stat().st_size
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def _grids(tensors: Iterator[tuple[str, QuantizedTensor]]) -> list[dict[str, Any]]:
    histograms: dict[Grid, torch.Tensor] = {}
    counts: dict[Grid, int] = defaultdict(int)
    for _, tensor in tensors:
        grid = tensor.grid
        histogram = torch.bincount(tensor.codes.flatten().int(), minlength=grid.code_max + 1)
        histograms[grid] = histograms[grid] + histogram if grid in histograms else histogram
        counts[grid] += 1
    return [
        {
            "grid": grid.to_json(),
            "linears": counts[grid],
            "weights": int(histogram.sum()),
            "histogram": histogram.tolist(),
        }
        for grid, histogram in histograms.items()
    ]


def inspection_lines(found: Mapping[str, Any]) -> list[str]:
    """For a person: the histogram as bars."""
    lines = [f"{found['path']}: {found['kind']}, {found['bytes'] / 1e6:.1f} MB"]
    lines += [
        f"{key}: {found[key]}" for key in ("scheme", "fingerprint", "complete", "blocks", "parameters") if key in found
    ]
    lines += found.get("content", ())
    lines += [f"problem: {problem}" for problem in found.get("problems", ())]
    for entry in found.get("grids", ()):
        grid = entry["grid"]
        kind = f"{grid['bits']} bits, group {grid['group'] or 'whole rows'}, {grid['zero']}"
        noun = "matrix" if entry["linears"] == 1 else "matrices"
        lines.append(f"{entry['linears']} {noun}, {entry['weights']:,} weights: {kind}")
        top = max(entry["histogram"])
        shown = entry["histogram"] if len(entry["histogram"]) <= 16 else []
        lines += [
            f"  {code:3d} {count / entry['weights']:6.2%} {'#' * (40 * count // top)}"
            for code, count in enumerate(shown)
        ]
    return lines


def scheme_table() -> list[dict[str, Any]]:
    """Everything that `--scheme` takes: grids, then llama.cpp's file types, then presets (`kind`). With stored bits a
    weight (row of 4096; of most matrices in a mix), the installed formats that hold it, and what it is. A name may be
    there as a grid and as a file type: it is the mix where all wanted formats read file types."""
    exporters = make_exporters(list(available_exporters()))
    rows = []
    for scheme in scheme_names():
        floored = {exporter.name: grid_for(scheme, exporter.zero_floor) for exporter in exporters}
        holders = [each.name for each in exporters if each.holds(floored[each.name], TYPICAL_COLUMNS)]
        rows.append(_row(scheme, "grid", scheme, holders, "one grid for all linears"))
    readers = [exporter.name for exporter in exporters if exporter.file_types]
    rows += [_row(row.name, "file type", row.type, readers, row.description) for row in FILE_TYPES.values()]
    for preset in PRESETS.values():
        rows.append(_row(preset.name, "preset", FILE_TYPES[preset.file_type].type, readers, preset.purpose))
    return rows


def _row(scheme: str, kind: str, type: str, formats: list[str], description: str) -> dict[str, Any]:
    bits = grid_for(type).bits_per_weight(TYPICAL_COLUMNS)
    return {
        "scheme": scheme, "kind": kind, "bits_per_weight": bits, "formats": formats, "description": description,
    }  # fmt: skip
