"""The prompts that the full cache goes on with."""

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from compressed_cache.eval.sweep import tasks
from compressed_cache.eval.sweep.plan import Plan
from compressed_cache.hf.checks import check_prompt
from compressed_cache.integrations.harness.preflight import check_tasks, model_limit, prompts


@dataclass(frozen=True)
class Prompts:
    """Those of one task."""

    ids: dict[str, list[int]]
    """Token ids, by what identifies the document."""
    limit: int
    """Tokens that may follow each of them."""


def of_file(path: Path) -> list[str]:
    """The paragraphs of a text file, which are divided by blank lines.

    Raises:
        ValueError: a file without any, or one that is not text.
        OSError: a file that cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} must be a text in UTF-8, got something else") from None
    blocks = "".join(line if line.strip() else "\n" for line in text.splitlines(True)).split("\n\n")
    found = [block.strip("\n") for block in blocks if block.strip()]
    if not found:
        raise ValueError(f"{path} must have at least one paragraph, got an empty file")
    return found


def load(plan: Plan, name: str, lm: Any) -> Prompts:
    """The prompts of a task.

    Args:
        plan: says how many, and what is put around them.
        name: of the task.
        lm: the harness's model.

    Raises:
        ValueError: a prompt that leaves no room for a reply.
    """
    if plan.prompts:
        limit = plan.gen_kwargs["max_gen_toks"]
        texts = dict(enumerate(_of_user(plan, lm.apply_chat_template)))
    else:
        run = tasks.evaluation(plan, name)
        check_tasks(lm, plan.model_args, run)
        task = tasks.load(plan, name)
        limit = tasks.reply_limit(plan, task)
        texts = dict(prompts(task, run, lm.apply_chat_template))
    ids = {}
    for number, text in texts.items():
        row = lm.tok_batch_encode([text])[0][0].tolist()
        # Its place alone would pair different documents, once the data has changed.
        ids[f"{number}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"] = row
    if plan.prompts:
        _check_lengths(ids, limit, plan.model_args.get("max_length") or model_limit(lm))
    return Prompts(ids, limit)


def too_long(plan: Plan) -> Iterator[str]:
    """Which prompts are to be protected and do not fit the budget."""
    longest = functools.cache(functools.partial(_longest, plan))
    found: dict[str, None] = {}
    for cell in plan.cells():
        cache = cell.press.make_cache()
        eviction = cache.eviction
        if not eviction.protect_prompt or eviction.prompt_yields:
            continue
        try:
            tokens = torch.tensor([longest(cell.task)])
            check_prompt(tokens, cache.policy, eviction, cell.budget or 1)
        except ValueError as error:
            found[f"{cell.setting} at {cell.budget} on {cell.task}: {error}"] = None
    return iter(found)


def _longest(plan: Plan, name: str) -> int:
    """Tokens of the longest prompt of a task."""
    path = plan.model_args.get("tokenizer", plan.pretrained)
    known = ("revision", "trust_remote_code")
    tokenizer = AutoTokenizer.from_pretrained(
        path, **{key: plan.model_args[key] for key in known if key in plan.model_args}
    )
    apply = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    if plan.prompts:
        texts = list(_of_user(plan, functools.partial(apply, add_generation_prompt=True)))
    else:
        run = tasks.evaluation(plan, name)
        task = tasks.load(plan, name)
        texts = [text for _, text in prompts(task, run, apply)]
    return max(len(tokenizer(text).input_ids) for text in texts)


def _of_user(plan: Plan, template: Callable[..., Any]) -> Iterator[str]:
    for text in plan.prompts[: plan.limit]:
        yield template([{"role": "user", "content": text}]) if plan.chat else text


def _check_lengths(ids: dict[str, list[int]], limit: int, most: int) -> None:
    for name, row in ids.items():
        if len(row) + limit > most:
            raise ValueError(
                f"paragraph {name} has {len(row)} tokens and what follows may have {limit}, "
                f"together more than the model's {most}. Allow less (--max-new-tokens "
                f"{max(1, most - len(row))}), divide the paragraph by a blank line or, if the "
                "model can read more, raise max_length in --model-args."
            )
