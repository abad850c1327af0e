"""Keeps what the benchmarks measured in bench/results, one file per table and device."""

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compressed_cache
from compressed_cache.demo.report import processor

RESULTS = Path(__file__).resolve().parent / "results"


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    session: Any = vars(terminalreporter.config)["_benchmarksession"]
    rows: dict[tuple[str, str], list[dict[str, object]]] = {}
    for benchmark in session.benchmarks:
        row = dict(benchmark.extra_info)
        rows.setdefault((row.pop("table"), row["device"]), []).append(row)
    for (table, device), measured in rows.items():
        document = {"conditions": _conditions(device), "rows": measured}
        path = RESULTS / f"{table}-{device}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        terminalreporter.write_line(json.dumps({"written": path.name, "rows": len(measured)}))


def _conditions(device: str) -> dict[str, object]:
    return {
        "hardware": processor() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "dtype": "float32" if device == "cpu" else "bfloat16",
        "versions": {
            "compressed_cache": compressed_cache.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
