"""The tasks of this package by the names a sweep takes, and how much they ask for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from compressed_cache.eval.sweep.plan import Plan
from compressed_cache.tasks import PATH
from compressed_cache.wording import listing, nearest


@dataclass(frozen=True)
class Size:
    """Of one cell of a task."""

    documents: int
    tokens: int
    """Generated at most."""


def manager(metadata: dict[str, Any]) -> TaskManager:
    """The harness's loader of tasks, which knows those of this package alone."""
    return TaskManager(include_path=str(PATH), include_defaults=False, metadata=metadata)


def expanded(names: list[str]) -> tuple[list[str], list[str]]:
    """The single tasks behind names of tasks, groups and tags, and what is wrong with others."""
    index = manager({}).task_index
    found, problems = [], []
    for name in names:
        if name in index:
            found += _members(index, name)
        else:
            known = f"expected one of {listing(index)}{nearest(name, index)}"
            problems.append(f"--tasks: unknown task {name!r}, {known}")
    return list(dict.fromkeys(found)), problems


def sizes(plan: Plan) -> tuple[dict[str, Size], list[str]]:
    """The size of each task, and why some cannot be loaded."""
    found, problems = {}, []
    if plan.prompts:
        documents = min(len(plan.prompts), plan.limit or len(plan.prompts))
        size = Size(documents, documents * plan.gen_kwargs["max_gen_toks"])
        return dict.fromkeys(plan.tasks, size), []
    for name in plan.tasks:
        try:
            task: Any = manager(plan.metadata).load([name])["tasks"][name]
        except (OSError, RuntimeError, ValueError) as error:
            problems.append(str(error))
            continue
        documents = min(len(task.eval_docs), plan.limit or len(task.eval_docs))
        # Greedy texts are written once.
        repeats = 1 if plan.is_agreement else task.config.repeats
        found[name] = Size(documents, documents * repeats * reply_limit(plan, task))
    return found, problems


def reply_limit(plan: Plan, task: Any) -> int:
    """How many tokens a reply to a loaded task may have."""
    arguments = dict(task.config.generation_kwargs) | plan.gen_kwargs
    normal: dict[str, Any] = {**normalize_gen_kwargs(arguments)}
    return normal["max_gen_toks"]


def evaluation(plan: Plan, task: str) -> dict[str, Any]:
    """What the harness's ``simple_evaluate`` is given for a task."""
    return dict(
        tasks=[task],
        task_manager=manager(plan.metadata),
        limit=plan.limit,
        samples=None,
        gen_kwargs=plan.gen_kwargs or None,
        apply_chat_template=plan.chat,
        system_instruction=None,
        fewshot_as_multiturn=True,
    )


def _members(index: Any, name: str) -> Iterator[str]:
    entry = index[name]
    # The harness keeps the members of a tag in a set.
    members = sorted(entry.tags) if entry.yaml_path is None else (entry.cfg or {}).get("task")
    if isinstance(members, list):
        for member in members:
            yield from _members(index, member)
    else:
        yield name
