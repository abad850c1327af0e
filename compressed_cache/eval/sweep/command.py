"""What the sweep command does with its options."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm
from transformers import AutoConfig

from compressed_cache.eval.results.row import FILE, Option, Result
from compressed_cache.eval.sweep import estimate, plan, processes, tasks
from compressed_cache.eval.sweep.folder import ERROR, Folder
from compressed_cache.eval.sweep.plan import SHIPPED, Cell, Plan
from compressed_cache.reasoner import MODEL_PATH


def run(options: argparse.Namespace) -> int:
    """Runs all cells that are still to do, or prints which those are."""
    try:
        asked = _plan(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    asked, problems = _expanded(asked)
    sizes, missing = tasks.sizes(asked)
    problems += [f"--tasks: {problem}" for problem in missing]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    if options.ray and not _has_ray():
        return 1

    folder = Folder(options.out)
    count = options.processes or torch.cuda.device_count() or 1
    try:
        if options.dry_run:
            folder.check(asked)
            outcomes = _outcomes(asked, folder)
            todo = _todo(asked, outcomes, options.retry_failed)
            at_once = None if options.ray else count
            print(estimate.page(asked, todo, outcomes, sizes, processes=at_once))
            return 0
        with folder.open(asked):
            return _work(asked, folder, options, count)
    except ConnectionError as error:
        print(f"--ray {options.ray}: {error}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"--out {options.out}: {error}", file=sys.stderr)
        return 1


def _work(asked: Plan, folder: Folder, options: argparse.Namespace, count: int) -> int:
    outcomes = _outcomes(asked, folder)
    todo = _todo(asked, outcomes, options.retry_failed)
    for cell in todo:
        if outcomes[cell.name] is not None:
            folder.forget(cell)
    if repeating := asked.repeating():
        print(f"greedy: seeds after the first repeat the rows of {', '.join(repeating)}")
    cells = asked.cells()
    bar: Any = tqdm(
        _run(asked, todo, folder, options, min(count, len(todo))),
        total=len(cells),
        initial=len(cells) - len(todo),
        unit="cell",
        disable=None,
    )
    try:
        for cell in bar:
            bar.write(_told(cell, folder.outcome(cell)))
    except KeyboardInterrupt:
        bar.close()
        print("stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    failed = [name for name, found in _outcomes(asked, folder).items() if isinstance(found, str)]
    print(f"{len(cells) - len(failed)} rows: {folder.path / FILE}")
    if failed:
        print(
            f"{len(failed)} of {len(cells)} cells failed, --retry-failed runs them again: "
            f"{', '.join(str(folder.cells / name / ERROR) for name in failed)}",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _run(
    asked: Plan, todo: list[Cell], folder: Folder, options: argparse.Namespace, count: int
) -> Iterator[Cell]:
    if options.ray and todo:
        from compressed_cache.eval.sweep import cluster

        gpus = options.gpus_per_cell
        return cluster.run(asked, todo, folder, address=options.ray, gpus=gpus)
    return processes.run(asked, todo, folder, processes=count)


def _has_ray() -> bool:
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError:
        print("ray is missing: pip install 'compressed-cache[cluster]'", file=sys.stderr)
        return False
    return True


def _outcomes(asked: Plan, folder: Folder) -> dict[str, Result | str | None]:
    return {cell.name: folder.outcome(cell) for cell in asked.cells()}


def _todo(asked: Plan, outcomes: estimate.Outcomes, retry_failed: bool) -> list[Cell]:
    def is_open(found: Result | str | None) -> bool:
        return found is None or (retry_failed and isinstance(found, str))

    return [cell for cell in asked.cells() if is_open(outcomes[cell.name])]


def _told(cell: Cell, outcome: Result | str | None) -> str:
    if not isinstance(outcome, Result):
        return f"{cell.name}: failed, {outcome}"
    low, high = outcome.accuracy_low, outcome.accuracy_high
    return (
        f"{cell.name}: {outcome.accuracy:.0%} [{low * 100:.0f}, {high * 100:.0f}], "
        f"{outcome.tokens:.0f} tokens, {outcome.seconds:.1f} s"
    )


def _plan(options: argparse.Namespace) -> Plan:
    for name in ("seeds", "limit", "batch_size", "processes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
    if options.gpus_per_cell is not None and not options.ray:
        raise ValueError("--gpus-per-cell must come with --ray")
    try:
        metadata = json.loads(options.metadata)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise ValueError(f"--metadata must be a JSON object, got {options.metadata!r}")
    model_args = _pairs("--model-args", options.model_args)
    if taken := [name for name in model_args if name == "pretrained" or name.startswith("kv_")]:
        raise ValueError(
            f"--model-args must not have {', '.join(taken)}: a sweep fills that in. Use --model, "
            "--policies, --budgets and --policy-args."
        )
    is_shipped = Path(options.model).resolve() == MODEL_PATH.resolve()
    return Plan(
        model=SHIPPED if is_shipped else options.model,
        tasks=options.tasks,
        policies=list(dict.fromkeys(options.policies)),
        budgets=list(dict.fromkeys(options.budgets)),
        seeds=options.seeds,
        options=_policy_options(options.policy_args),
        limit=options.limit,
        batch_size=options.batch_size,
        gen_kwargs=_pairs("--gen-kwargs", options.gen_kwargs),
        model_args=model_args | ({"dtype": options.dtype} if options.dtype else {}),
        chat=options.apply_chat_template,
        metadata=metadata,
    )


def _policy_options(texts: list[str]) -> dict[str, dict[str, Option]]:
    found: dict[str, dict[str, Option]] = {}
    for text in texts:
        policy, _, rest = text.rpartition(":")
        found.setdefault(policy, {}).update(_pairs("--policy-args", rest))
    return found


def _pairs(option: str, text: str) -> dict[str, Any]:
    if bad := [part for part in text.split(",") if part and "=" not in part]:
        raise ValueError(f"{option} must be NAME=VALUE with commas between, got {bad[0]!r}")
    return simple_parse_args_string(text)


def _expanded(asked: Plan) -> tuple[Plan, list[str]]:
    """The plan with its tasks one by one, and everything that is wrong with what was asked."""
    names, problems = tasks.expanded(asked.tasks)
    config = None
    known = {k: v for k, v in asked.model_args.items() if k in ("revision", "trust_remote_code")}
    try:
        config = AutoConfig.from_pretrained(asked.pretrained, **known)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        problems.append(f"--model {asked.model}: {first_line}")
    asked = replace(asked, tasks=names)
    # Options and budgets are the same for all tasks.
    one = replace(asked, tasks=names[:1] or ["any"])
    return asked, problems + list(plan.problems(one, config))
