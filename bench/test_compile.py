"""Compile time of the decode step against the number of layers, in a new process each.

pytest bench/test_compile.py --benchmark-only
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.compilation import measure
from bench.contenders import EACH_DEVICE

LAYERS = (4, 16, 32)
CONTENDERS = [
    ("StaticCache", False),
    ("h2o", False),
    ("h2o", True),
    ("snapkv", False),
    ("snapkv", True),
]


@EACH_DEVICE
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(("cache", "once"), CONTENDERS)
def test_compile(
    benchmark: BenchmarkFixture, cache: str, once: bool, layers: int, device: str
) -> None:
    benchmark.group = f"compile, {device}, {layers} layers"
    found = benchmark.pedantic(
        measure, args=(cache, layers, device), kwargs={"once": once}, rounds=1, iterations=1
    )
    benchmark.extra_info.update(
        table="compile", device=device, cache=cache, layers=layers, once=once, **found
    )
