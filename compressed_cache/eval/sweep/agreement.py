"""Agreement of cells with what the full cache wrote."""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

from compressed_cache.cache import CompressedCache
from compressed_cache.eval.agreement.reading import read
from compressed_cache.eval.agreement.statistics import Document, summary
from compressed_cache.eval.agreement.text import Text, batch
from compressed_cache.eval.agreement.writing import write
from compressed_cache.eval.results.row import Agreement
from compressed_cache.eval.sweep import loaded
from compressed_cache.eval.sweep.group import Finished, Group
from compressed_cache.eval.sweep.plan import Cell, Plan
from compressed_cache.eval.sweep.prompts import load


def measure(plan: Plan, group: Group) -> list[Finished | Exception]:
    """Lets cells read the texts of the group beside the full cache, in this process.

    A group without texts writes them first.
    """
    lm = loaded.model(plan)
    started = time.perf_counter()
    weights = loaded.digest(lm.model)
    texts = group.texts or tuple(_written(plan, group.cells[0].task, lm, weights))
    if (found := texts[0].weights) != weights:
        raise ValueError(
            f"the model must have the weights that wrote the texts, {found}, got {weights}. Use "
            "another --out for another model"
        )
    found = _read(plan, group.cells, texts, lm)
    seconds = (time.perf_counter() - started) / len(group.cells)
    outcomes: list[Finished | Exception] = []
    for cell in group.cells:
        reading = found[cell.name]
        if isinstance(reading, Exception):
            outcomes.append(reading)
            continue
        documents, cache_bytes = reading
        row = Agreement(
            model=plan.model,
            task=cell.task,
            policy=cell.policy,
            options=cell.press.options(),
            budget=cell.budget,
            seed=cell.seed,
            cache_bytes=cache_bytes,
            seconds=seconds,
            versions=loaded.versions(),
            machine=loaded.machine(lm.model),
            given=plan.given(cell.setting),
            setting=cell.setting,
            weights=weights,
            **summary(documents),
        )
        samples = [document.to_json() for document in documents]
        outcomes.append(Finished(row, samples, () if group.texts else texts))
    return outcomes


def _written(plan: Plan, task: str, lm: Any, weights: str) -> Iterator[Text]:
    prompts = load(plan, task, lm)
    ends = lm.model.generation_config.eos_token_id
    ends = {lm.eot_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    # Those of like length together, which need little padding.
    names = sorted(prompts.ids, key=lambda name: len(prompts.ids[name]))
    for part in _parts(names, plan.batch_size):
        rows = [prompts.ids[name] for name in part]
        answers = write(lm.model, rows, limit=prompts.limit, ends=ends)
        for name, prompt, answer in zip(part, rows, answers, strict=True):
            words = lm.tokenizer.decode(answer)
            yield Text(document=name, prompt=prompt, answer=answer, words=words, weights=weights)
        print(f"wrote {len(part)} of {len(names)} texts", flush=True)


def _read(
    plan: Plan, cells: Sequence[Cell], texts: Sequence[Text], lm: Any
) -> dict[str, tuple[list[Document], float] | Exception]:
    """Of each cell by name its documents and the bytes per document, or its error."""
    made: dict[str, CompressedCache] = {}

    def make(cell: Cell) -> CompressedCache:
        press = cell.press
        made[cell.name] = press.make_cache(config=lm.config)
        return made[cell.name]

    failed: dict[str, Exception] = {}
    documents: dict[str, list[Document]] = {cell.name: [] for cell in cells}
    held = dict.fromkeys(documents, 0)
    longest_first = sorted(texts, key=lambda text: -len(text.answer))
    for part in _parts(longest_first, plan.batch_size):
        left = [cell for cell in cells if cell.name not in failed]
        caches = {cell.name: functools.partial(make, cell) for cell in left}
        found = read(lm.model, batch(part, lm.model.device), caches)
        for cell in left:
            one = found[cell.name]
            if isinstance(one, Exception):
                failed[cell.name] = one
                continue
            held[cell.name] += made[cell.name].nbytes
            documents[cell.name] += [
                Document.of(text, one, row, cell.budget) for row, text in enumerate(part)
            ]
        made.clear()
        print(f"read {len(part)} of {len(texts)} texts", flush=True)
    return {
        name: failed[name] if name in failed else (own, held[name] / len(texts))
        for name, own in documents.items()
    }


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
