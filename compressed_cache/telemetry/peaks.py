"""The most memory that was in use."""

import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

_STATUS = Path("/proc/self/status")


class Peaks(NamedTuple):
    """The most bytes that were in use; None: not there, or not known."""

    allocated: int | None
    reserved: int | None
    rss: int | None


def restart() -> None:
    """From now on counts on CUDA devices; this is PyTorch's own count, one for all."""
    for device in _devices():
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> Peaks:
    """The most since :func:`restart`, of all CUDA devices together, and of the host ever.

    Args:
        device: that of the model; if it is no CUDA device, these do not count.
    """
    devices = _devices()
    if device.type != "cuda":
        return Peaks(None, None, _rss())
    return Peaks(
        sum(map(torch.cuda.max_memory_allocated, devices)),
        sum(map(torch.cuda.max_memory_reserved, devices)),
        _rss(),
    )


def _devices() -> range:
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)


def _rss() -> int | None:
    if _STATUS.exists():
        # Not getrusage, whose maximum a process inherits from the one that started it.
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        return int(found[1]) * 1024 if found else None
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
