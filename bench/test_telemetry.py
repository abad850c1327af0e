"""What watching a cache costs a decode step, as a ratio to the same step unwatched.

    pytest bench/test_telemetry.py --benchmark-only

The first row watches nothing: how far two equal caches come apart on this machine.
"""

from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from compressed_cache import CompressedCache
from compressed_cache.bench.contenders import (
    BUDGET,
    EACH_PLACE,
    PROMPT,
    Contender,
    Generation,
    Place,
    compressed,
)
from compressed_cache.bench.test_decode import FEW_ROUNDS, compare, make_model
from compressed_cache.telemetry import Recorder, measure

POLICY = "h2o"
ROUNDS = 60


def _timed(*_: Any) -> CompressedCache:
    return CompressedCache(POLICY, BUDGET, telemetry=True)


def _recorded(*, shadow: bool) -> CompressedCache:
    cache = CompressedCache(POLICY, BUDGET)
    Recorder(cache, shadow=shadow)
    return cache


class _Measured(Generation):
    """A text that is continued while ``measure`` is open."""

    def continue_by(self, tokens: int) -> list[float]:
        with measure(self.model):
            return super().continue_by(tokens)


UNWATCHED = compressed(POLICY, compiled=False)
WATCHED = {
    "nothing": (Generation, UNWATCHED, ROUNDS),
    "telemetry=True": (Generation, Contender(POLICY, _timed), ROUNDS),
    "measure": (_Measured, UNWATCHED, ROUNDS),
    "Recorder": (Generation, Contender(POLICY, lambda *_: _recorded(shadow=False)), FEW_ROUNDS),
    "Recorder with shadow": (
        *(Generation, Contender(POLICY, lambda *_: _recorded(shadow=True))),
        FEW_ROUNDS,
    ),
}


@EACH_PLACE
@pytest.mark.parametrize("watched", WATCHED)
def test_watching(benchmark: BenchmarkFixture, watched: str, place: Place) -> None:
    model = make_model(place)
    kind, contender, rounds = WATCHED[watched]
    benchmark.group = f"telemetry, {place}"
    compare(
        benchmark,
        kind(contender, model, batch=1),
        Generation(UNWATCHED, model, batch=1),
        rounds=rounds,
        table="telemetry",
        device=place.device,
        model=place.model,
        contender=watched,
        policy=POLICY,
        step=contender.step,
        batch=1,
        prompt=PROMPT,
        budget=BUDGET,
    )
