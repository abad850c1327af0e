"""What the sweep command does with its options."""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from compressed_cache.eval.agreement import text as texts
from compressed_cache.eval.results.row import FILE, Agreement, Measured, Option, Result, Row
from compressed_cache.eval.sweep import estimate, plan, processes, prompts, tasks
from compressed_cache.eval.sweep.folder import ERROR, Folder
from compressed_cache.eval.sweep.group import Group, together
from compressed_cache.eval.sweep.plan import Cell, Plan, named, options_of, policy_of
from compressed_cache.hf.loading import why
from compressed_cache.policies import canonical_name
from compressed_cache.wording import listing, missing, nearest

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
"""Those that weights are loaded in."""
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """Where and how a plan is carried out, as the options of the command say."""

    out: str
    retry_failed: bool = False
    dry_run: bool = False
    processes: int | None = None
    ray: str | None = None
    gpus_per_cell: float | None = None
    minutes_per_cell: float | None = None


def run(options: argparse.Namespace) -> int:
    """Runs all cells that are still to do, or prints which those are."""
    asked, problems = _plan(options)
    given = {part.name: getattr(options, part.name) for part in fields(Run)}
    return carry_out(asked, Run(**given), problems)


def carry_out(asked: Plan, options: Run, problems: Sequence[str] = ()) -> int:
    """The same of a plan, unless there are problems with it or with how it was asked for."""
    asked, further = _expanded(asked)
    sizes, unknown = tasks.sizes(asked)
    problems = [*problems, *further, *(f"--tasks: {problem}" for problem in unknown)]
    # What is asked of the model and of data that are there.
    problems += prompts.too_long(asked) if not problems else ()
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


def _work(asked: Plan, folder: Folder, options: Run, count: int) -> int:
    outcomes = _outcomes(asked, folder)
    todo = _todo(asked, outcomes, options.retry_failed)
    for cell in todo:
        if outcomes[cell.name] is not None:
            folder.forget(cell)
    if repeating := asked.repeating():
        print(f"greedy: seeds after the first repeat the rows of {', '.join(repeating)}")
    cells = asked.cells()
    phases = _phases(asked, todo, folder, count)
    bar: Any = tqdm(
        _run(asked, phases, folder, options, min(count, len(todo))),
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
    outcomes = _outcomes(asked, folder)
    failed = [name for name, found in outcomes.items() if isinstance(found, str)]
    waiting = [name for name, found in outcomes.items() if found is None]
    print(f"{len(cells) - len(failed) - len(waiting)} rows: {folder.path / FILE}")
    if failed:
        print(
            f"{len(failed)} of {len(cells)} cells failed, --retry-failed runs them again: "
            f"{', '.join(str(folder.cells / name / ERROR) for name in failed)}",
            file=sys.stderr,
        )
    if waiting:
        print(
            f"{len(waiting)} cells wait for the texts of the full cache, which failed",
            file=sys.stderr,
        )
    rows = [found for found in outcomes.values() if isinstance(found, Agreement)]
    if idle := [row for row in rows if row.budget is not None and not row.late_documents]:
        which = ", ".join(dict.fromkeys(f"{row.task} at {row.budget}" for row in idle))
        print(
            f"nothing was evicted in {len(idle)} of {len(rows)} rows, whose agreement is empty: "
            f"prompt and text fit the budget ({which}). Use smaller --budgets, or longer texts",
            file=sys.stderr,
        )
    return 1 if failed or waiting else 0


def _phases(asked: Plan, todo: list[Cell], folder: Folder, count: int) -> Iterator[list[Group]]:
    """What runs together, the writers of texts before those who read them."""
    if not asked.is_agreement:
        yield [Group((cell,)) for cell in todo]
        return
    writers = {task: asked.writer(task) for task in asked.tasks}
    yield [Group((cell,)) for cell in todo if cell in writers.values()]
    readers: list[Group] = []
    for task, writer in writers.items():
        own = [cell for cell in todo if cell.task == task and cell != writer]
        if own and isinstance(folder.outcome(writer), Measured):
            written = texts.read(folder.cells / writer.name)
            readers += together(own, written, processes=count)
    yield readers


def _run(
    asked: Plan,
    phases: Iterable[Iterable[Group]],
    folder: Folder,
    options: Run,
    count: int,
) -> Iterator[Cell]:
    if options.ray and count:
        from compressed_cache.eval.sweep import cluster

        gpus = options.gpus_per_cell
        return cluster.run(asked, phases, folder, address=options.ray, gpus=gpus)
    minutes = options.minutes_per_cell
    return processes.run(asked, phases, folder, processes=count, minutes=minutes)


def _has_ray() -> bool:
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError:
        print(missing("ray", "cluster"), file=sys.stderr)
        return False
    return True


def _outcomes(asked: Plan, folder: Folder) -> dict[str, Row | str | None]:
    return {cell.name: folder.outcome(cell) for cell in asked.cells()}


def _todo(asked: Plan, outcomes: estimate.Outcomes, retry_failed: bool) -> list[Cell]:
    def is_open(found: Row | str | None) -> bool:
        return found is None or (retry_failed and isinstance(found, str))

    return [cell for cell in asked.cells() if is_open(outcomes[cell.name])]


def _told(cell: Cell, outcome: Row | str | None) -> str:
    if isinstance(outcome, Agreement):
        return f"{cell.name}: {_agreement(outcome)}, {outcome.seconds:.1f} s"
    if not isinstance(outcome, Result):
        return f"{cell.name}: failed, {outcome}"
    low, high = outcome.accuracy_low, outcome.accuracy_high
    told = (
        f"{cell.name}: {outcome.accuracy:.0%} [{low * 100:.0f}, {high * 100:.0f}], "
        f"{outcome.tokens:.0f} tokens, {outcome.seconds:.1f} s"
    )
    # Some policies evict nothing and hold more than the budget.
    is_full = outcome.evicted_tokens == 0 and outcome.held_tokens <= (outcome.budget or 0)
    return f"{told}, {_nothing_evicted(outcome)}" if is_full else told


def _nothing_evicted(row: Row) -> str:
    return f"NOTHING WAS EVICTED, no prompt and text is longer than the budget of {row.budget}"


def _agreement(row: Agreement) -> str:
    if row.budget is None:
        return (
            f"{row.documents} texts of {row.text_tokens:.0f} tokens after prompts of "
            f"{row.prompt_tokens:.0f}, {row.early_agreement:.1%} agree when read again"
        )
    if row.agreement is None:
        return _nothing_evicted(row)
    error = "" if row.agreement_se is None else f" ± {100 * row.agreement_se:.1f}"
    first = f"first difference after {row.first_difference:.0f} tokens"
    return (
        f"{row.agreement:.1%}{error} of {row.late_positions:,} late positions agree "
        f"({row.late_documents} of {row.documents} texts), divergence {row.divergence:.3f}, "
        f"{'no difference' if row.identical == 1 else first}"
    )


def _plan(options: argparse.Namespace) -> tuple[Plan, list[str]]:
    """The plan and everything that is wrong with the options, in whose place is what works."""
    problems = []
    counts = ("seeds", "limit", "batch_size", "processes", "max_new_tokens")
    count = {name: getattr(options, name) for name in counts}
    for name, value in count.items():
        if value is not None and value < 1:
            problems.append(f"--{name.replace('_', '-')} must be >= 1, got {value}")
            count[name] = 1
    if options.gpus_per_cell is not None and not options.ray:
        problems.append("--gpus-per-cell must come with --ray")
    if options.minutes_per_cell is not None:
        if options.minutes_per_cell <= 0:
            problems.append(f"--minutes-per-cell must be > 0, got {options.minutes_per_cell:g}")
        if options.ray:
            problems.append("--minutes-per-cell must come without --ray, which begins cells itself")

    def tried(read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except ValueError as error:
            problems.append(str(error))
            return otherwise

    is_agreement = options.measure == Agreement.measure
    policies = list(dict.fromkeys(map(canonical_name, options.policies)))
    policies = tried(lambda: _on_grid(policies, options.grid), policies)
    if is_agreement and "full" not in policies:
        policies = ["full", *policies]
    gen_kwargs = tried(lambda: _gen_kwargs(options.gen_kwargs, is_agreement), {})
    plan = Plan(
        model=named(options.model),
        tasks=options.tasks,
        policies=policies,
        budgets=list(dict.fromkeys(options.budgets)),
        seeds=count["seeds"],
        options=tried(lambda: _policy_options(options.policy_args), {}),
        limit=count["limit"],
        batch_size=count["batch_size"],
        gen_kwargs=gen_kwargs or ({"max_gen_toks": 1} if options.text else {}),
        model_args=tried(lambda: _model_args(options.model_args, options.dtype), {}),
        chat=options.apply_chat_template,
        metadata=tried(lambda: _metadata(options.metadata), {}),
        measure=options.measure,
        prompts=tried(lambda: _paragraphs(options.text), [""]) if options.text else [],
    )
    return plan, problems


def _metadata(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"--metadata must be a JSON object, got {text!r}")
    return found


def _model_args(text: str, dtype: str | None) -> dict[str, Any]:
    found = _pairs("--model-args", text) | ({"dtype": dtype} if dtype else {})
    if taken := [name for name in found if name == "pretrained" or name.startswith("kv_")]:
        raise ValueError(
            f"--model-args must not have {', '.join(taken)}: a sweep fills that in. Use --model, "
            "--policies, --budgets and --policy-args."
        )
    name = found.get("dtype", "auto")
    if name not in DTYPES:
        hint = nearest(str(name), DTYPES)
        raise ValueError(f"--dtype must be one of {listing(DTYPES)}, got {name!r}{hint}")
    return found


def _gen_kwargs(text: str, is_agreement: bool) -> dict[str, Any]:
    found = _pairs("--gen-kwargs", text)
    if is_agreement and (others := [name for name in found if name != "max_gen_toks"]):
        raise ValueError(
            f"--gen-kwargs must have max_gen_toks alone with --measure agreement, got "
            f"{', '.join(others)}: the full cache writes the most likely token each time"
        )
    return found


def _paragraphs(file: str) -> list[str]:
    try:
        return prompts.of_file(Path(file))
    except OSError as error:
        raise ValueError(f"--text {file}: {error.strerror}") from None


def _on_grid(settings: list[str], grid: list[str]) -> list[str]:
    """Each setting with all combinations of the values that are asked for of its policy."""
    axes = [_axis(text) for text in grid]
    policies = list(dict.fromkeys(map(policy_of, settings)))
    if strangers := [policy for policy, *_ in axes if policy and policy not in policies]:
        raise ValueError(f"--grid: {listing(strangers)} not among --policies {listing(policies)}")
    found = []
    for setting in settings:
        policy, _, given = setting.partition(":")
        own = [axis for one, *axis in axes if one == policy or (not one and policy != "full")]
        names = [name for name, _ in own] + list(options_of(setting))
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"--grid: {setting!r} must be given {twice[0]} once, got it twice")
        fixed = given.split(",") if given else []
        for values in itertools.product(*(values for _, values in own)):
            parts = [f"{name}={value}" for (name, _), value in zip(own, values, strict=True)]
            found.append(f"{policy}:{','.join(sorted(fixed + parts))}" if parts else setting)
    return found


def _axis(text: str) -> tuple[str, str, list[str]]:
    where, _, values = text.partition("=")
    policy, _, name = where.rpartition(":")
    if not name or not all(values.split(",")):
        raise ValueError(f"--grid must be OPTION=VALUE,VALUE,..., got {text!r}")
    return canonical_name(policy), name, values.split(",")


def _policy_options(texts: list[str]) -> dict[str, dict[str, Option]]:
    found: dict[str, dict[str, Option]] = {}
    for text in texts:
        policy, _, rest = text.rpartition(":")
        found.setdefault(canonical_name(policy), {}).update(_pairs("--policy-args", rest))
    return found


def _pairs(option: str, text: str) -> dict[str, Any]:
    if bad := [part for part in text.split(",") if part and "=" not in part]:
        raise ValueError(f"{option} must be NAME=VALUE with commas between, got {bad[0]!r}")
    return simple_parse_args_string(text)


def _expanded(asked: Plan) -> tuple[Plan, list[str]]:
    """The plan with its tasks one by one, and everything that is wrong with what was asked."""
    names, problems = (asked.tasks, []) if asked.prompts else tasks.expanded(asked.tasks)
    config = None
    known = {k: v for k, v in asked.model_args.items() if k in ("revision", "trust_remote_code")}
    try:
        config = AutoConfig.from_pretrained(asked.pretrained, **known)
        if asked.chat:
            path = asked.model_args.get("tokenizer", asked.pretrained)
            if not AutoTokenizer.from_pretrained(path, **known).chat_template:
                problems.append(
                    f"--apply-chat-template: the tokenizer of {path} has no chat template. Leave "
                    "it out, or take a model that was trained to chat"
                )
    except (OSError, ValueError) as error:
        problems.append(f"--model {asked.model}: {why(asked.pretrained, error)}")
    asked = replace(asked, tasks=names)
    # Options and budgets are the same for all tasks.
    one = replace(asked, tasks=names[:1] or ["any"])
    return asked, problems + list(plan.problems(one, config))
