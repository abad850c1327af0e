"""Random numbers from hashes."""

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache
from compressed_cache.policies.draws import gauss, uniform
from tests.conftest import distinct_tokens, held

DRAWING = ["random", "random_prompt", "vase", "vase_dkv", "curdkv"]


def _kept(model: Any, policy: str, **options: Any) -> list[Any]:
    cache = CompressedCache(policy, 20, sinks=2, recent=3, protect_prompt=False, **options)
    model.generate(distinct_tokens(1, 30), past_key_values=cache, max_new_tokens=30)
    return [held(cache, layer) for layer in range(2)]


@pytest.mark.parametrize("policy", DRAWING)
def test_a_seed_decides_and_the_global_generator_is_left_alone(
    model: LlamaForCausalLM, policy: str
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = _kept(model, policy, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert _kept(model, policy, seed=1) == first
    assert _kept(model, policy, seed=2) != first


def test_uniform_numbers_are_strictly_within_0_and_1() -> None:
    ends = uniform(torch.tensor([0, 2**32 - 1]))
    assert 0 < ends[0] < 1e-6 and 1 - 1e-6 < ends[1] < 1
    assert (-(-ends.log()).log()).isfinite().all()


def test_gaussian_numbers_are_normal_and_fresh_at_each_position(model: LlamaForCausalLM) -> None:
    cache = CompressedCache("vase_dkv", 20)
    model(distinct_tokens(1, 30), past_key_values=cache)
    store = cache.layers[0].store
    view = store.view(store.held())
    rows = [
        gauss(view._replace(next_position=torch.tensor([position])), 0, count=20_000)[0].double()
        for position in (30, 31)
    ]
    for row in rows:
        assert row.mean().abs() < 0.03
        assert abs(row.std() - 1) < 0.03
        assert abs((row.abs() < 1.0).double().mean() - 0.6827) < 0.015
    assert abs(torch.corrcoef(torch.stack(rows))[0, 1]) < 0.03
