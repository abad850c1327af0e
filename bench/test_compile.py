"""Compile time of the decode step against the number of layers, in a new process each.

pytest bench/test_compile.py --benchmark-only
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from compressed_cache.bench.compilation import measure

LAYERS = (4, 16, 32)
CONTENDERS = [
    ("StaticCache", False),
    ("h2o", False),
    ("h2o", True),
    ("snapkv", False),
    ("snapkv", True),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(("cache", "once"), CONTENDERS)
def test_compile(
    benchmark: BenchmarkFixture, cache: str, once: bool, layers: int, device: str
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    benchmark.group = f"compile, {device}, {layers} layers"
    found = benchmark.pedantic(
        measure, args=(cache, layers, device), kwargs={"once": once}, rounds=1, iterations=1
    )
    benchmark.extra_info.update(
        table="compile", device=device, cache=cache, layers=layers, once=once, **found
    )
