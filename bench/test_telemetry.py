"""What watching a cache costs a decode step.

    pytest bench/test_telemetry.py --benchmark-only

First as a ratio to the same step unwatched, where the row that watches nothing says how far two
equal caches come apart on this machine. That is often more than timing costs, so its part in the
step is also measured from inside: seconds between its begin and its end, in a share of the step.
"""

import functools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import LogitsProcessorList

from bench.contenders import (
    BASELINE,
    BUDGET,
    EACH_PLACE,
    PROMPT,
    Contender,
    Generation,
    Place,
    compressed,
)
from bench.test_decode import FEW_ROUNDS, TOKENS, compare, make_model
from compressed_cache import CompressedCache
from compressed_cache.telemetry import Recorder, measure
from compressed_cache.telemetry.timer import Timer

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
TIMED = Contender(POLICY, _timed)
WATCHED = {
    "nothing": (Generation, UNWATCHED, ROUNDS),
    "telemetry=True": (Generation, TIMED, ROUNDS),
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


# What each way of timing does in a step, all of it in one call.
INSIDE = {
    "telemetry=True": (Timer, "call_begins", Generation, TIMED),
    "measure": (Timer, "call_begins", _Measured, UNWATCHED),
    # Without measure this list is empty.
    "measure of DynamicCache": (LogitsProcessorList, "__call__", _Measured, BASELINE),
}


@EACH_PLACE
@pytest.mark.parametrize("watched", INSIDE)
def test_share_of_timing(
    benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch, watched: str, place: Place
) -> None:
    model = make_model(place)
    owner, method, kind, contender = INSIDE[watched]
    generation = kind(contender, model, batch=1)
    spent: list[float] = []
    monkeypatch.setattr(owner, method, _clocked(getattr(owner, method), spent))
    steps: list[float] = []
    generation.continue_by(TOKENS)
    spent.clear()
    benchmark.group = f"share of timing, {place}"
    benchmark.pedantic(
        lambda: steps.extend(generation.continue_by(TOKENS)), rounds=FEW_ROUNDS, iterations=1
    )
    benchmark.extra_info.update(
        table="share of timing",
        device=place.device,
        model=place.model,
        contender=watched,
        policy=POLICY,
        step=contender.step,
        batch=1,
        prompt=PROMPT,
        budget=BUDGET,
        ms_per_token=1000 * median(steps),
        us_per_token=1e6 * sum(spent) / len(steps),
        share=sum(spent) / sum(steps),
    )


def _clocked(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    @functools.wraps(function)
    def clocked(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - begin)

    return clocked
