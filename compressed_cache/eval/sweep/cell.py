"""One cell, run in this process."""

import functools
import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval
import torch

from compressed_cache.eval.results.row import Result
from compressed_cache.eval.sweep import folder as files
from compressed_cache.eval.sweep.plan import Cell, Plan
from compressed_cache.eval.sweep.tasks import manager
from compressed_cache.integrations.harness import adapter
from compressed_cache.integrations.harness.arguments import PressArguments
from compressed_cache.integrations.harness.preflight import check_tasks

PACKAGES = ("compressed-cache", "lm-eval", "torch", "transformers")


def take(plan: Plan, cell: Cell, folder: Path) -> bool:
    """Runs a cell and writes what came of it.

    Args:
        plan: the cell's.
        cell: what to run.
        folder: gains ``log.txt``, and ``samples.jsonl`` and ``result.json`` or ``error.json``.

    Returns:
        Whether there is a result. If not, this process may be no good for another cell.
    """
    with _output_to(folder / files.LOG):
        try:
            result, samples = _measure(plan, cell)
        except Exception as error:
            traceback.print_exc()
            _model.cache_clear()
            files.write_error(folder, f"{type(error).__name__}: {error}")
            return False
    with (folder / files.SAMPLES).open("w") as file:
        file.writelines(json.dumps(sample, default=str) + "\n" for sample in samples)
    (folder / files.RESULT).write_text(result.to_json() + "\n")
    return True


def _measure(plan: Plan, cell: Cell) -> tuple[Result, list[dict[str, Any]]]:
    started = time.perf_counter()
    model = _model(json.dumps({"pretrained": plan.pretrained} | plan.model_args), plan.batch_size)
    press = PressArguments(cell.policy, cell.cache_arguments)
    adapter.change_press(model, press)
    run: dict[str, Any] = dict(
        tasks=[cell.task],
        task_manager=manager(plan.metadata),
        limit=plan.limit,
        samples=None,
        gen_kwargs=plan.gen_kwargs or None,
        apply_chat_template=plan.chat,
        system_instruction=None,
        fewshot_as_multiturn=True,
    )
    check_tasks(model, plan.model_args, run)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    # Its decorator hides its parameters.
    simple_evaluate: Any = lm_eval.simple_evaluate
    results = simple_evaluate(
        model=model, bootstrap_iters=0, log_samples=True, **run, **dict.fromkeys(seeds, cell.seed)
    )
    found, samples = results["results"][cell.task], results["samples"][cell.task]
    meter = model.compressed_cache.meter
    options = {k: v for k, v in press.describe().items() if k not in ("policy", "budget")}
    result = Result(
        model=plan.model,
        task=cell.task,
        policy=cell.policy,
        options=options,
        budget=cell.budget,
        seed=cell.seed,
        documents=found["sample_len"],
        accuracy=found["accuracy,none"],
        accuracy_low=found["accuracy_low,none"],
        accuracy_high=found["accuracy_high,none"],
        tokens=found["tokens,none"],
        truncated=found["truncated,none"],
        evicted_tokens=found["evicted_tokens,none"],
        held_tokens=found["held_tokens,none"],
        cache_bytes=found["cache_bytes,none"],
        tokens_per_s=sum(record.tokens for record in meter.records) / meter.seconds,
        seconds=time.perf_counter() - started,
        correct={_identity(sample): sample["accuracy"] for sample in samples},
        versions={"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        machine={
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "architecture": platform.machine(),
            "threads": torch.get_num_threads(),
        },
    )
    return result, samples


@functools.lru_cache(maxsize=1)
def _model(arguments: str, batch_size: int) -> Any:
    """The harness's model; the cells of a process share it."""
    from lm_eval.models.huggingface import HFLM

    adapter.patch(HFLM)
    model: Any = HFLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model(**json.loads(arguments), kv_press="full", device=device, batch_size=batch_size)


def _identity(sample: dict[str, Any]) -> str:
    # Its place alone would pair different documents, once the data has changed.
    return f"{sample['doc_id']}-{sample['doc_hash'][:8]}"


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Sends all output of the process, that of libraries in C too, into a file."""
    kept = {}
    with path.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number in (1, 2):
            kept[number] = os.dup(number)
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
