"""Latency of decoding under kvpress' DecodingPress, beside the caches of test_decode.py.

    pytest bench/test_kvpress.py --benchmark-only

The first run makes the environment `.venv-kvpress`, with pip.
"""

from contextlib import closing
from pathlib import Path
from subprocess import CalledProcessError

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contenders import BASELINE, BUDGET, EACH_PLACE, PROMPT, Generation, Place
from bench.kvpress import VERSIONS, KvpressGeneration, PressSetting, environment
from bench.test_decode import FEW_ROUNDS, ROUNDS, compare, make_model

PLAIN = f"{BASELINE.name} of transformers {VERSIONS['transformers']}"
PRESSES = [
    None,
    PressSetting("KnormPress", interval=512),  # the default of DecodingPress
    PressSetting("KnormPress", interval=16),  # what snapkv takes here under this budget
    PressSetting("SnapKVPress", interval=65),  # the shortest that its window of 64 tokens allows
]


@pytest.fixture(scope="module")
def python() -> Path:
    try:
        return environment()
    except CalledProcessError as error:
        pytest.skip(f"no environment for kvpress: {error.stderr.strip()[-300:]}")


@pytest.mark.parametrize("batch", [1, 8])
@EACH_PLACE
@pytest.mark.parametrize("press", PRESSES, ids=lambda press: str(press or PLAIN))
def test_kvpress(
    benchmark: BenchmarkFixture, python: Path, press: PressSetting | None, place: Place, batch: int
) -> None:
    if place.model == "Qwen3-4B":
        pytest.skip("one model in the other environment is enough")
    baseline = Generation(BASELINE, make_model(place), batch=batch)
    benchmark.group = f"decode, {place}, batch {batch}, prompt {PROMPT}"
    with closing(KvpressGeneration(python, press, baseline)) as measured:
        compare(
            benchmark,
            measured,
            baseline,
            rounds=ROUNDS if batch == 1 else FEW_ROUNDS,
            table="decode",
            device=place.device,
            model=place.model,
            contender=str(press or PLAIN),
            step="eager",
            batch=batch,
            prompt=PROMPT,
            budget=BUDGET,
            versions=VERSIONS,
        )
        benchmark.extra_info["held_tokens"] = measured.held_tokens
