"""The table of mutants fits the code; `python -m tests.mutants` shows that all are caught."""

import json

from tests.mutants import FOUND, MUTANTS, problems, was_caught


def test_each_mutant_changes_one_place() -> None:
    assert not list(problems())


def test_each_mutant_was_caught() -> None:
    """When it was last run; a new one is run before it is committed."""
    found = json.loads(FOUND.read_text())
    assert not [one.name for one in MUTANTS if not was_caught(found.get(one.name))]
