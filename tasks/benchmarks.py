"""What the rows of each benchmark hold, and how an answer is graded.

Prompts, dataset paths and splits stand in the YAML file of each task.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressed_cache.reasoner.problems import extract_answer
from compressed_cache.tasks.scoring.boxed import final_answer
from compressed_cache.tasks.scoring.choices import same_choice
from compressed_cache.tasks.scoring.drop import drop_scores
from compressed_cache.tasks.scoring.latex import same_expression
from compressed_cache.tasks.scoring.numbers import parse_number, same_number
from compressed_cache.tasks.scoring.truth import same_truth

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """One dataset."""

    columns: Mapping[str, type]
    """Those that are needed, by name."""
    gold: Callable[[Row], str]
    """The right answer as one would box it. Raises ValueError on a row that has none."""
    grade: Callable[[str, Row], dict[str, float]]
    """Scores of an answer between 0 and 1, ``accuracy`` among them."""
    answer: Callable[[str], str | None] = final_answer
    """The answer in a reply, None if it has none."""


def _accuracy(right: bool) -> dict[str, float]:
    return {"accuracy": float(right)}


def _gsm8k_gold(row: Row) -> str:
    _, mark, gold = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("'answer' has no '####' before its result")
    return _number(gold.strip())


def _number(gold: str) -> str:
    if parse_number(gold) is None:
        raise ValueError(f"the answer must be a number, got {gold!r}")
    return gold


def _boxed_gold(row: Row) -> str:
    gold = final_answer(row["solution"])
    if gold is None:
        raise ValueError("'solution' has no \\boxed{} answer")
    return _number(gold)


def _truth_gold(value: Any) -> str:
    if str(value) not in ("True", "False", "Uncertain"):
        raise ValueError(f"the label must be True, False or Uncertain, got {value!r}")
    return str(value)


def _drop_gold(row: Row) -> str:
    return _spans(row)[0]


def _spans(row: Row) -> list[str]:
    spans = row["answers_spans"].get("spans")
    if not spans or not all(isinstance(span, str) for span in spans):
        raise ValueError(f"'spans' in 'answers_spans' must be texts, got {spans!r}")
    return spans


@dataclass(frozen=True)
class _Choice:
    """Multiple choice: which column says what."""

    right: Callable[[Row], Any]
    """The label of the right choice."""
    labels: Callable[[Row], Sequence[str]]
    texts: Callable[[Row], Sequence[str]]

    def gold(self, row: Row) -> str:
        """The label of the right choice."""
        right, labels = str(self.right(row)), self.labels(row)
        if len(labels) != len(self.texts(row)):
            raise ValueError(f"{len(labels)} choices have labels, {len(self.texts(row))} texts")
        if right not in labels:
            raise ValueError(f"the key {right!r} is none of the choices {', '.join(labels)}")
        return right

    def grade(self, answer: str, row: Row) -> dict[str, float]:
        """Accuracy of a label, a number or a choice's own text."""
        labels = self.labels(row)
        right = labels.index(self.gold(row))
        return _accuracy(same_choice(answer, right, labels, self.texts(row)))


_lettered = _Choice(
    right=lambda row: row["answerKey"],
    labels=lambda row: row["choices"]["label"],
    texts=lambda row: row["choices"]["text"],
)


def _numbered(key: str, texts: str) -> _Choice:
    """Options without labels, which the prompt counts from 1."""
    return _Choice(
        right=lambda row: row[key] + 1,
        labels=lambda row: [str(i + 1) for i in range(len(row[texts]))],
        texts=lambda row: row[texts],
    )


_reclor = _numbered("label", "answers")
_logiqa = _numbered("correct_option", "options")


def _shipped() -> Benchmark:
    return Benchmark(
        columns={"prompt": str, "answer": str},
        gold=lambda row: row["answer"],
        grade=lambda answer, row: _accuracy(answer == row["answer"]),
        answer=extract_answer,
    )


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(
        columns={"question": str, "answer": str},
        gold=_gsm8k_gold,
        grade=lambda answer, row: _accuracy(same_number(answer, _gsm8k_gold(row))),
    ),
    "math500": Benchmark(
        columns={"problem": str, "answer": str},
        gold=lambda row: row["answer"],
        grade=lambda answer, row: _accuracy(same_expression(answer, row["answer"])),
    ),
    "aime24": Benchmark(
        columns={"problem": str, "solution": str},
        gold=_boxed_gold,
        grade=lambda answer, row: _accuracy(same_number(answer, _boxed_gold(row))),
    ),
    "aime25": Benchmark(
        columns={"problem": str, "answer": int},
        gold=lambda row: str(row["answer"]),
        grade=lambda answer, row: _accuracy(same_number(answer, row["answer"])),
    ),
    "folio": Benchmark(
        columns={"premises": str, "conclusion": str, "label": str},
        gold=lambda row: _truth_gold(row["label"]),
        grade=lambda answer, row: _accuracy(same_truth(answer, row["label"])),
    ),
    "strategyqa": Benchmark(
        columns={"question": str, "facts": str, "answer": bool},
        gold=lambda row: _truth_gold(row["answer"]),
        grade=lambda answer, row: _accuracy(same_truth(answer, str(row["answer"]))),
    ),
    "drop": Benchmark(
        columns={"passage": str, "question": str, "answers_spans": dict},
        gold=_drop_gold,
        grade=lambda answer, row: dict(
            zip(("accuracy", "f1"), drop_scores(answer, _spans(row)), strict=True)
        ),
    ),
    "reclor": Benchmark(
        columns={"context": str, "question": str, "answers": list, "label": int},
        gold=_reclor.gold,
        grade=_reclor.grade,
    ),
    "logiqa": Benchmark(
        columns={"context": str, "query": str, "options": list, "correct_option": int},
        gold=_logiqa.gold,
        grade=_logiqa.grade,
    ),
    "commonsenseqa": Benchmark(
        columns={"question": str, "choices": dict, "answerKey": str},
        gold=_lettered.gold,
        grade=_lettered.grade,
    ),
    "openbookqa": Benchmark(
        columns={"question_stem": str, "choices": dict, "answerKey": str},
        gold=_lettered.gold,
        grade=_lettered.grade,
    ),
    "shipped_easy": _shipped(),
    "shipped_long": _shipped(),
}
