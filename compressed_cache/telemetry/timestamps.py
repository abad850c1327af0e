"""Moments that are noted now and compared later, so that nothing waits for the device."""

import time
from collections.abc import Sequence
from itertools import pairwise

import torch


class Timestamp:
    """A moment: on the host, and on the current CUDA stream where there is one."""

    def __init__(self) -> None:
        self.host_s = time.perf_counter()
        self.event: torch.cuda.Event | None = None
        if torch.cuda.is_initialized():
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()


def seconds_between(marks: Sequence[Timestamp], device: torch.device) -> list[float]:
    """Seconds from each to the next, of the device; waits until it has passed the last."""
    pairs = list(pairwise(marks))
    if device.type != "cuda":
        return [after.host_s - before.host_s for before, after in pairs]
    found = []
    for before, after in pairs:
        assert before.event is not None and after.event is not None
        after.event.synchronize()
        found.append(before.event.elapsed_time(after.event) / 1000)
    return found
