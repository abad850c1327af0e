"""Rows of agreement that runs add to those of earlier ones, and the page that is made of them."""

import dataclasses
from pathlib import Path

import pytest

from bench import answers
from bench.real_models import extended
from bench.results_page import FOLDER, PAGE, agreements, filled
from compressed_cache.eval.results.row import Result
from tests.results import make_result

(PATH, *_) = sorted(FOLDER.glob("*.jsonl"))
EARLIER = agreements(PATH)


def test_a_run_extends_an_earlier_one() -> None:
    first, *others = EARLIER
    again = dataclasses.replace(first, seconds=1.0)
    more = dataclasses.replace(others[0], budget=7)
    assert extended(EARLIER, [again, more]) == [again, *others, more]


def test_other_texts_are_refused() -> None:
    of_another = dataclasses.replace(EARLIER[0], text_tokens=1.0)
    with pytest.raises(ValueError, match=r"same texts.* Use another --out"):
        extended(EARLIER, [of_another])


def test_the_page_is_current() -> None:
    text = PAGE.read_text()
    assert filled(text) == text
    assert filled(text.replace("`rkv`", "`r`")) == text


def right(policy: str, budget: int | None, *problems: int) -> Result:
    """A row of eight problems, of which these were answered right."""
    correct = {str(number): float(number in problems) for number in range(8)}
    shape = {"budget": budget, "documents": 8, "versions": {"torch": "2", "transformers": "5"}}
    return make_result(policy=policy, correct=correct, accuracy=len(problems) / 8, **shape)


def test_answers_are_compared_problem_by_problem(tmp_path: Path) -> None:
    rows = [right("full", None, *range(7)), right("random", 32, 7), right("h2o", 32, 0, 1, 2)]
    (tmp_path / "one.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    *_, full, h2o, random = answers.accuracy(tmp_path).splitlines()
    assert full.startswith("| `full` | 88 [")
    # Seven problems against one, three against one, and four against none.
    assert full.endswith("|  | +75 (p 0.07) |")
    assert h2o.endswith("| -50 (p 0.12) | +25 (p 0.62) |")
    assert random.endswith("| -75 (p 0.07) |  |")


def test_policies_are_ranked_where_both_were_measured() -> None:
    agreed = {("m", "t", 32, name): share for name, share in zip("abcd", (9, 8, 7, 6), strict=True)}
    accuracies = {("m", "t", 32, name): share for name, share in zip("abc", (5, 6, 1), strict=True)}
    alone = ("m", "t", 64, "a")
    *_, line = answers.ranking({**agreed, alone: 1}, {**accuracies, alone: 1}).splitlines()
    assert line == "| m | `t` | 32 | 3 | 0.50 | `a` | `b` | 100 to 600 |"


def test_answers_to_other_problems_or_of_another_model_are_refused() -> None:
    row = right("h2o", 32, 1)
    other = dataclasses.replace(row, correct=dict.fromkeys("xyz", 1.0))
    of_another = dataclasses.replace(row, weights="0" * 16)
    for one in (other, of_another):
        with pytest.raises(ValueError, match=r"same texts"):
            extended([row], [one])
