"""Sweeps whose processes and machines are killed for real."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from compressed_cache.__main__ import main
from compressed_cache.eval.results.row import FILE, from_json, read

pytest.importorskip("lm_eval")
from compressed_cache.eval.sweep import processes
from compressed_cache.eval.sweep.cell import take
from compressed_cache.eval.sweep.folder import RESULT, Folder
from compressed_cache.eval.sweep.group import Group
from compressed_cache.eval.sweep.plan import Plan

PLAN = Plan(
    model="shipped",
    tasks=["reasoning_shipped_easy"],
    policies=["full", "h2o"],
    # So many that a sweep is not at its end when it is killed.
    budgets=[64, 72, 80],
    seeds=1,
    limit=2,
    gen_kwargs={"max_gen_toks": 30},
)
NAMES = [cell.name for cell in PLAN.cells()]
ROOT = Path(__file__).parent.parent
PATIENCE = 180


def command(out: Path, *more: str) -> list[str]:
    """The command for :data:`PLAN`."""
    return [
        *("sweep", "--model=shipped", f"--tasks={PLAN.tasks[0]}", "--policies=full,h2o"),
        *("--budgets=64,72,80", "--limit=2", "--gen-kwargs=max_gen_toks=30", f"--out={out}", *more),
    ]


@contextmanager
def started(out: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, which ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "compressed_cache", *command(out, *more)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What the condition gives, once it is true."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def worker_of(sweep: int) -> psutil.Process | None:
    """The process that has the cells of a sweep."""
    children = psutil.Process(sweep).children()
    return next((c for c in children if "spawn_main" in " ".join(c.cmdline())), None)


def num_rows(out: Path) -> int:
    return (out / FILE).read_bytes().count(b"\n") if (out / FILE).exists() else 0


def essence(rows: list[Any]) -> dict[Any, Any]:
    """What must not depend on when, where and how often a sweep was killed."""
    return {
        (row.policy, row.budget): (row.accuracy, row.correct, row.tokens, row.evicted_tokens)
        for row in rows
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """The rows of all cells, each run in this process."""
    rows: list[Any] = []
    for cell in PLAN.cells():
        folder = tmp_path_factory.mktemp(cell.policy)
        assert take(PLAN, Group((cell,)), [folder])
        rows += [from_json((folder / RESULT).read_text())]
    return essence(rows)


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_and_its_process_were_killed_and_none_outlives_it(
    tmp_path: Path, unbroken: dict[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(tmp_path)
    first = PLAN.cells()[0]
    with started(tmp_path) as process:
        wait_for(lambda: worker_of(process.pid), process).kill()
        # Another process has the next cells.
        wait_for(lambda: num_rows(tmp_path), process)
        orphan = worker_of(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        assert orphan is not None
        orphan.wait(timeout=PATIENCE)
    outcome = folder.outcome(first)
    assert outcome == "its process was ended by SIGKILL, as the system does when memory runs out"
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"cells/*/{RESULT}")}
    assert kept
    row = (tmp_path / FILE).read_bytes().splitlines()[0]

    assert main(command(tmp_path, "--retry-failed", "--minutes-per-cell=10")) == 0
    said = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (tmp_path / FILE).read_bytes().splitlines()[0] == row
    rows = read(tmp_path)
    assert len(rows) == len(NAMES)
    assert essence(rows) == unbroken
    assert sorted(os.listdir(tmp_path / "cells")) == sorted(NAMES)
    # Those that were done did not run again.
    assert len(said.splitlines()) == len(NAMES) - len(kept) + 1


@pytest.mark.parametrize("together", [False, True])
def test_a_cell_that_takes_too_long_is_ended_and_the_next_one_begins(
    together: bool, tmp_path: Path
) -> None:
    folder, (first, second, *_) = Folder(tmp_path), PLAN.cells()
    groups = [Group((first, second))] if together else [Group((first,)), Group((second,))]
    with folder.open(PLAN):
        # Before it has as much as imported torch.
        done = list(processes.run(PLAN, [groups], folder, processes=1, minutes=0.0001))
    assert done == [first, second]
    for cell in done:
        assert folder.outcome(cell) == "it took longer than --minutes-per-cell 0.0001"
    assert not list(folder.cells.glob(".*"))


@pytest.mark.slow
def test_a_killed_process_costs_cells_that_read_together_nothing_but_time(tmp_path: Path) -> None:
    def reader() -> psutil.Process | None:
        # All its cells have begun.
        if len(list(tmp_path.glob("cells/.*h2o*"))) < 3:
            return None
        return worker_of(process.pid)

    with started(tmp_path, "--measure=agreement") as process:
        wait_for(reader, process).kill()
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    rows = read(tmp_path)
    assert [(row.policy, row.budget) for row in rows] == [
        ("full", None),
        ("h2o", 64),
        ("h2o", 72),
        ("h2o", 80),
    ]
    assert sorted(os.listdir(tmp_path / "cells")) == sorted(NAMES)


@pytest.mark.slow
def test_a_cell_whose_machine_is_killed_is_sent_to_another(
    tmp_path: Path, unbroken: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Other tests of this process may have left helpers of Python that live as long as it does.
    before = set(psutil.Process().children(recursive=True))
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        doomed, _ = (cluster.add_node(num_cpus=1) for _ in range(2))
        raylet = psutil.Process(doomed.all_processes["raylet"][0].process.pid)
        servants = set(psutil.Process().children(recursive=True)) - before

        def has_cell() -> bool:
            return any(child.name().startswith("ray::_files") for child in raylet.children())

        with started(tmp_path, f"--ray={cluster.address}") as process:
            wait_for(has_cell, process)
            cluster.remove_node(doomed, allow_graceful=False)
            said, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    finally:
        cluster.shutdown()
    # Ray tells of the machine in between.
    told = [line.split(":")[0] for line in said.splitlines()]
    assert sorted(name for name in told if name in NAMES) == sorted(NAMES)
    rows = read(tmp_path)
    assert len(rows) == len(NAMES)
    assert essence(rows) == unbroken
    _, alive = psutil.wait_procs(servants, timeout=PATIENCE)
    assert not alive
