"""Attention of a prompt in one pass with what a policy adds up of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from compressed_cache import CompressedCache
from compressed_cache.ops import attention_sums as sums
from compressed_cache.ops.attention import LogitTransform
from compressed_cache.stores import prompt_attention
from compressed_cache.versions import cache_argument
from tests.conftest import distinct_tokens

LENGTH = 40


@contextmanager
def _passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each layer that reads a first prompt, whether one pass did both."""
    found: list[bool] = []

    def attend(*args: Any) -> Any:
        result = original(*args)
        found.append(result is not None)
        return result

    original = prompt_attention.attend
    with monkeypatch.context() as patch:
        patch.setattr(prompt_attention, "attend", attend)
        yield found


def _padded() -> dict[str, Tensor]:
    ids = distinct_tokens(3, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :17] = mask[1, :4] = 0
    return dict(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_sums_are_those_of_the_weights(
    monkeypatch: pytest.MonkeyPatch, groups: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(sums, "_BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(sums, "_FEWEST_ROWS", 1)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, LENGTH, heads, dim, generator=generator, dtype=torch.float64).transpose(1, 2)
        for heads, dim in ((2 * groups, 8), (2, 8), (2, 6))
    )
    real = torch.arange(LENGTH) >= torch.tensor([[0], [9], [LENGTH]])
    sinks = torch.randn(2 * groups, generator=generator, dtype=torch.float64)
    for transform in (LogitTransform(0.7), LogitTransform(0.7, 2.0, sinks)):
        both = sums.attend_and_sum(
            query.to(dtype), key.to(dtype), value.to(dtype), real, transform=transform
        )
        assert both is not None and both[0].dtype == dtype
        output, total = torch.zeros(3, LENGTH, 2 * groups, 6), torch.zeros(3, 2, LENGTH)
        for row in range(3):
            for head in range(2 * groups):
                for token in range(LENGTH):
                    seen = real[row] & (torch.arange(LENGTH) <= token)
                    if not real[row, token]:
                        continue
                    logits = key[row, head // groups] @ query[row, head, token] * 0.7
                    if transform.softcap is not None:
                        logits = 2.0 * (logits / 2.0).tanh()
                    powers = logits.exp() * seen
                    sink = 0.0 if transform.sinks is None else sinks[head].exp()
                    weights = powers / (powers.sum() + sink)
                    output[row, token, head] = weights @ value[row, head // groups]
                    total[row, head // groups] += weights / groups
        torch.testing.assert_close(both[0].float(), output)
        torch.testing.assert_close(both[1], total)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", ["h2o", "h2o+caote", "observed_attention", "tova", "snapkv"])
def test_logits_of_a_prompt_are_those_of_the_full_cache(
    make_model: Callable[..., LlamaForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    attention: str,
) -> None:
    model: Any = make_model(attn_implementation=attention).double()
    # Of padding transformers' eager attention makes what is no number.
    inputs = _padded() if attention == "sdpa" else dict(input_ids=distinct_tokens(3, LENGTH))
    cache = CompressedCache(policy, 16, recent=4)
    with torch.no_grad(), _passes(monkeypatch) as passes:
        got = model(**inputs, **cache_argument(cache)).logits
        full = model(**inputs, **cache_argument(DynamicCache())).logits
    real = inputs.get("attention_mask", torch.ones(3, LENGTH)).bool()
    torch.testing.assert_close(got[real], full[real], rtol=0, atol=1e-12)
    adds = policy in ("h2o", "h2o+caote", "observed_attention")
    assert passes == ([adds] * len(cache.layers) if attention == "sdpa" else [])


def _with_dropout(model: Any, inputs: dict[str, Any]) -> None:
    model.train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5


def _in_bfloat16(model: Any, inputs: dict[str, Any]) -> None:
    model.bfloat16()


def _with_a_mask_of_its_own(model: Any, inputs: dict[str, Any]) -> None:
    own = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    own[..., 20:, 10:15] = False
    inputs["attention_mask"] = own


def _with_a_logit_that_is_no_number(model: Any, inputs: dict[str, Any]) -> None:
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    inputs["inputs_embeds"][0, -1] = torch.nan


def test_under_autocast_the_model_attends(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model: Any = make_model()
    inputs, logits = dict(input_ids=distinct_tokens(2, LENGTH)), []
    for cache in (CompressedCache("h2o", 16), DynamicCache()):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits.append(model(**inputs, **cache_argument(cache)).logits)
    assert torch.equal(*logits)


def _in_both_directions(model: Any, inputs: dict[str, Any]) -> None:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


@pytest.mark.parametrize(
    "change",
    [
        _with_dropout,
        _in_bfloat16,
        _with_a_mask_of_its_own,
        _with_a_logit_that_is_no_number,
        _in_both_directions,
    ],
)
def test_where_one_pass_would_say_something_else_the_model_attends(
    make_model: Callable[..., LlamaForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any, dict[str, Any]], None],
) -> None:
    model: Any = make_model()
    inputs: dict[str, Any] = dict(input_ids=distinct_tokens(2, LENGTH))
    change(model, inputs)
    logits = []
    for cache in (CompressedCache("h2o", 16), DynamicCache()):
        torch.manual_seed(0)
        with torch.no_grad(), _passes(monkeypatch) as passes:
            logits.append(model(**inputs, **cache_argument(cache)).logits)
        assert not any(passes)
    assert torch.equal(logits[0].nan_to_num(), logits[1].nan_to_num())


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "tova"])
def test_a_prompt_that_sees_all_of_itself_is_ranked_by_what_it_sees(
    make_model: Callable[..., LlamaForCausalLM], policy: str
) -> None:
    model: Any = make_model()
    _in_both_directions(model, {})
    inputs, caches, logits = distinct_tokens(2, LENGTH), [], []
    for mask in (None, torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)):
        caches.append(CompressedCache(policy, 16, recent=4))
        with torch.no_grad():
            found = model(inputs, attention_mask=mask, **cache_argument(caches[-1]))
        logits.append(found.logits)
    torch.testing.assert_close(*logits)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(one.positions.sort().values, other.positions.sort().values)


def test_gradients_of_a_prompt_are_those_of_the_model(
    make_model: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = make_model()
    with torch.enable_grad(), _passes(monkeypatch) as passes:
        logits = model(distinct_tokens(1, LENGTH), **cache_argument(CompressedCache("h2o", 16)))
        logits.logits.sum().backward()
    assert passes == []
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
