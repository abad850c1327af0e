"""Gradients of a call are those of the dynamic cache, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from compressed_cache import CompressedCache
from compressed_cache.versions import cache_argument
from tests.compiling import CountingBackend
from tests.conftest import VOCABULARY, distinct_tokens
from tests.test_masks import LAYOUTS

PROMPT, ANSWER = distinct_tokens(2, 20), distinct_tokens(2, 8, seed=9)


@pytest.fixture
def model(make_model: Callable[..., LlamaForCausalLM]) -> Any:
    return make_model().double()


def _loss(model: Any, cache: Any, tokens: Tensor) -> Tensor:
    logits = model(tokens, **cache_argument(cache)).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def _gradients(model: Any, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.model.layers.parameters()]


def _cache(policy: str) -> CompressedCache:
    return CompressedCache(policy, **LAYOUTS[policy])


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("policy", LAYOUTS)
def test_gradients_after_a_prompt_are_those_of_the_dynamic_cache(
    model: Any, policy: str, tokens: int
) -> None:
    losses = []
    for cache in (DynamicCache(), _cache(policy)):
        with torch.no_grad():
            model(PROMPT, **cache_argument(cache))
        losses.append(_loss(model, cache, ANSWER[:, :tokens]))
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-9)
    expected, got = (_gradients(model, loss) for loss in losses)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("policy", LAYOUTS)
def test_gradients_of_what_is_read_in_two_calls_are_refused(model: Any, policy: str) -> None:
    for calls in ((1, 1), (3, 3), (3, 1)):
        cache = _cache(policy)
        with torch.no_grad():
            model(PROMPT, **cache_argument(cache))
        losses, start = [], 0
        for tokens in calls:
            losses.append(_loss(model, cache, ANSWER[:, start : start + tokens]))
            start += tokens
        with pytest.raises(RuntimeError, match="holds what it has read as constants"):
            sum(losses).backward()


def test_the_prompt_is_a_constant_only_where_it_is_read_as_one(model: Any) -> None:
    cache = _cache("h2o")
    model(PROMPT, **cache_argument(cache))
    with pytest.raises(RuntimeError, match="holds what it has read as constants"):
        _loss(model, cache, ANSWER).backward()


@pytest.mark.parametrize("calls", [(8,), (1, 1)])
def test_a_prompt_that_alone_is_trained_is_no_constant(model: Any, calls: tuple[int, ...]) -> None:
    """A soft prompt before a frozen model: no later token has a gradient of its own."""
    model.requires_grad_(False)
    for policy in ("h2o", "full"):
        cache = _cache(policy)
        prompt = model.get_input_embeddings()(PROMPT).requires_grad_()
        loss = model(inputs_embeds=prompt, **cache_argument(cache)).logits.square().mean()
        for tokens in ANSWER[:, : sum(calls)].split(calls, dim=1):
            loss = loss + _loss(model, cache, tokens)
        with pytest.raises(RuntimeError, match="holds what it has read as constants"):
            loss.backward()


@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("policy", ["h2o", "full"])
def test_a_call_that_is_made_again_in_the_backward_pass_is_refused(
    model: Any, policy: str, is_reentrant: bool
) -> None:
    cache = _cache(policy)
    with torch.no_grad():
        model(PROMPT, **cache_argument(cache))

    def call(scale: Tensor) -> Tensor:
        return scale * _loss(model, cache, ANSWER)

    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss: Any = checkpoint(call, scale, use_reentrant=is_reentrant)
    with pytest.raises(ValueError, match="must not be checkpointed"):
        loss.backward()
    assert cache.get_seq_length() == 28


def test_nothing_is_refused_that_nobody_asks_for(model: Any) -> None:
    """A loop that forgot ``torch.no_grad`` generates, and leaves no graph behind."""
    cache, other = _cache("h2o"), _cache("h2o")
    tokens = model(PROMPT, **cache_argument(cache)).logits[:, -1:].argmax(dim=-1)
    expected = model.generate(PROMPT, **cache_argument(other), max_new_tokens=6, do_sample=False)
    found = [tokens]
    for _ in range(5):
        found.append(model(found[-1], **cache_argument(cache)).logits.argmax(dim=-1))
    assert torch.equal(torch.cat(found, dim=1), expected[:, 20:])
    assert not any(tensor.requires_grad for layer in cache.layers for tensor in layer.tensors())


def test_a_reset_cache_has_no_past(model: Any) -> None:
    cache = _cache("h2o")
    for _ in range(2):
        loss = _loss(model, cache, ANSWER)
        loss.backward()
        cache.reset()
    # Nor has its memory, where a prompt is a constant.
    for _ in range(2):
        with torch.no_grad():
            model(PROMPT, **cache_argument(cache))
        _loss(model, cache, ANSWER).backward()
        cache.reset()


@pytest.mark.slow
def test_compiled_steps_refuse_too(model: Any) -> None:
    torch._dynamo.reset()
    cache = _cache("h2o")
    with torch.no_grad():
        model(PROMPT, **cache_argument(cache))
    forward = torch.compile(model, backend=CountingBackend())
    first, second = (_loss(forward, cache, ANSWER[:, token : token + 1]) for token in range(2))
    with pytest.raises(RuntimeError, match="holds what it has read as constants"):
        (first + second).backward()
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_cache_is_not_left_out_under_gradient_checkpointing(model: Any) -> None:
    """Which transformers does, so that a call would see nothing of what is held."""
    cache = _cache("h2o")
    with torch.no_grad():
        model(PROMPT, **cache_argument(cache))
    model.train().gradient_checkpointing_enable()
    for given in (cache, _cache("h2o")):
        with pytest.raises(ValueError, match="left out the cache it was given"):
            _loss(model, given, ANSWER)
    # What it held is as it was.
    with torch.no_grad():
        model(ANSWER, **cache_argument(cache))
    assert cache.get_seq_length() == PROMPT.shape[1] + ANSWER.shape[1]


@pytest.mark.parametrize("tokens", [1, 8])
def test_dropout_is_of_a_first_prompt_only(
    make_model: Callable[..., LlamaForCausalLM], tokens: int
) -> None:
    model: Any = make_model(attention_dropout=0.5).train()
    cache = _cache("h2o")
    torch.manual_seed(0)
    got = model(PROMPT, **cache_argument(cache)).logits
    torch.manual_seed(0)
    assert torch.equal(got, model(PROMPT, **cache_argument(DynamicCache())).logits)
    with pytest.raises(ValueError, match="attention_dropout must be 0 after the prompt"):
        model(ANSWER[:, :tokens], **cache_argument(cache))
    model.eval()
    model(ANSWER[:, :tokens], **cache_argument(cache))
    assert cache.get_seq_length() == PROMPT.shape[1] + tokens


@pytest.mark.parametrize("tokens", [1, 8])
def test_dropout_is_known_whatever_a_model_calls_it(tokens: int) -> None:
    sizes = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model: Any = GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.25)).train()
    cache = _cache("h2o")
    model(PROMPT, **cache_argument(cache))
    with pytest.raises(ValueError, match=r"must be 0 after the prompt, .* got 0\.25"):
        model(ANSWER[:, :tokens], **cache_argument(cache))
