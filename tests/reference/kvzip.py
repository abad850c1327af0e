"""KVzip, one row at a time: a context is read, repeated part by part, and cut by what was seen."""

import copy
from collections.abc import Sequence
from functools import partial

from tests.reference.llama import Kept, ReferenceLlama, Trace, _Row, _SharingRow
from tests.reference.policies import Rules, View, attention_row, layout_of

Scores = list[list[list[float]]]
"""``scores[layer][head][position]``, of the context."""


def repeated(
    context: Sequence[int], *, sinks: int, chunk: int, overlap: int, first: list[int],
    later: list[int], suffix: list[int],
) -> list[tuple[range, list[int]]]:  # fmt: skip
    """Which positions are repeated together, and the tokens that are read for it.

    The system prompt, here the ``sinks``, is not repeated. Each chunk follows an instruction, from
    the second on with the last ``overlap`` tokens of the chunk before, and the end of the turn.
    """
    body = list(range(sinks, len(context)))
    chunks = [body[i : i + chunk] for i in range(0, len(body), chunk)]
    made = []
    for number, own in enumerate(chunks):
        before = [] if number == 0 or overlap == 0 else chunks[number - 1][-overlap:]
        instruction = first if number == 0 else [*later, *(context[p] for p in before)]
        text = [*instruction, *suffix, *(context[p] for p in own)]
        made.append((range(own[0], own[-1] + 1), text))
    return made


def score_context(
    model: ReferenceLlama,
    context: Sequence[int],
    repetitions: Sequence[tuple[range, list[int]]],
    *,
    sinks: int,
) -> Scores:
    """The most attention of any query of a repetition to each key (arXiv 2505.23416, section 3).

    The model attends to all of the context; the score is of a softmax among the sinks, the keys of
    the chunk, and those of the repetition up to the query.
    """
    row = _read(model, context)
    scores = [[[0.0 for _ in context] for _ in heads] for heads in row.held]
    for span, tokens in repetitions:
        again = copy.deepcopy(row)
        again.model = model
        for token in tokens:
            again.read(token)
        for layer, heads in enumerate(again.held):
            for head, held in enumerate(heads):
                for position in range(len(context), len(context) + len(tokens)):
                    seen = [
                        token
                        for token in held[: position + 1]
                        if token.position < sinks
                        or token.position in span
                        or token.position >= len(context)
                    ]
                    for query in again.queries[layer][head][position]:
                        weights = attention_row(query, seen)
                        for key in span:
                            best = max(scores[layer][head][key], weights[key])
                            scores[layer][head][key] = best
    return scores


def kept_afterwards(
    model: ReferenceLlama,
    context: Sequence[int],
    scores: Scores,
    later: Sequence[int],
    rules: Rules,
    *,
    floor: float | None = None,
) -> list[Kept]:
    """What is held after the cut, and after each token that is read then.

    Of the tokens after the context the newest half of the budget of the head are worth more than
    any of the context, the others less.
    """

    def score(view: View) -> list[float]:
        newest = rules.slots(view.layer, view.head) // 2
        known = scores[view.layer][view.head]
        return [
            known[token.position]
            if token.position < len(context)
            else (2.0 if token.position >= view.incoming - newest else -1.0)
            for token in view.held
        ]

    trace = Trace()
    row = _read(model, context, floor)
    row.compress_prompt(score, rules, trace)
    kept = [row.kept()]
    for step, token in enumerate(later):
        row.make_room(step, score, rules, trace)
        row.read(token)
        kept.append(row.kept())
    return kept


def _read(model: ReferenceLlama, context: Sequence[int], floor: float | None = None) -> _Row:
    layout = layout_of(partial(lambda view: []))
    row = _Row(model, layout) if floor is None else _SharingRow(model, layout, floor)
    for token in context:
        row.read(token)
    return row
