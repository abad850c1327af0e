"""How memory and the time of a token grow with budget, batch, layers and tokens seen.

    pytest bench/test_growth.py --benchmark-only

Each is told as an exponent: 0 where it does not matter, 1 where twice as much takes twice as long.
The model itself takes its time too, so that of a token grows less than the cache alone.
"""

import copy
import math
from collections.abc import Sequence
from statistics import linear_regression, median
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contenders import EACH_DEVICE, SMALL, Generation, compressed, random_model

AS_IT_IS = {"budget": 128, "batch": 1, "layers": 4, "tokens seen": 2048}
GROWING = {
    "budget": (128, 256, 512, 1024),
    "batch": (1, 2, 4, 8),
    "layers": (2, 4, 8),
    "tokens seen": (2048, 4096, 8192, 16384),
}
ROUNDS = 4
TOKENS = 12  # of each round


@EACH_DEVICE
@pytest.mark.parametrize("quantity", GROWING)
@pytest.mark.parametrize("policy", ["full", "streaming_llm", "h2o", "snapkv", "rkv"])
def test_growth(benchmark: BenchmarkFixture, policy: str, quantity: str, device: str) -> None:
    values = GROWING[quantity]
    texts = [_text(policy, device, **AS_IT_IS | {quantity: value}) for value in values]
    tokens: list[list[float]] = [[] for _ in texts]

    def turn() -> None:
        for text, own in zip(texts, tokens, strict=True):
            own.append(median(text.continue_by(TOKENS)))

    for text in texts:
        text.continue_by(TOKENS)
    benchmark.group = f"growth, {device}"
    benchmark.pedantic(turn, rounds=ROUNDS, iterations=1)
    caches: list[Any] = [text.cache for text in texts]
    held = [cache.nbytes for cache in caches]
    seconds = [median(own) for own in tokens]
    benchmark.extra_info.update(
        table="growth",
        device=device,
        policy=policy,
        quantity=quantity,
        values=values,
        as_it_is=AS_IT_IS,
        bytes=held,
        seconds=seconds,
        bytes_exponent=exponent(values, held),
        seconds_exponent=exponent(values, seconds),
    )


def exponent(values: Sequence[float], found: Sequence[float]) -> float:
    """The power of ``values`` that ``found`` grows with, by least squares of their logarithms."""
    return linear_regression([*map(math.log, values)], [*map(math.log, found)]).slope


def _text(policy: str, device: str, **sizes: int) -> Generation:
    config = copy.deepcopy(SMALL)
    config.num_hidden_layers = sizes["layers"]
    contender = compressed(policy, compiled=False, budget=sizes["budget"])
    model = random_model(config, device)
    return Generation(contender, model, batch=sizes["batch"], prompt=sizes["tokens seen"])
