"""Latency of decoding, per token, as ratios to DynamicCache measured in between.

    pytest bench/ --benchmark-only

The table shows how long each token takes; `bench/results/decode-DEVICE.json` keeps medians, and
ratios to tokens of the baseline generated right before, which a drifting machine cannot distort.
"""

from collections.abc import Iterator
from functools import cache
from statistics import median
from typing import Protocol

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from compressed_cache.bench import contenders
from compressed_cache.bench.contenders import (
    BASELINE,
    FLOOR,
    STATIC,
    Contender,
    Generation,
    compressed,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROUNDS = 12
TOKENS = 24  # of each round
EARLY, LATE = 1024, 32768  # tokens seen

make_model = cache(contenders.make_model)


@pytest.fixture(autouse=True)
def _fresh_compiler(device: str) -> Iterator[None]:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Stopwatch:
    """A timer for pytest-benchmark that advances only while a measured token is decoded."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Continued(Protocol):
    """A text such as ``Generation``, wherever it is generated."""

    def continue_by(self, tokens: int) -> list[float]: ...


def compare(
    benchmark: BenchmarkFixture, measured: Continued, baseline: Continued, **conditions: object
) -> None:
    """Lets both generate in turn; the benchmark records the median token of each turn."""
    stopwatch, ratios, tokens, others = Stopwatch(), [], [], []
    benchmark._timer = stopwatch

    def turn() -> None:
        other = median(baseline.continue_by(TOKENS))
        token = median(measured.continue_by(TOKENS))
        stopwatch.seconds += token
        tokens.append(token)
        others.append(other)
        ratios.append(token / other)

    for generation in (measured, baseline):
        generation.continue_by(TOKENS)
    benchmark.pedantic(turn, rounds=ROUNDS, iterations=1)
    benchmark.extra_info.update(
        conditions,
        table="decode",
        prompt=contenders.PROMPT,
        budget=contenders.BUDGET,
        ms_per_token=1000 * median(tokens),
        rounds=ROUNDS,
        tokens_per_round=TOKENS,
        baseline_ms=1000 * median(others),
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
    )


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "contender",
    [
        BASELINE,
        STATIC,
        FLOOR,
        *(
            compressed(policy, compiled=compiled)
            for policy in ("snapkv", "h2o")
            for compiled in (False, True)
        ),
    ],
    ids=str,
)
def test_decode(benchmark: BenchmarkFixture, contender: Contender, device: str, batch: int) -> None:
    model = make_model(device)
    benchmark.group = f"decode, {device}, batch {batch}"
    compare(
        benchmark,
        Generation(contender, model, batch=batch),
        Generation(BASELINE, model, batch=batch),
        kind="decode",
        contender=contender.name,
        compiled=contender.compiled,
        batch=batch,
        device=device,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", ["snapkv"])
def test_long(benchmark: BenchmarkFixture, policy: str, device: str) -> None:
    model = make_model(device)
    contender = compressed(policy, compiled=True)
    late, early = (Generation(contender, model, batch=1, prompt=EARLY) for _ in range(2))
    late.continue_by(LATE - EARLY)
    benchmark.group = f"{LATE} against {EARLY} tokens seen, {device}"
    compare(
        benchmark,
        late,
        early,
        kind="long",
        early=EARLY,
        late=LATE,
        contender=policy,
        compiled=True,
        batch=1,
        device=device,
    )
