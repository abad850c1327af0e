"""What is left of a call that failed, or was refused."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache
from compressed_cache import layer as its_layer
from compressed_cache.versions import cache_argument
from tests.conftest import VOCABULARY, distinct_tokens
from tests.families import FAMILIES


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_cache_is_not_used_after_a_call_that_failed_half_way(
    make_model: Callable[..., LlamaForCausalLM], tokens: int
) -> None:
    model, ids = make_model(num_hidden_layers=3), distinct_tokens(1, 20)
    cache = CompressedCache("h2o", 16)
    for begins in (False, True):
        if not begins:
            model(ids, past_key_values=cache)
        handle = model.model.layers[2].register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(ids if begins else ids[:, :tokens], past_key_values=cache)
        handle.remove()
        with pytest.raises(ValueError, match="that some may have read and others not"):
            cache.snapshot()
        with pytest.raises(ValueError) as caught:
            model(ids[:, :tokens], past_key_values=cache)
        assert str(caught.value) == (
            "all layers must hold the same text, but a call failed before layer 2 had read it. "
            "Call cache.reset() or use a new CompressedCache."
        )
        cache.reset()
    assert model(ids, past_key_values=cache).logits.isfinite().all()
    # After the last attention it was read by all, as the next call shows.
    handle = model.lm_head.register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(ids[:, :tokens], past_key_values=cache)
    handle.remove()
    model(ids[:, :1], past_key_values=cache)
    other = CompressedCache("h2o", 16)
    other.restore(cache.snapshot())
    assert other.get_seq_length() == 20 + tokens + 1


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("tokens", [1, 6])
def test_a_cache_is_not_used_after_a_call_that_failed_within_a_layer(
    make_model: Callable[..., LlamaForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    layer: int,
) -> None:
    model, ids = make_model(num_hidden_layers=3), distinct_tokens(1, 20)
    cache = CompressedCache("h2o", 16)
    model(ids, past_key_values=cache)
    name = "decode_step" if tokens == 1 else "read_call"
    read, calls = getattr(its_layer, name), iter(range(3))

    def fail(*arguments: Any, **named: Any) -> Any:
        if next(calls) == layer:
            _fail()
        return read(*arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(its_layer, name, fail)
        model(ids[:, :tokens], past_key_values=cache)
    with pytest.raises(ValueError, match="all layers must hold the same text, but a call failed"):
        model(ids[:, :tokens], past_key_values=cache)


_LINEAR_FIRST = ["linear_attention", "full_attention"]


def _hybrid(kinds: list[str]) -> Any:
    family = next(family for family in FAMILIES if family.name == "Qwen3-Next")
    settings = {**family.settings, "layer_types": kinds, "num_hidden_layers": len(kinds)}
    return replace(family, settings=settings | {"vocab_size": VOCABULARY}).make()


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("kinds", [_LINEAR_FIRST, _LINEAR_FIRST[::-1]])
def test_a_state_is_not_used_after_a_call_that_failed_half_way(
    kinds: list[str], tokens: int
) -> None:
    model, ids = _hybrid(kinds), distinct_tokens(1, 20)
    text = torch.cat([ids, ids[:, :tokens]], dim=1)
    cache = CompressedCache("h2o", 40)
    model(ids, past_key_values=cache)
    snapshot = cache.snapshot()
    handle = model.model.layers[1].register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(ids[:, :tokens], past_key_values=cache)
    handle.remove()
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            model.generate(text, **cache_argument(cache), max_new_tokens=2)
        assert str(caught.value) == (
            "all layers must hold the same text, but a call failed that some may have read and "
            "others not. Call cache.reset() or use a new CompressedCache."
        )
    expected = model(text).logits[:, -1]
    cache.restore(snapshot)
    logits = model(ids[:, :tokens], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(logits, expected)
    cache.reset()
    torch.testing.assert_close(model(text, past_key_values=cache).logits[:, -1], expected)


@pytest.mark.parametrize("kinds", [_LINEAR_FIRST, _LINEAR_FIRST * 2])
def test_no_state_is_left_of_a_prompt_that_was_refused(kinds: list[str]) -> None:
    model, ids = _hybrid(kinds), distinct_tokens(1, 30)
    cache = CompressedCache("h2o", 24, protect_prompt=True, recent=2)
    with pytest.raises(ValueError, match="budget must be at least prompt"):
        model(ids, past_key_values=cache)
    handle = model.model.layers[0].register_forward_hook(_fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(ids, past_key_values=cache)
    handle.remove()
    logits = [
        model(ids[:, :15], past_key_values=one).logits for one in (cache, CompressedCache("h2o"))
    ]
    torch.testing.assert_close(*logits)


def test_a_state_with_gradients_can_be_copied() -> None:
    model, ids = _hybrid(_LINEAR_FIRST), distinct_tokens(1, 20)
    cache = CompressedCache("h2o", 40)
    model(ids, past_key_values=cache)
    restored = CompressedCache("h2o", 40)
    restored.restore(cache.snapshot())
    copies = [restored, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache]
    first, *others = [model(ids[:, :1], past_key_values=one).logits for one in copies]
    for logits in others:
        torch.testing.assert_close(logits, first, rtol=0, atol=0)


def test_a_state_of_inference_mode_is_one_of_any_mode() -> None:
    model, ids = _hybrid(_LINEAR_FIRST), distinct_tokens(1, 21)
    expected = model(ids).logits[:, -1]
    cache = CompressedCache("h2o", 40)
    with torch.inference_mode():
        model(ids[:, :20], past_key_values=cache)
    for _ in range(2):
        logits = model(ids[:, 20:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(logits, expected)
        cache.reset()
        with torch.no_grad():
            model(ids[:, :20], past_key_values=cache)


def test_a_state_is_of_the_batch_and_the_dtype_of_its_text() -> None:
    model, ids = _hybrid(_LINEAR_FIRST), distinct_tokens(2, 20)
    cache = CompressedCache("h2o", 40)
    model.bfloat16()(ids[:1], past_key_values=cache)
    for tokens in (1, 5):
        with pytest.raises(ValueError, match="batch size must stay 1 until the cache is reset"):
            model(ids[:, :tokens], past_key_values=cache)
    # A call that was refused before any layer has read it does no harm.
    model(ids[:1, :3], past_key_values=cache)
    model.float()
    for rows in (2, 1):
        cache.reset()
        fresh = CompressedCache("h2o", 40)
        for part in (ids[:rows], ids[:rows, :1]):
            logits = [model(part, past_key_values=one).logits for one in (cache, fresh)]
            torch.testing.assert_close(*logits, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("policy", ["h2o", "snapkv", "full"])
def test_nothing_of_a_refused_call_is_counted(
    make_model: Callable[..., LlamaForCausalLM], policy: str, tokens: int
) -> None:
    model, twin, ids = make_model(), make_model(), distinct_tokens(2, 40)
    one, other = (CompressedCache(policy, 24) for _ in range(2))
    for cache in (one, other):
        model(ids[:, :30], past_key_values=cache)
        model(ids[:, 30:31], past_key_values=cache)
    with pytest.raises(ValueError, match="got another"):
        twin(ids[:, 31 : 31 + tokens], past_key_values=one)
    assert one.get_seq_length() == 31
    texts = [
        model.generate(ids, **cache_argument(cache), max_new_tokens=8) for cache in (one, other)
    ]
    assert torch.equal(*texts)
    assert one.get_seq_length() == other.get_seq_length()


def test_a_chunk_of_a_protected_prompt_that_is_refused_is_not_counted(
    model: LlamaForCausalLM,
) -> None:
    cache, ids = CompressedCache("h2o", 24, protect_prompt=True, recent=2), distinct_tokens(1, 40)
    model(ids[:, :12], past_key_values=cache)
    with pytest.raises(ValueError, match="budget must be at least prompt"):
        model(ids[:, 12:], past_key_values=cache)
    assert cache.get_seq_length() == 12
    model(ids[:, 12:20], past_key_values=cache)
    whole = CompressedCache("h2o", 24, protect_prompt=True, recent=2)
    model(ids[:, :20], past_key_values=whole)
    step = [model(ids[:, 20:21], past_key_values=one).logits for one in (cache, whole)]
    torch.testing.assert_close(*step)


def _fail(*_: object) -> None:
    raise RuntimeError("out of memory")
