"""Latency of decoding under every policy and modifier, as a ratio to DynamicCache."""

from dataclasses import replace

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from transformers.cache_utils import Cache

from bench.contenders import BUDGET, EACH_PLACE, Place, compressed
from bench.every_policy import EVERY, statistics
from bench.test_decode import FEW_ROUNDS, make_model, measure
from compressed_cache import CompressedCache


@EACH_PLACE
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("policy", EVERY)
def test_every_policy(
    benchmark: BenchmarkFixture, policy: str, compiled: bool, place: Place
) -> None:
    options = statistics(policy, make_model(place))

    def make_cache(*_: object) -> Cache:
        # Some protect the prompt unless told otherwise, which has no room here.
        return CompressedCache(policy, BUDGET, protect_prompt=False, **options)

    contender = replace(compressed(policy, compiled=compiled), make_cache=make_cache)
    measure(
        *(benchmark, contender, place, "policies"),
        rounds=FEW_ROUNDS,
        budget=BUDGET,
    )
