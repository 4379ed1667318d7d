"""What this machine has, and the peak memory of a stage as the operating system saw it."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import psutil

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak_memory() -> None:
    """Start a new measurement. Linux resets its high-water mark; elsewhere the peak of the whole process remains.

    What earlier stages freed goes back to the system first.
    """
    return_freed_memory()
    if _CLEAR.exists():
        _CLEAR.write_text("5")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def return_freed_memory() -> None:
    """Give the pages of freed blocks back to the system (glibc's malloc_trim; other C libraries do so on their own).

    glibc keeps what is freed below a threshold that grows with use: a model that wrote its own calibration text would
    stay resident, whole, for the rest of the job.
    """
    if sys.platform != "linux":
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:
        return
    trim(0)


def peak_memory() -> tuple[int, int]:
    """(peak resident bytes of this process, peak bytes allocated on the CUDA device) since the last reset."""
    device = 0
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        device = torch.cuda.max_memory_allocated()
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024, device
    return psutil.Process().memory_info().rss, device


def physical_memory() -> int:
    """Bytes of RAM in this machine."""
    return int(psutil.virtual_memory().total)


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
