"""Tasks of this package and of lm_eval by the names a sweep takes, and how much they ask for."""

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.config.group import GroupConfig
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


HARNESS = Path(lm_eval.tasks.__file__).parent
"""The tasks of lm_eval."""


def manager(metadata: dict[str, Any], name: str) -> TaskManager:
    """The harness's loader of tasks, which knows those of the folder of one alone."""
    file = _index(name)[name].yaml_path
    return _manager(json.dumps(metadata), str(PATH if PATH in file.parents else file.parent))


def _index(name: str) -> Any:
    """All tasks, groups and tags of this package; where it has no such, with those of the folders
    of lm_eval that may."""
    ours = _manager("{}", str(PATH)).task_index
    if name in ours:
        return ours
    # The harness itself would parse all of its files, some 14,000, which takes a minute.
    own = re.escape(name)
    patterns = rf"^(?:task|group): *{own} *$", rf"(?<![\w-]){own}(?![\w-])"
    folders = _folders(HARNESS, patterns[0]) or _folders(HARNESS, patterns[1])
    topmost = sorted(str(one) for one in folders if folders.isdisjoint(one.parents))
    return _manager("{}", *topmost, str(PATH)).task_index if topmost else ours


@functools.cache
def _folders(folder: Path, pattern: str) -> set[Path]:
    found = re.compile(pattern, re.MULTILINE)
    return {file.parent for file, text in _texts(folder).items() if found.search(text)}


@functools.cache
def _texts(folder: Path) -> dict[Path, str]:
    """The files of tasks."""
    return {file: file.read_text() for file in folder.rglob("*.yaml")}


def _names() -> Iterator[str]:
    """What lm_eval calls its tasks and groups."""
    for text in _texts(HARNESS).values():
        yield from re.findall(r"^(?:task|group): *([\w-]+) *$", text, re.MULTILINE)


@functools.cache
def _manager(metadata: str, *paths: str) -> TaskManager:
    return TaskManager(
        include_path=list(paths), include_defaults=False, metadata=json.loads(metadata)
    )


def expanded(names: list[str]) -> tuple[list[str], list[str]]:
    """The single tasks behind names of tasks, groups and tags, and what is wrong with others."""
    found, problems = [], []
    for name in names:
        if name not in _index(name):
            ours = _manager("{}", str(PATH)).task_index
            problems.append(
                f"--tasks: unknown task {name!r}, expected one of lm_eval's or of "
                f"{listing(ours)}{nearest(name, [*ours, *_names()])}"
            )
            continue
        try:
            found += _members(name)
        except ValueError as error:
            problems.append(f"--tasks: {error}")
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
            task = load(plan, name)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            problems.append(str(error) if name in str(error) else f"{name}: {error}")
            continue
        if task.OUTPUT_TYPE != "generate_until":
            problems.append(
                f"{name} must have the model write something, but has {task.OUTPUT_TYPE}: nothing "
                "is decoded in it, so that policies change nothing"
            )
            continue
        documents = min(len(task.eval_docs), plan.limit or len(task.eval_docs))
        # Greedy texts are written once.
        repeats = 1 if plan.is_agreement else task.config.repeats
        found[name] = Size(documents, documents * repeats * reply_limit(plan, task))
    return found, problems


def load(plan: Plan, name: str) -> Any:
    """A task of the harness, with its data."""
    return manager(_metadata(plan), name).load([name])["tasks"][name]


def reply_limit(plan: Plan, task: Any) -> int:
    """How many tokens a reply to a loaded task may have."""
    arguments = dict(task.config.generation_kwargs) | plan.gen_kwargs
    normal: dict[str, Any] = {**normalize_gen_kwargs(arguments)}
    return normal["max_gen_toks"]


def evaluation(plan: Plan, task: str) -> dict[str, Any]:
    """What the harness's ``simple_evaluate`` is given for a task."""
    return dict(
        tasks=[task],
        task_manager=manager(_metadata(plan), task),
        limit=plan.limit,
        samples=None,
        gen_kwargs=plan.gen_kwargs or None,
        apply_chat_template=plan.chat,
        system_instruction=None,
        fewshot_as_multiturn=True,
    )


def _metadata(plan: Plan) -> dict[str, Any]:
    # As the harness does, whose tasks may make texts of so many tokens of the model.
    return {"pretrained": plan.pretrained} | plan.model_args | plan.metadata


def _members(name: str) -> Iterator[str]:
    entry = _index(name)[name]
    config = entry.cfg or {}
    # The harness keeps the members of a tag in a set.
    members = sorted(entry.tags) if entry.yaml_path is None else config.get("task")
    if not isinstance(members, list):
        yield name
        return
    own = {field.name for field in fields(GroupConfig)}
    for member in members:
        # Alone, a member would be another task.
        if not isinstance(member, str) or config.keys() - own:
            raise ValueError(f"{name} changes what is its members'. Name single tasks instead")
        yield from _members(member)
