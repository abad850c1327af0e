"""Latency of decoding, per token, as ratios to DynamicCache measured in between.

    pytest bench/ --benchmark-only

The table shows how long each token takes; the results keep medians, and ratios to tokens of the
baseline generated right before, which a drifting machine cannot distort.
"""

from functools import lru_cache
from statistics import mean, median
from typing import Protocol

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import contenders
from bench.bandwidth import cache_bytes, copy_bandwidth, step_bytes
from bench.contenders import (
    BASELINE,
    EACH_PLACE,
    EVICTING,
    FLOOR,
    GROUPED_STATIC,
    PLACES,
    PROMPT,
    STATIC,
    Contender,
    Generation,
    Place,
    compressed,
)

ROUNDS = 12
FEW_ROUNDS = 5  # where many rows are measured, or a round of the baseline takes long
TOKENS = 24  # of each round
LONGEST_INTERVAL = 128  # of the policies' own defaults
BUDGETS = (128, 1024, 4096)
SEEN_AT_ONE_LENGTH = set(EVICTING) - {"h2o", "snapkv", "streaming_llm"}
LONG_PROMPT = 6144  # tokens, longer than any of these
BATCHES = sorted({batch for place in PLACES for batch in place.batches})
LENGTHS = sorted({length for place in PLACES for length in place.lengths})

# Of two models on one device there may be room for one only.
make_model = lru_cache(maxsize=1)(contenders.make_model)


class Continued(Protocol):
    """A text that is continued round by round."""

    def continue_by(self, tokens: int) -> list[float]:
        """Seconds of each of ``tokens`` tokens."""
        ...


class Stopwatch:
    """A timer for pytest-benchmark that advances only while a measured token is decoded."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def compare(
    benchmark: BenchmarkFixture,
    measured: Continued,
    baseline: Continued,
    *,
    rounds: int = ROUNDS,
    tokens_per_round: int = TOKENS,
    **conditions: object,
) -> None:
    """Lets both generate in turn; the benchmark records the median token of each turn."""
    stopwatch, ratios, tokens, others = Stopwatch(), [], [], []
    means: list[float] = []
    mean_ratios: list[float] = []
    benchmark._timer = stopwatch

    def turn() -> None:
        their_seconds = baseline.continue_by(tokens_per_round)
        seconds = measured.continue_by(tokens_per_round)
        other, token = median(their_seconds), median(seconds)
        stopwatch.seconds += token
        tokens.append(token)
        means.append(mean(seconds))
        mean_ratios.append(mean(seconds) / mean(their_seconds))
        others.append(other)
        ratios.append(token / other)

    for generation in (measured, baseline):
        generation.continue_by(tokens_per_round)
    benchmark.pedantic(turn, rounds=rounds, iterations=1)
    benchmark.extra_info.update(
        conditions,
        ms_per_token=1000 * median(tokens),
        # Steps in which slots are ranked count in the mean only.
        mean_ms_per_token=1000 * median(means),
        mean_ratio=median(mean_ratios),
        rounds=rounds,
        tokens_per_round=tokens_per_round,
        baseline_ms=1000 * median(others),
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
    )
    if isinstance(measured, Generation):
        needed = step_bytes(measured.model, cache_bytes(measured.cache))
        bandwidth = copy_bandwidth(measured.model.device.type)
        benchmark.extra_info.update(
            bytes_per_step=needed,
            copy_bytes_per_s=bandwidth,
            share_of_bandwidth=needed / bandwidth / median(tokens),
        )


def measure(
    benchmark: BenchmarkFixture,
    contender: Contender,
    place: Place,
    table: str,
    *,
    batch: int = 1,
    prompt: int = PROMPT,
    rounds: int = ROUNDS,
    tokens_per_round: int = TOKENS,
    **conditions: object,
) -> None:
    """A row: a contender beside the baseline, with the same prompt and batch."""
    model = make_model(place)
    benchmark.group = f"{table}, {place}, batch {batch}, prompt {prompt}"
    compare(
        benchmark,
        Generation(contender, model, batch=batch, prompt=prompt),
        Generation(BASELINE, model, batch=batch, prompt=prompt),
        rounds=rounds,
        tokens_per_round=tokens_per_round,
        table=table,
        device=place.device,
        model=place.model,
        contender=contender.name,
        step=contender.step,
        batch=batch,
        prompt=prompt,
        **conditions,
    )


@pytest.mark.parametrize("batch", BATCHES)
@EACH_PLACE
@pytest.mark.parametrize(
    "contender",
    [
        BASELINE,
        STATIC,
        GROUPED_STATIC,
        FLOOR,
        *(compressed(policy) for policy in EVICTING),
        compressed("h2o", loop=True),
        *(compressed(policy, compiled=False) for policy in EVICTING),
    ],
    ids=str,
)
def test_decode(
    benchmark: BenchmarkFixture, contender: Contender, place: Place, batch: int
) -> None:
    if batch not in place.batches:
        pytest.skip("not a batch of this device")
    if batch > 1 and contender.step == "eager" and contender is not BASELINE:
        pytest.skip("what eager steps cost is seen at batch 1")
    rounds = ROUNDS if batch == 1 else FEW_ROUNDS
    measure(
        *(benchmark, contender, place, "decode"),
        batch=batch,
        rounds=rounds,
        budget=contenders.BUDGET,
    )


@pytest.mark.parametrize("tokens", LENGTHS)
@EACH_PLACE
@pytest.mark.parametrize(
    "contender",
    [BASELINE, GROUPED_STATIC, *(compressed(policy) for policy in EVICTING)],
    ids=str,
)
def test_tokens_seen(
    benchmark: BenchmarkFixture, contender: Contender, place: Place, tokens: int
) -> None:
    if tokens not in place.lengths:
        pytest.skip("not a length of this device")
    if place.device == "cpu" and tokens != 8192 and contender.name in SEEN_AT_ONE_LENGTH:
        pytest.skip("one length for most policies: a prompt takes up to a minute on a CPU")
    measure(
        *(benchmark, contender, place, "tokens seen"),
        prompt=tokens,
        rounds=FEW_ROUNDS,
        budget=contenders.BUDGET,
    )


@EACH_PLACE
@pytest.mark.parametrize("policy", ["h2o", "snapkv"])
def test_late_against_early(benchmark: BenchmarkFixture, policy: str, place: Place) -> None:
    early, late = 1024, 32768
    model, contender = make_model(place), compressed(policy)
    benchmark.group = f"late against early, {place}"
    compare(
        benchmark,
        *(Generation(contender, model, batch=1, prompt=prompt) for prompt in (late, early)),
        table="late against early",
        device=place.device,
        model=place.model,
        contender=policy,
        early=early,
        late=late,
    )


@EACH_PLACE
@pytest.mark.parametrize("policy", ["h2o"])
def test_fresh_cache(benchmark: BenchmarkFixture, policy: str, place: Place) -> None:
    """What a new cache object costs beside one that is reset: nothing, or CUDA graphs anew."""
    model, contender = make_model(place), compressed(policy)
    kept = Generation(contender, model, batch=1)
    prompt = kept.ids
    kept.continue_by(TOKENS)
    seconds: dict[str, list[float]] = {"fresh": [], "reset": []}

    def turn() -> None:
        fresh = Generation(contender, model, batch=1)
        seconds["fresh"].append(sum(fresh.continue_by(TOKENS)))
        with torch.inference_mode():
            kept.cache.reset()
        kept.ids = prompt
        seconds["reset"].append(sum(kept.continue_by(TOKENS)))

    benchmark.group = f"fresh cache, {place}"
    benchmark.pedantic(turn, rounds=FEW_ROUNDS, iterations=1)
    ratios = [a / b for a, b in zip(seconds["fresh"], seconds["reset"], strict=True)]
    benchmark.extra_info.update(
        table="fresh cache",
        device=place.device,
        model=place.model,
        contender=policy,
        tokens=TOKENS,
        fresh_ms=1000 * median(seconds["fresh"]),
        reset_ms=1000 * median(seconds["reset"]),
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
    )


@pytest.mark.parametrize("budget", BUDGETS)
@EACH_PLACE
@pytest.mark.parametrize("policy", EVICTING)
def test_budget(benchmark: BenchmarkFixture, policy: str, place: Place, budget: int) -> None:
    contender = compressed(policy, budget=budget)
    measure(
        *(benchmark, contender, place, "budget"),
        prompt=LONG_PROMPT,
        rounds=FEW_ROUNDS,
        # As often as in any long text slots are ranked.
        tokens_per_round=LONGEST_INTERVAL,
        budget=budget,
    )
