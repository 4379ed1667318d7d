"""What commands print: tables for people, one JSON document for programs, one sentence for refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from signround.errors import RefusedError, SignroundError
from signround.files import finite
from signround.report import COLUMNS, form_lines, summary_lines, table_rows


def print_json(data: Any) -> None:
    """The only thing on stdout when --json is given."""
    sys.stdout.write(json.dumps(finite(data), indent=2) + "\n")


def print_lines(lines: Sequence[str]) -> None:
    console = Console(highlight=False)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(table, markup=False) if console.is_terminal else Console(highlight=False, width=200).print(table)


def print_report(report: Mapping[str, Any], folder: str) -> None:
    """The table at the end of the main job."""
    print_lines(summary_lines(report))
    if report["exports"]:
        print_lines([""])
        print_table(COLUMNS, table_rows(report))
        print_lines(form_lines(report))
    print_lines(["", f"written to {folder}: report.json, report.md, report.html"])


def print_error(error: SignroundError) -> None:
    """One line a reason on stderr."""
    reasons = [refusal.sentence() for refusal in error.refusals] if isinstance(error, RefusedError) else [str(error)]
    for reason in reasons:
        sys.stderr.write(f"signround: {reason}\n")
