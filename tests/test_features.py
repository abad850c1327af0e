"""The table of features has what a policy does when it is tried."""

import json

import pytest

from bench.every_policy import COMBINATIONS
from tests import features
from tests.grids import slow_but

FOUND = json.loads(features.FILE.read_text())
# All others are tried for padding and compilation elsewhere, and are of the same kinds.
TRIED = ("full", "h2o", "shadowkv", "kvzip", *COMBINATIONS)


def test_the_table_is_of_every_policy() -> None:
    assert tuple(FOUND) == features.EVERY
    for row in FOUND.values():
        assert list(row) == [*features.FEATURES, "calibration"]


def test_every_no_has_its_reason() -> None:
    for name, row in FOUND.items():
        for feature in features.FEATURES:
            assert row[feature] == features.YES or row[feature].endswith("."), name


@pytest.mark.parametrize("name", slow_but(("full",), TRIED))
def test_a_row_is_what_is_found(name: str) -> None:
    assert features.tried(name).items() <= FOUND[name].items()


@pytest.mark.parametrize("name", FOUND)
def test_files_that_are_needed_are_told(name: str) -> None:
    assert features.statistics_of(name) == FOUND[name]["calibration"]
