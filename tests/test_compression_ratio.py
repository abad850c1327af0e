"""A budget that is a share of the prompt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache, compress
from compressed_cache.reasoner.tokenizer import build_tokenizer
from compressed_cache.versions import cache_argument
from tests.conftest import distinct_tokens

PROMPT = 40
OPTIONS: dict[str, Any] = dict(recent=4, protect_prompt=False)
SETTINGS = [("snapkv", dict(window=4)), ("h2o", {}), ("pyramidkv", dict(window=4)), ("rkv", {})]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., LlamaForCausalLM]) -> Any:
    return make_model()


def _pair(policy: str, ratio: float, **options: Any) -> list[CompressedCache]:
    return [
        CompressedCache(policy, compression_ratio=ratio, **options),
        CompressedCache(policy, int(PROMPT * (1 - ratio)), **options),
    ]


def _generate(model: Any, cache: CompressedCache, ids: torch.Tensor, **more: Any) -> list[Any]:
    options = {"max_new_tokens": 12, "do_sample": False, **cache_argument(cache), **more}
    return model.generate(ids, **options).tolist()


@pytest.mark.parametrize(("policy", "options"), SETTINGS)
@pytest.mark.parametrize("chunk", [None, 16])
def test_it_is_the_budget_that_the_prompt_makes_of_it(
    model: Any, policy: str, options: dict[str, Any], chunk: int | None
) -> None:
    ids = distinct_tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    own, expected = _pair(policy, 0.6, **OPTIONS, **options)
    more = dict(attention_mask=mask, prefill_chunk_size=chunk)
    assert _generate(model, own, ids, **more) == _generate(model, expected, ids, **more)
    assert own.eviction == expected.eviction
    for layer, other in zip(own.layers, expected.layers, strict=True):
        assert torch.equal(layer.positions, other.positions)


def test_each_text_has_its_own(model: Any) -> None:
    cache = CompressedCache("h2o", compression_ratio=0.5)
    assert repr(cache) == "CompressedCache(policy='h2o', compression_ratio=0.5, tokens_seen=0)"
    for length in (40, 24, 31):
        cache.reset()
        fresh = CompressedCache("h2o", length // 2)
        ids = distinct_tokens(1, length, seed=length)
        assert _generate(model, cache, ids) == _generate(model, fresh, ids)
        assert cache.eviction == fresh.eviction
        assert cache.layers[0].keys.shape[2] == length // 2
    assert "budget=15" in repr(cache)


def test_a_further_prompt_leaves_the_budget_alone(model: Any) -> None:
    cache = CompressedCache("h2o", compression_ratio=0.5)
    text = torch.tensor(_generate(model, cache, distinct_tokens(1, PROMPT)))
    _generate(model, cache, torch.cat([text, distinct_tokens(1, 30, seed=2)], dim=1))
    assert cache.eviction.budget == PROMPT // 2


def test_a_model_compiled_by_hand(model: Any) -> None:
    ids = distinct_tokens(1, PROMPT)
    own, expected = _pair("h2o", 0.5)
    torch._dynamo.reset()
    forward = torch.compile(model, backend="eager")
    with torch.no_grad():
        logits = [forward(ids, **cache_argument(cache)).logits for cache in (own, expected)]
    torch._dynamo.reset()
    assert own.eviction == expected.eviction
    assert torch.equal(*logits)


def test_snapshots_and_files_bring_their_budget(model: Any, tmp_path: Path) -> None:
    cache = CompressedCache("h2o", compression_ratio=0.5)
    text = torch.tensor(_generate(model, cache, distinct_tokens(1, PROMPT)))
    snapshot = cache.snapshot()
    cache.save(tmp_path / "cache.safetensors")
    expected = _generate(model, cache, text)
    cache.reset()
    _generate(model, cache, distinct_tokens(1, 90))
    cache.restore(snapshot)
    assert _generate(model, cache, text) == expected
    fresh = CompressedCache("h2o", compression_ratio=0.5)
    fresh.restore(snapshot)
    assert _generate(model, fresh, text) == expected
    loaded = CompressedCache.load(tmp_path / "cache.safetensors")
    assert _generate(model, loaded, text) == expected
    with pytest.raises(ValueError, match="snapshot must be of a cache like this one"):
        CompressedCache("snapkv", compression_ratio=0.5).restore(snapshot)


@pytest.mark.parametrize("chunk", [None, 16])
def test_a_context_that_is_read_twice(model: Any, chunk: int | None) -> None:
    ids = distinct_tokens(1, PROMPT)
    for cache in _pair("kvzip", 0.5):
        compress(model, ids, cache, tokenizer=build_tokenizer(), prefill_chunk_size=chunk)
        assert cache.eviction == CompressedCache("kvzip", PROMPT // 2).eviction
        assert cache.layers[0].keys.shape[2] == PROMPT // 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(compression_ratio=1), ValueError, "must be from 0 to below 1, got 1"),
        (dict(compression_ratio=-0.1), ValueError, "must be from 0 to below 1, got -0.1"),
        (dict(compression_ratio="half"), TypeError, r"must be a float, got 'half' \(str\)"),
        (dict(compression_ratio=True), TypeError, r"must be a float, got True \(bool\)"),
        (dict(compression_ratio=0.5, budget=4), ValueError, "and budget must not both be given"),
        (dict(compression_ratio=0.5, recent=-1), ValueError, "recent must be an int >= 0"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CompressedCache("h2o", **arguments)


def test_a_prompt_that_leaves_no_room_changes_nothing(model: Any) -> None:
    cache = CompressedCache("h2o", compression_ratio=0.9, recent=8)
    with pytest.raises(ValueError, match=r"ratio=0\.9 of a prompt of 40 tokens: budget must be at"):
        _generate(model, cache, distinct_tokens(1, PROMPT))
    assert cache.get_seq_length() == 0
    _generate(model, cache, distinct_tokens(1, 200))
    assert cache.eviction.budget == int(200 * (1 - 0.9))


def test_shadowkv_is_told_what_to_do() -> None:
    with pytest.raises(ValueError, match="must be given as budget with 'shadowkv'"):
        CompressedCache("shadowkv", compression_ratio=0.5)


def test_a_snapshot_of_other_arguments_is_refused(model: Any) -> None:
    for other in (dict(compression_ratio=0.5, sinks=4), dict(budget=20, sinks=4)):
        cache = CompressedCache("h2o", **other)
        _generate(model, cache, distinct_tokens(1, PROMPT))
        with pytest.raises(ValueError, match="snapshot must be of a cache like this one"):
            CompressedCache("h2o", compression_ratio=0.5).restore(cache.snapshot())


def test_an_empty_cache_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold a prompt to be saved"):
        CompressedCache("h2o", compression_ratio=0.5).save(tmp_path / "cache.safetensors")
