"""What every model type of transformers makes of a cache is right, or refused with the reason."""

import pytest
import transformers

from tests.model_types import MODELS, NOT_BUILT, TABLE, WRONG, judge, read_table

_IS_OF_THE_TABLE = f"transformers {transformers.__version__} " in TABLE.read_text()


@pytest.mark.skipif(not _IS_OF_THE_TABLE, reason="the table is that of another transformers")
def test_the_table_has_every_model_type_and_none_that_is_wrong() -> None:
    outcomes = read_table()
    assert sorted(outcomes) == MODELS, "python -m tests.model_types writes the table"
    assert WRONG not in {outcome.verdict for outcome in outcomes.values()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "made"), MODELS)
def test_a_model_is_right_or_refused_with_the_reason_of_the_table(kind: str, made: str) -> None:
    outcome = judge(kind, made)
    assert outcome.verdict != WRONG, outcome.reason
    if _IS_OF_THE_TABLE:
        expected = read_table()[kind, made]
        # Why a model cannot be built differs between machines.
        if NOT_BUILT in (outcome.verdict, expected.verdict):
            assert outcome.verdict == expected.verdict, outcome.reason
        else:
            assert outcome == expected
