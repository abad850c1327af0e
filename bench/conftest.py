"""Keeps what the benchmarks measured in bench/results, one file per machine."""

import ctypes
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compressed_cache
from bench.results import FOLDER, Results
from compressed_cache.eval.demo.report import processor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MEASURED = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results",
        type=Path,
        default=FOLDER,
        help="folder of the file that keeps what was measured on this machine",
    )


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Each row takes graphs of its own, and torch makes only a few of one function."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def _steady_memory() -> None:
    """Lets glibc keep large blocks.

    As it is, a cache that allocates itself anew in each step takes up to twice as long, as chance
    has it: most of all DynamicCache, which everything is compared with.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    # For processes that a benchmark starts.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 25)
    os.environ["MALLOC_TRIM_THRESHOLD_"] = str((1 << 31) - 1)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config: Any = terminalreporter.config
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    for benchmark in vars(config)["_benchmarksession"].benchmarks:
        row = {"group": benchmark.group, **benchmark.extra_info}
        tables = measured.setdefault(row["device"], {})
        tables.setdefault(row.pop("table"), {})[benchmark.fullname] = row
    for device, tables in measured.items():
        folder = config.getoption("--results")
        results = Results.of(_hardware(device), device, folder)
        for table, rows in tables.items():
            results.add(table, rows, _conditions(device))
        results.save(folder)
    config.stash[_MEASURED] = measured


def pytest_unconfigure(config: pytest.Config) -> None:
    # After pytest's own last line, so that this is the last.
    if measured := config.stash.get(_MEASURED, None):
        print(json.dumps(measured), file=sys.__stdout__)


def _hardware(device: str) -> str:
    return processor() if device == "cpu" else torch.cuda.get_device_name()


def _conditions(device: str) -> dict[str, object]:
    return {
        "threads": torch.get_num_threads(),
        "dtype": "float32" if device == "cpu" else "bfloat16",
        "versions": {
            "compressed_cache": compressed_cache.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
