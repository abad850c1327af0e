"""Cells in processes of this machine, one per GPU.

Not a pool of ``concurrent.futures``, which gives up all its work when one process is killed: here
that is the error of one cell, and a new process takes the next.
"""

import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from compressed_cache.eval.sweep.folder import Folder, write_error
from compressed_cache.eval.sweep.group import Group
from compressed_cache.eval.sweep.plan import Cell, Plan

# A forked process cannot use the GPU.
_CONTEXT = multiprocessing.get_context("spawn")


def run(
    plan: Plan,
    phases: Iterable[Iterable[Group]],
    folder: Folder,
    *,
    processes: int,
    minutes: float | None = None,
) -> Iterator[Cell]:
    """Runs groups of cells, each of which is published in the folder when it is yielded.

    Args:
        plan: theirs.
        phases: groups, of which those of a phase begin when all of the phase before have ended.
        folder: open.
        processes: how many groups run at a time.
        minutes: after which a process is ended, for each cell of its group; None for no limit.
    """
    workers = [_Worker(plan, folder, number, processes, minutes) for number in range(processes)]
    busy: dict[Connection, _Worker] = {}
    try:
        for phase in phases:
            waiting = deque(phase)
            while waiting or busy:
                for worker in workers:
                    if waiting and worker not in busy.values():
                        busy[worker.begin(waiting.popleft())] = worker
                rest = None if minutes is None else min(one.rest() for one in busy.values())
                for pipe in wait(list(busy), rest):
                    assert isinstance(pipe, Connection)
                    cells, again = busy.pop(pipe).end()
                    waiting.extend(again)
                    yield from cells
                for worker in busy.values():
                    if not worker.rest():
                        worker.end_late()
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that is started when it is needed and keeps its model from group to group."""

    def __init__(
        self, plan: Plan, folder: Folder, number: int, processes: int, minutes: float | None
    ) -> None:
        self._plan, self._folder = plan, folder
        self._number, self._processes = number, processes
        self._minutes = minutes
        self._deadline = math.inf
        self._is_late = False
        self._process: Any = None
        self._pipe: Any = None
        self._group: Any = None
        self._partials: list[Path] = []

    def begin(self, group: Group) -> Connection:
        """Starts a group and returns what becomes readable at its end."""
        if self._process is not None and not self._process.is_alive():
            self.stop()
        if self._process is None:
            self._pipe, theirs = _CONTEXT.Pipe()
            arguments = (theirs, self._plan, self._number, self._processes)
            self._process = _CONTEXT.Process(target=_serve, args=arguments)
            self._process.start()
            # Else the pipe would not end with the process.
            theirs.close()
        self._group = group
        self._is_late = False
        if self._minutes is not None:
            self._deadline = time.monotonic() + 60 * self._minutes * len(group.cells)
        self._partials = [self._folder.begin(cell) for cell in group.cells]
        # If it ends just now, the pipe ends too.
        with suppress(BrokenPipeError):
            self._pipe.send((group, self._partials))
        return self._pipe

    def rest(self) -> float:
        """Seconds that the group may still take."""
        return max(0.0, self._deadline - time.monotonic())

    def end_late(self) -> None:
        """Ends the process of a group that has had its time, as :meth:`end` will find."""
        self._is_late = True
        self._process.kill()
        self._process.join()

    def end(self) -> tuple[Sequence[Cell], Iterable[Group]]:
        """The cells, published, and what is to run again.

        That is each cell of a group alone whose process was ended, to find out whose fault it was.
        """
        try:
            is_well = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            if len(self._group.cells) > 1:
                self.stop()
                for partial in self._partials:
                    shutil.rmtree(partial)
                return (), self._group.singly()
            cause = _cause(self._process.exitcode)
            if self._is_late:
                cause = f"it took longer than --minutes-per-cell {self._minutes:g}"
            write_error(self._partials[0], cause)
            is_well = False
        for cell, partial in zip(self._group.cells, self._partials, strict=True):
            self._folder.publish(cell, partial)
        if not is_well:
            self.stop()
        return self._group.cells, ()

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _cause(exitcode: int) -> str:
    if exitcode >= 0:
        return f"its process ended with status {exitcode}, see log.txt"
    name = signal.Signals(-exitcode).name
    memory = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{memory}"


def _serve(pipe: Connection, plan: Plan, number: int, processes: int) -> None:
    # Ctrl-C reaches all processes of a terminal; the sweep itself ends these.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _choose_gpu(number)

    import torch
    from tqdm import tqdm

    from compressed_cache.eval.sweep.cell import take

    # Its own is a semaphore of the system, which a process that is killed leaves behind.
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    while True:
        try:
            group, partials = pipe.recv()
        except EOFError:
            return
        pipe.send(take(plan, group, partials))


def _end_with_parent() -> None:
    """A sweep that was killed must not have cells that go on."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was started by a sweep"
    parent.join()
    os._exit(1)


def _choose_gpu(number: int) -> None:
    """Lets this process see one GPU of those that the sweep may use."""
    import torch

    count = torch.cuda.device_count()
    if count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number % count]
