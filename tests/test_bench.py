"""What the benchmarks add up, keep and print."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from bench.bandwidth import cache_bytes, step_bytes
from bench.contenders import BASELINE, GROUPED_STATIC, Generation, compressed
from bench.results import Results
from bench.test_growth import exponent

ROOT = Path(__file__).parent.parent


def test_rows_of_other_tests_stay_unless_conditions_changed(tmp_path: Path) -> None:
    results = Results.of("Some CPU, 2 GHz", "cpu", tmp_path)
    results.add("decode", {"a": {"ms": 1}, "b": {"ms": 2}}, {"threads": 1})
    results.save(tmp_path)
    again = Results.of("Some CPU, 2 GHz", "cpu", tmp_path)
    again.add("decode", {"b": {"ms": 3}}, {"threads": 1})
    assert again.rows("decode") == [{"ms": 1}, {"ms": 3}]
    again.add("decode", {"c": {"ms": 4}}, {"threads": 2})
    assert again.rows("decode") == [{"ms": 4}]
    assert again.rows("prefill") == []


def test_what_must_move_is_weights_without_embeddings_and_cache(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    # 400 tokens, hidden 48, MLP of 64; queries 48, keys and values 24 each.
    layer = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 64 + 2 * 48
    weights = 2 * layer + 48 + 400 * 48
    assert step_bytes(make_model(), 1000) == 4 * weights + 1000
    assert step_bytes(make_model(tie_word_embeddings=True), 0) == 4 * weights


def test_a_filled_cache_stands_for_a_prompt(model: LlamaForCausalLM) -> None:
    generation = Generation(BASELINE, model, batch=2, prompt=50)
    assert generation.cache.get_seq_length() == 49
    # Two layers, two heads of 12, keys and values in float32.
    assert cache_bytes(generation.cache) == 2 * 2 * (2 * 2 * 49 * 12) * 4
    assert len(generation.continue_by(3)) == 3
    assert generation.cache.get_seq_length() == 53


def test_a_compressed_cache_reads_its_prompt(model: LlamaForCausalLM) -> None:
    generation = Generation(compressed("h2o", compiled=False, budget=16), model, batch=1, prompt=50)
    generation.continue_by(3)
    assert generation.cache.get_seq_length() == 53
    assert generation.cache.evicted_tokens == 53 - 16


def test_keys_that_are_not_repeated_give_the_same_tokens(model: LlamaForCausalLM) -> None:
    ids = torch.arange(1, 30)[None]
    expected = model(ids).logits
    implementation = model.config._attn_implementation
    try:
        model.set_attn_implementation(GROUPED_STATIC.attention)
        torch.testing.assert_close(model(ids).logits, expected)
        mask = torch.ones_like(ids)
        mask[:, :4] = 0
        padded = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(padded, model(ids, attention_mask=mask).logits)
    finally:
        model.set_attn_implementation(implementation)


@pytest.mark.slow
def test_the_last_line_is_one_json_document(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "bench/test_capacity.py", "--benchmark-only", "-q"]
    # A worker of xdist would pass on that it is one.
    variables = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST")}
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-k", "cpu and knorm", "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=variables,
    )
    assert run.returncode == 0, run.stdout[-2000:]
    (row,) = json.loads(run.stdout.splitlines()[-1])["cpu"]["capacity"].values()
    assert row["row_bytes"] > 0
    assert row["largest_batch"] == row["memory_bytes"] // row["row_bytes"]
    (path,) = tmp_path.glob("*.json")
    assert list(json.loads(path.read_text())["tables"]) == ["capacity"]


def test_growth_is_told_by_its_power() -> None:
    assert exponent([128, 256, 1024], [5, 10, 40]) == pytest.approx(1)
    assert exponent([1, 2, 4, 8], [3, 3, 3, 3]) == pytest.approx(0)
    assert exponent([2, 4, 8], [4, 16, 64]) == pytest.approx(2)
