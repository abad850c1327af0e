"""Rows of agreement that runs add to those of earlier ones, and the page that is made of them."""

import dataclasses

import pytest

from bench.real_models import extended
from bench.results_page import FOLDER, PAGE, agreements, filled

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
