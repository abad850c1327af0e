"""Time and peak memory of reading a prompt, at once and in chunks.

pytest bench/test_prompt.py --benchmark-only
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contenders import EACH_DEVICE, EACH_PLACE, EVICTING, Place
from bench.prompts import BUDGET, CHUNK, measure_chunks, measure_prefill

LENGTHS = (8_192, 32_768, 65_536, 200_000)
PREFILL_LENGTHS = (1024, 8192, 32768, 131072)
TO_THE_END = ("DynamicCache", "h2o", "snapkv", "streaming_llm")


@pytest.mark.parametrize("tokens", PREFILL_LENGTHS)
@EACH_PLACE
@pytest.mark.parametrize("cache", ["DynamicCache", *EVICTING])
def test_prefill(benchmark: BenchmarkFixture, cache: str, place: Place, tokens: int) -> None:
    if tokens > place.lengths[-1]:
        pytest.skip("not a length of this device")
    if place.device == "cpu" and tokens > 8192 and cache not in TO_THE_END:
        pytest.skip("a minute or two each on a CPU, and no other than those measured")
    benchmark.group = f"prefill, {place}, {tokens} tokens"
    found = benchmark.pedantic(measure_prefill, args=(cache, tokens, place), rounds=1, iterations=1)
    benchmark.extra_info.update(
        table="prefill",
        device=place.device,
        model=place.model,
        cache=cache,
        tokens=tokens,
        budget=BUDGET,
        **found,
    )


@pytest.mark.parametrize("tokens", LENGTHS)
@EACH_DEVICE
@pytest.mark.parametrize("cache", ["h2o", "snapkv", "DynamicCache"])
def test_chunks(benchmark: BenchmarkFixture, cache: str, device: str, tokens: int) -> None:
    if (cache, device, tokens) == ("DynamicCache", "cpu", LENGTHS[-1]):
        pytest.skip("attention to 200,000 tokens takes a quarter of an hour on a CPU")
    benchmark.group = f"chunks, {device}, {tokens} tokens"
    found = benchmark.pedantic(measure_chunks, args=(cache, tokens, device), rounds=1, iterations=1)
    benchmark.extra_info.update(
        table="chunks",
        device=device,
        cache=cache,
        tokens=tokens,
        chunk=CHUNK,
        budget=BUDGET,
        **found,
    )
