"""An ONNX file of more than 2 GiB: written in less than 1 GB of memory, loaded and run by onnxruntime."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parent.parent
DISK, MEMORY = 12e9, 6e9


@pytest.mark.slow
def test_a_file_of_more_than_2_gib_runs(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < DISK or psutil.virtual_memory().available < MEMORY:
        pytest.skip(f"needs {DISK / 1e9:.0f} GB of disk and {MEMORY / 1e9:.0f} GB of memory")
    result = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--large", "--to", "onnx"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path), "--json", str(result)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr  # 1 when the peak reaches 1 GB
    (row,) = json.loads(result.read_text())
    assert row["largest_file"] > 2**31
    assert row["running"] > 0
