"""Faults of tasks and data, found before the weights are loaded."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any


def check_tasks(lm: Any, arguments: Mapping[str, Any], run: Mapping[str, Any] | None) -> None:
    """Loads this project's tasks of the run and measures their prompts.

    The harness itself loads tasks after the model, so that a missing dataset or a prompt that is
    too long shows only when gigabytes of weights are in memory.

    Args:
        lm: the harness's model, with config and tokenizer; weights are not needed.
        arguments: what the user gave the model, without the ``kv_`` arguments.
        run: what ``simple_evaluate`` is given, None if nobody called it.

    Raises:
        ValueError: a broken row, a prompt that leaves no room for the reply, or one that is to be
            protected and does not fit the budget.
        FileNotFoundError: no local rows where the user said they are.
        RuntimeError: a dataset that the hub does not give.
    """
    if run is None or run.get("task_manager") is None:
        return
    manager = run["task_manager"]
    ours = [name for name in run["tasks"] if isinstance(name, str) and _is_ours(manager, name)]
    if not ours:
        return
    limit = arguments.get("max_length") or model_limit(lm)
    for task in manager.load(ours)["tasks"].values():
        _check_prompts(lm, task, run, limit, _template_arguments(arguments))


def running_evaluation() -> dict[str, Any] | None:
    """What the caller passed to ``simple_evaluate``, which gives models no other way to know."""
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if frame.f_code.co_name == "simple_evaluate" and module == "lm_eval.evaluator":
            return frame.f_locals
        frame = frame.f_back
    return None


def _is_ours(manager: Any, name: str) -> bool:
    from compressed_cache.tasks import PATH

    entry = manager.task_index.get(name)
    if entry is None:
        return PATH in Path(name).resolve().parents
    if entry.yaml_path is None:
        return any(_is_ours(manager, member) for member in entry.tags)
    return PATH in Path(entry.yaml_path).resolve().parents


def model_limit(lm: Any) -> int:
    """How many tokens the model can read."""
    from lm_eval.models.utils import resolve_max_length

    return resolve_max_length(lm.config, lm.tokenizer, default=lm._DEFAULT_MAX_LENGTH)


def _template_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    # As the model class puts them together, but only once the weights are there.
    thinking = arguments.get("enable_thinking")
    given = dict(arguments.get("chat_template_args") or {})
    return given if thinking is None else given | {"enable_thinking": thinking}


def _check_prompts(
    lm: Any, task: Any, run: Mapping[str, Any], limit: int, template: dict[str, Any]
) -> None:
    import torch
    from lm_eval.models.utils import normalize_gen_kwargs

    from compressed_cache.hf.checks import check_prompt

    cache = lm.compressed_cache.press.make_cache(config=lm.config)
    eviction = cache.eviction
    arguments = dict(task.config.generation_kwargs) | dict(run["gen_kwargs"] or {})
    normal: dict[str, Any] = {**normalize_gen_kwargs(arguments, lm.max_gen_toks)}
    reply = normal["max_gen_toks"]
    apply = partial(lm.tokenizer.apply_chat_template, tokenize=False, **template)
    for number, prompt in prompts(task, run, apply):
        tokens = len(lm.tokenizer(prompt).input_ids)
        if tokens + reply > limit:
            raise ValueError(
                f"{task.config.task}: the prompt of document {number} has {tokens} tokens and its "
                f"reply may have {reply}, together more than the model's {limit}. Allow shorter "
                f"replies (--gen_kwargs max_gen_toks={max(1, limit - tokens)}) or, if the model "
                "can read more, raise max_length in --model_args."
            )
        # Budgets of layers or heads of their own are known only once a model reads.
        if isinstance(eviction.budget, int):
            try:
                check_prompt(torch.tensor([tokens]), cache.policy, eviction, eviction.budget)
            except ValueError as error:
                raise ValueError(f"{task.config.task}, document {number}: {error}") from None


def prompts(
    task: Any, run: Mapping[str, Any], template: Callable[..., Any]
) -> Iterator[tuple[int, str]]:
    """The prompts of a run of a task, each with the number of its document.

    Args:
        task: a loaded task.
        run: what ``simple_evaluate`` is given.
        template: makes text of a conversation, if the run asks for that.
    """
    # Else examples would be others each time.
    task.set_fewshot_seed(seed=0)
    for number in _chosen(task, run):
        document = task.eval_docs[number]
        yield (
            number,
            task.fewshot_context(
                document,
                num_fewshot=task.config.num_fewshot or 0,
                system_instruction=run["system_instruction"],
                apply_chat_template=bool(run["apply_chat_template"]),
                fewshot_as_multiturn=run["fewshot_as_multiturn"],
                chat_template=template,
                gen_prefix=task.doc_to_prefix(document),
            ),
        )


def _chosen(task: Any, run: Mapping[str, Any]) -> Iterable[int]:
    from lm_eval.evaluator_utils import get_sample_size

    if run["samples"] is not None:
        return run["samples"].get(task.config.task, [])
    return range(len(task.eval_docs))[: get_sample_size(task, run["limit"])]
