"""Peak memory of reading a long prompt in chunks: flat under a budget, linear without one.

pytest bench/test_prompt.py --benchmark-only
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from compressed_cache.bench.prompts import BUDGET, CHUNK, measure

LENGTHS = (8_192, 32_768, 65_536, 200_000)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("cache", ["h2o", "snapkv", "DynamicCache"])
def test_prompt(benchmark: BenchmarkFixture, cache: str, device: str, tokens: int) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if (cache, device, tokens) == ("DynamicCache", "cpu", LENGTHS[-1]):
        pytest.skip("attention to 200,000 tokens takes a quarter of an hour on a CPU")
    benchmark.group = f"prompt, {device}, {tokens} tokens"
    found = benchmark.pedantic(measure, args=(cache, tokens, device), rounds=1, iterations=1)
    benchmark.extra_info.update(
        table="prompt",
        device=device,
        cache=cache,
        tokens=tokens,
        chunk=CHUNK,
        budget=BUDGET,
        **found,
    )
