"""A cache that evicts nothing and reads no more than it holds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from compressed_cache import CompressedCache
from compressed_cache.versions import cache_argument
from tests.compiling import CountingBackend, compiled
from tests.conftest import distinct_tokens

PROMPT = 20


@pytest.fixture(scope="module")
def model(make_model: Callable[..., LlamaForCausalLM]) -> Any:
    return make_model()


def _read(model: Any, cache: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **cache_argument(cache), **inputs).logits


def _break_what_is_unused(cache: CompressedCache, held: int) -> None:
    for store in cache.stores():
        for memory in (store.tokens.keys, store.tokens.values):
            memory[:, :, held:] = torch.nan


def test_an_eager_step_reads_what_is_in_use(model: Any) -> None:
    ids = distinct_tokens(2, PROMPT + 1)
    cache, expected = CompressedCache("full"), DynamicCache()
    for text in (ids[:, :PROMPT], ids[:, PROMPT:]):
        logits, whole = _read(model, cache, text), _read(model, expected, text)
        torch.testing.assert_close(logits, whole)
        _break_what_is_unused(cache, PROMPT)


def test_a_step_with_a_mask_of_its_own_after_a_longer_text_came_back(model: Any) -> None:
    ids = distinct_tokens(1, PROMPT + 3)
    cache = CompressedCache("full")
    _read(model, cache, ids[:, :-1])
    snapshot = cache.snapshot()
    cache.reset()
    _read(model, cache, ids[:, :4])
    _read(model, cache, ids[:, 4:5])
    cache.restore(snapshot)
    mask = torch.ones(1, 1, 1, ids.shape[1], dtype=torch.bool)
    got = _read(model, cache, ids[:, -1:], attention_mask=mask)
    torch.testing.assert_close(got[:, -1], model(ids, use_cache=False).logits[:, -1])


def test_eager_steps_after_compiled_ones(model: Any) -> None:
    ids = distinct_tokens(1, PROMPT)
    backend = CountingBackend()
    caches = CompressedCache("full"), DynamicCache()
    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)
    text = model.generate(
        ids, **cache_argument(caches[0]), compile_config=compiled(backend), **options
    )
    assert torch.equal(text, model.generate(ids, **cache_argument(caches[1]), **options))
    assert backend.graphs
    again = [model.generate(text, **cache_argument(cache), **options) for cache in caches]
    assert torch.equal(*again)


@pytest.mark.parametrize("policy", ["full", "shadowkv"])
@pytest.mark.parametrize("length", [40, 254])
def test_drafts_in_the_call_of_the_prompt(model: Any, policy: str, length: int) -> None:
    """An assistant that is right, whose first drafts come with the prompt."""
    cache, ids = CompressedCache(policy, 400), distinct_tokens(1, length)
    options: dict[str, Any] = dict(max_new_tokens=12, do_sample=False)
    expected = model.generate(ids, **options)
    for _ in range(2):
        got = model.generate(ids, **cache_argument(cache), assistant_model=model, **options)
        assert torch.equal(got, expected)
        cache.reset()
