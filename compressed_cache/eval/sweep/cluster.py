"""Cells as tasks of Ray, for more than one machine.

A task returns its files and the sweep writes them, so that the machines need no common folder.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import ray
from ray.exceptions import RayError

from compressed_cache.eval.sweep.folder import Folder, write_error
from compressed_cache.eval.sweep.plan import Cell, Plan

RETRIES = 3
"""How often a task is sent again when its machine or process dies."""


def run(
    plan: Plan, cells: Iterable[Cell], folder: Folder, *, address: str, gpus: float | None
) -> Iterator[Cell]:
    """Runs cells, each of which is published in the folder when it is yielded.

    Args:
        plan: theirs.
        cells: what to run.
        folder: open, on this machine.
        address: of a cluster, ``auto`` for the one this machine belongs to.
        gpus: share of a GPU for each cell; None for a whole one if the cluster has any.

    Raises:
        ConnectionError: there is no such cluster.
    """
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        if gpus is None:
            gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_files)
        running = {task.remote(plan, cell): cell for cell in cells}
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(done)
            partial = folder.begin(cell)
            try:
                for name, content in ray.get(done).items():
                    (partial / name).write_bytes(content)
            except RayError as error:
                write_error(partial, f"{type(error).__name__}: {error}")
            folder.publish(cell, partial)
            yield cell
    finally:
        ray.shutdown()


def _files(plan: Plan, cell: Cell) -> dict[str, bytes]:
    from compressed_cache.eval.sweep.cell import take

    with tempfile.TemporaryDirectory() as folder:
        take(plan, cell, Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
