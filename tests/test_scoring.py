"""Scoring: tables of hand-made answers, an oracle on real rows, and garbage."""

import json
import random
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest

from compressed_cache.tasks.benchmarks import BENCHMARKS
from compressed_cache.tasks.rows import checked_row
from compressed_cache.tasks.scoring.boxed import final_answer
from compressed_cache.tasks.scoring.choices import same_choice
from compressed_cache.tasks.scoring.drop import drop_scores
from compressed_cache.tasks.scoring.latex import same_expression
from compressed_cache.tasks.scoring.numbers import parse_number, same_number
from compressed_cache.tasks.scoring.truth import same_truth
from tests.harness import DATA
from tests.scoring_cases import Answers
from tests.scoring_cases.boxed import BOXED
from tests.scoring_cases.choices import CHOICES
from tests.scoring_cases.drop import DROP, PARTLY_RIGHT
from tests.scoring_cases.expressions import EXPRESSIONS
from tests.scoring_cases.numbers import NUMBERS
from tests.scoring_cases.truths import TRUTHS


@pytest.mark.parametrize("table", [NUMBERS, EXPRESSIONS, CHOICES, TRUTHS, DROP])
def test_the_tables_are_large(table: list[Answers]) -> None:
    right, wrong = (sum(len(answers[kind]) for answers in table) for kind in (1, 2))
    assert right + wrong >= 200
    assert min(right, wrong) >= 80
    for answers in table:
        every = answers.right + answers.wrong
        assert len(set(every)) == len(every)


def _misjudged(answers: Answers, is_right: Callable[[str, Any], bool]) -> list[str]:
    """Those that, boxed in a reply, are not worth what the table says."""

    def judged(answer: str) -> bool:
        found = final_answer(f"<think>\\boxed{{?}}</think> So it is $\\boxed{{{answer}}}$.")
        return found is not None and is_right(found, answers.gold)

    return [
        *(answer for answer in answers.right if not judged(answer)),
        *(answer for answer in answers.wrong if judged(answer)),
    ]


@pytest.mark.parametrize(("reply", "answer"), BOXED)
def test_boxed(reply: str, answer: str | None) -> None:
    assert final_answer(reply) == answer


@pytest.mark.parametrize("answers", NUMBERS, ids=lambda answers: answers.gold)
def test_numbers(answers: Answers) -> None:
    assert _misjudged(answers, same_number) == []


def test_numbers_are_exact() -> None:
    assert parse_number("0.1") == Fraction(1, 10)
    assert parse_number(r"-2\frac{3}{4}") == Fraction(-11, 4)
    assert parse_number(r"0.1\overline{6}") == Fraction(1, 6)
    assert parse_number("5 apples", bare=True) is None
    assert same_number("70", 70)


@pytest.mark.parametrize("answers", EXPRESSIONS, ids=lambda answers: answers.gold)
def test_expressions(answers: Answers) -> None:
    assert _misjudged(answers, same_expression) == []


def test_expressions_outside_the_main_thread() -> None:
    found: list[bool] = []
    pairs = [(r"\sqrt{117}", r"3\sqrt{13}"), ("2(k+1)", "2k+1")]
    thread = threading.Thread(target=lambda: found.extend(same_expression(*pair) for pair in pairs))
    thread.start()
    thread.join()
    assert found == [True, False]


@pytest.mark.parametrize("answers", CHOICES)
def test_choices(answers: Answers) -> None:
    assert _misjudged(answers, lambda answer, question: same_choice(answer, *question)) == []


@pytest.mark.parametrize("answers", TRUTHS)
def test_truths(answers: Answers) -> None:
    assert _misjudged(answers, same_truth) == []


@pytest.mark.parametrize("answers", DROP)
def test_drop(answers: Answers) -> None:
    assert _misjudged(answers, lambda answer, golds: drop_scores(answer, golds) == (1, 1)) == []
    assert {drop_scores(answer, answers.gold) for answer in answers.wrong} <= {(0, 0)}


@pytest.mark.parametrize(("answer", "golds", "f1"), PARTLY_RIGHT)
def test_drop_partly_right(answer: str, golds: tuple[str, ...], f1: float) -> None:
    assert drop_scores(answer, golds) == (0, f1)


def _rows() -> Iterator[Any]:
    for name in BENCHMARKS:
        path = DATA / f"{name}.jsonl"
        if path.exists():
            for line in path.read_text().splitlines():
                yield pytest.param(name, json.loads(line))


REAL = list(_rows())


@pytest.mark.skipif(not REAL, reason="the real rows are not here")
def test_an_oracle_is_right_on_every_real_row_and_a_contrarian_on_none() -> None:
    seen: dict[str, int] = {}
    for parameters in REAL:
        name, row = parameters.values
        benchmark = BENCHMARKS[name]
        kept = checked_row(row, benchmark)
        gold = benchmark.gold(kept)
        answer = benchmark.answer(f"Not \\boxed{{0}} but $\\boxed{{{gold}}}$.")
        assert answer is not None
        assert set(benchmark.grade(answer, kept).values()) == {1.0}, (name, row)
        assert benchmark.grade(_wrong(name, gold, kept), kept)["accuracy"] == 0.0, (name, row)
        seen[name] = seen.get(name, 0) + 1
    assert seen == {name: 30 if name.startswith("aime") else 100 for name in seen}
    assert len(seen) == 10


def _wrong(name: str, gold: str, row: dict[str, Any]) -> str:
    if name in ("folio", "strategyqa"):
        return "False" if gold == "True" else "True"
    if name == "logiqa":
        return str(int(gold) % 4 + 1)
    if name in ("commonsenseqa", "openbookqa"):
        return "B" if gold == "A" else "A"
    if name == "math500":
        return f"{gold} + 1"
    if name == "drop":
        return "something else entirely"
    return str(int(gold.replace(",", "")) + 1)


def test_every_span_of_drop_is_right() -> None:
    for parameters in REAL:
        name, row = parameters.values
        if name == "drop":
            spans = row["answers_spans"]["spans"]
            assert all(drop_scores(span, spans) == (1.0, 1.0) for span in spans)


def test_a_model_that_repeats_itself_is_wrong_at_once() -> None:
    # Each of these once raised, or took minutes.
    assert final_answer("\\boxed{" * 20000) is None
    digits = "9" * 5000
    for answer in (digits, f"1/{digits}", f"1e{digits}", "18 " + "percent" * 30 + "#"):
        assert not same_number(answer, "18")
        assert not same_expression(answer, "18")
    assert not same_choice("the answer is " * 2000, 0, ("A", "B"), ("x", "y"))


def test_nothing_a_model_may_write_raises() -> None:
    generator = random.Random(0)
    pieces = [*"0123456789.,+-*/=^_()[]{}$%xab \n", "\\frac", "\\text{", "\\boxed{", "\\sqrt"]
    pieces += ["\\begin{pmatrix}", "\\\\", "&", "\\left(", "</think>", "10^{", "e9", "\u00e9"]
    for _ in range(300):
        text = "".join(generator.choices(pieces, k=generator.randrange(1, 25)))
        final_answer(text)
        same_number(text, "5")
        same_choice(text, 0, ("A", "B"), ("x", "y"))
        same_truth(text, "True")
        drop_scores(text, ["5"])
    for _ in range(30):
        text = "".join(generator.choices(pieces, k=generator.randrange(1, 25)))
        same_expression(text, r"\frac{5}{2}x")
