"""Rows of results: written, read back, refused where they are broken, and compared."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from compressed_cache.__main__ import main
from compressed_cache.eval.results.comparison import compare
from compressed_cache.eval.results.row import FILE, Result, append, read
from tests.results import make_result

LINE = make_result().to_json()


def _without(name: str) -> str:
    values = json.loads(LINE)
    del values[name]
    return json.dumps(values)


BROKEN = {
    "half a line": (LINE[:200], "half of one"),
    "a newer format": (
        LINE.replace('"format": 1', '"format": 2'),
        "format must be 1, got 2.*update",
    ),
    "another file": ('{"results": {}}', "a file of another kind"),
    "no JSON": ("task,accuracy", "half of one or something else"),
    "a list": ("[1]", "a file of another kind"),
    "a missing field": (_without("tokens"), "differs in {'tokens'}"),
    "a wrong type": (LINE.replace('"seed": 0', '"seed": "0"'), "seed is of another type, got '0'"),
}


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [make_result(), make_result(policy="full", budget=None, accuracy=1), make_result(seed=1)]
    for row in rows:
        append(tmp_path / FILE, row)
    assert read(tmp_path) == read(tmp_path / FILE) == rows
    first = (tmp_path / FILE).read_text().splitlines()[0]
    assert next(iter(json.loads(first).items())) == ("format", 1)


def test_rows_of_before_a_field_have_its_default(tmp_path: Path) -> None:
    values = json.loads(LINE)
    for name in ("given", "metric", "setting"):
        del values[name]
    (tmp_path / FILE).write_text(json.dumps(values) + "\n")
    (found,) = read(tmp_path)
    assert isinstance(found, Result)
    assert (found.given, found.metric, found.setting) == (None, "accuracy,none", None)


@pytest.mark.parametrize(("line", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_line_that_is_no_row_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{LINE}\n{line}\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: .*{message}") as caught:
        read(path)
    assert "start it again and it mends the file" in str(caught.value)


def test_no_file_is_no_empty_result(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="name a sweep's folder"):
        read(tmp_path)


def _scored(policy: str, scores: str, **changes: Any) -> Result:
    correct = {str(i): float(score) for i, score in enumerate(scores)}
    return make_result(policy=policy, correct=correct, **changes)


def test_a_comparison_counts_the_documents_on_which_two_policies_differ() -> None:
    rows = [_scored("h2o", "1111111100"), _scored("snapkv", "1100000010"), _scored("knorm", "0")]
    (found,) = compare(rows, "h2o", "snapkv")
    assert (found.documents, found.better) == (10, (6, 1))
    assert found.accuracies == (0.8, 0.3)
    assert found.difference == pytest.approx(0.5)
    assert found.p == binomtest(6, 7).pvalue == pytest.approx(0.125)
    assert 0 < found.difference_low < 0.5 < found.difference_high < 1
    (turned,) = compare(rows, "snapkv", "h2o")
    assert (turned.better, turned.p) == ((1, 6), found.p)
    assert turned.difference == -found.difference


def test_equal_scores_differ_by_nothing() -> None:
    (found,) = compare([_scored("h2o", "1101"), _scored("tova", "1101")], "h2o", "tova")
    assert (found.difference, found.difference_low, found.difference_high) == (0, 0, 0)
    assert (found.better, found.p) == ((0, 0), 1)


def test_documents_count_once_however_many_seeds_there_are() -> None:
    rows = [
        _scored(policy, scores, seed=seed)
        for policy, by_seed in {"h2o": ("1110", "1010"), "tova": ("1000", "0001")}.items()
        for seed, scores in enumerate(by_seed)
    ]
    (found,) = compare(rows, "h2o", "tova")
    # Means over seeds: 1, .5, 1, 0 and .5, 0, 0, .5.
    assert (found.seeds, found.documents, found.better) == (2, 4, (3, 1))
    assert found.accuracies == (0.625, 0.25)


def test_a_policy_without_budget_is_compared_at_each_of_the_other() -> None:
    rows = [_scored("h2o", "10", budget=budget) for budget in (64, 128)]
    rows += [_scored("full", "11", budget=None), _scored("h2o", "01", task="another")]
    assert [found.budget for found in compare(rows, "full", "h2o")] == [64, 128]


def test_settings_of_a_policy_are_compared_by_what_the_sweep_called_them() -> None:
    rows = [
        _scored("h2o", "10"),
        _scored("h2o", "11", setting="h2o:recent=16"),
        _scored("h2o", "00", setting="h2o:recent=8"),
    ]
    (found,) = compare(rows, "h2o", "h2o:recent=16")
    assert found.accuracies == (0.5, 1.0)
    with pytest.raises(ValueError, match=r"only of 'h2o', 'h2o:recent=16', .*\. Did you"):
        compare(rows, "h2o", "h2o:recent=17")


REFUSALS: dict[str, tuple[Callable[[], list[Result]], str]] = {
    "a policy that is not there": (
        lambda: [_scored("h2o", "1"), _scored("snapk", "1")],
        "no rows of 'snapkv', only of 'h2o', 'snapk'. Did you mean 'snapk'",
    ),
    "other documents": (
        lambda: [_scored("h2o", "1"), make_result(policy="snapkv", correct={"x": 1.0})],
        "must have documents in common",
    ),
    "other seeds": (
        lambda: [_scored("h2o", "1"), _scored("snapkv", "1", seed=1)],
        "must have documents in common",
    ),
    "other tasks": (
        lambda: [_scored("h2o", "1"), _scored("snapkv", "1", task="another")],
        "the same model, task and budget",
    ),
    "two rows for one": (
        lambda: [_scored("h2o", "1"), _scored("h2o", "0"), _scored("snapkv", "1")],
        r"must have one row of .* got more: two with the same options\. Keep one of them",
    ),
}


@pytest.mark.parametrize(("rows", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_rows_that_cannot_be_compared_are_refused(
    rows: Callable[[], list[Result]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(rows(), "h2o", "snapkv")


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row in (_scored("h2o", "1111111100"), _scored("snapkv", "1100000010")):
        append(tmp_path / FILE, replace(row, model="m", task="t"))
    assert main(["compare", str(tmp_path), "--policies", "H2O,SnapKV"]) == 0
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
    ]
    values = dict(zip(table[0], table[2], strict=True))
    interval = values.pop("difference [95%]")
    assert interval.startswith("+50 [+")
    assert values == {
        "measure": "accuracy",
        "model": "m",
        "task": "t",
        "budget": "64",
        "documents": "10",
        "seeds": "1",
        "h2o": "80%",
        "snapkv": "30%",
        "only h2o": "6",
        "only snapkv": "1",
        "p": "0.12",
    }


@pytest.mark.parametrize(
    ("policies", "file", "status", "message"),
    [
        ("h2o", FILE, 2, "--policies must be two, got h2o"),
        ("h2o,tova", FILE, 2, "no rows of 'tova'"),
        ("h2o,tova", "nothing", 1, "no results at"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(
    policies: str,
    file: str,
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    append(tmp_path / FILE, make_result())
    assert main(["compare", str(tmp_path / file), "--policies", policies]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
