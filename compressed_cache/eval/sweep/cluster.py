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
from compressed_cache.eval.sweep.group import Group
from compressed_cache.eval.sweep.plan import Cell, Plan

RETRIES = 3
"""How often a task is sent again when its machine or process dies."""


def run(
    plan: Plan,
    phases: Iterable[Iterable[Group]],
    folder: Folder,
    *,
    address: str,
    gpus: float | None,
) -> Iterator[Cell]:
    """Runs groups of cells, each of which is published in the folder when it is yielded.

    Args:
        plan: theirs.
        phases: groups, of which those of a phase begin when all of the phase before have ended.
        folder: open, on this machine.
        address: of a cluster, ``auto`` for the one this machine belongs to.
        gpus: share of a GPU for each group; None for a whole one if the cluster has any.

    Raises:
        ConnectionError: there is no such cluster.
    """
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        if gpus is None:
            gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_files)
        for phase in phases:
            running = {task.remote(plan, group): group for group in phase}
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                group = running.pop(done)
                partials = [folder.begin(cell) for cell in group.cells]
                try:
                    for partial, files in zip(partials, ray.get(done), strict=True):
                        for name, content in files.items():
                            (partial / name).write_bytes(content)
                except RayError as error:
                    for partial in partials:
                        write_error(partial, f"{type(error).__name__}: {error}")
                for cell, partial in zip(group.cells, partials, strict=True):
                    folder.publish(cell, partial)
                yield from group.cells
    finally:
        ray.shutdown()


def _files(plan: Plan, group: Group) -> list[dict[str, bytes]]:
    from compressed_cache.eval.sweep.cell import take

    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, str(number)) for number in range(len(group.cells))]
        for folder in folders:
            folder.mkdir()
        take(plan, group, folders)
        return [{path.name: path.read_bytes() for path in one.iterdir()} for one in folders]
