"""How long a text and how many rows fit in the memory there is for the cache.

    pytest bench/test_capacity.py --benchmark-only

From the bytes that a cache holds after a prompt: what a model needs beside it is left out.
"""

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import DynamicCache

from bench.bandwidth import cache_bytes
from bench.contenders import EACH_PLACE, EVICTING, Place
from bench.test_decode import make_model
from compressed_cache import CompressedCache
from compressed_cache.versions import cache_argument

MEMORY = 16 * 2**30  # bytes
BUDGET = 256
PROMPT = 512  # tokens
LENGTH = 32768  # of the texts in the largest batch


@EACH_PLACE
@pytest.mark.parametrize("cache", ["DynamicCache", *EVICTING])
def test_capacity(benchmark: BenchmarkFixture, cache: str, place: Place) -> None:
    model = make_model(place)
    full = cache == "DynamicCache"
    held: Any = DynamicCache(config=model.config) if full else CompressedCache(cache, BUDGET)
    ids = torch.arange(1, PROMPT + 1, device=model.device)[None]

    def read() -> None:
        with torch.inference_mode():
            model(ids, **cache_argument(held))

    benchmark.group = f"capacity, {place}"
    benchmark.pedantic(read, rounds=1, iterations=1)
    row = cache_bytes(held) // PROMPT * LENGTH if full else held.nbytes
    benchmark.extra_info.update(
        table="capacity",
        device=place.device,
        model=place.model,
        cache=cache,
        budget=None if full else BUDGET,
        memory_bytes=MEMORY,
        row_tokens=LENGTH,
        row_bytes=row,
        largest_batch=MEMORY // row,
        longest_text_tokens=MEMORY * LENGTH // row if full else None,
    )
