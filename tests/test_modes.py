"""Everything `generate` can do besides greedy decoding."""

import copy
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from compressed_cache import CompressedCache
from tests.conftest import distinct_tokens, held
from tests.grids import alternating, pairwise, slow_but
from tests.kinds import KINDS, QUICK

NEW = 24
MODES: dict[str, dict[str, Any]] = {
    "sampling": dict(do_sample=True, temperature=0.7, top_k=20, top_p=0.9),
    "several sequences": dict(do_sample=True, num_return_sequences=3),
    "beams": dict(num_beams=4),
    "sampled beams": dict(num_beams=3, do_sample=True),
    "several beams": dict(num_beams=4, num_return_sequences=2, length_penalty=0.5),
    "repetition penalty": dict(repetition_penalty=1.3, no_repeat_ngram_size=3),
}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., LlamaForCausalLM]) -> Any:
    return make_model().double()


def _generate(model: Any, cache: Any, ids: torch.Tensor | None = None, **options: Any) -> Any:
    ids = distinct_tokens(2, 30) if ids is None else ids
    torch.manual_seed(3)
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(ids, past_key_values=cache, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", slow_but(("h2o",), ("full", "h2o", "snapkv")))
def test_modes_give_the_tokens_of_the_dynamic_cache(model: Any, policy: str, mode: str) -> None:
    options = {**MODES[mode], "return_dict_in_generate": True, "output_scores": True}
    expected = _generate(model, DynamicCache(), **options)
    got = _generate(model, CompressedCache(policy, 30 + NEW), **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.scores) == len(expected.scores) == NEW
    for ours, theirs in zip(got.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("policy", "interval"), slow_but(QUICK, alternating(KINDS, [1, 4])))
def test_each_beam_has_the_cache_of_its_own_text(model: Any, policy: str, interval: int) -> None:
    """The score of a beam is that of its text read alone, evictions included."""
    ids = distinct_tokens(1, 30)
    options = dict(budget=16, interval=interval, recent=8, protect_prompt=False)
    beams = _generate(
        model,
        CompressedCache(policy, **options),
        ids,
        num_beams=4,
        num_return_sequences=4,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for text, score in zip(beams.sequences, beams.sequences_scores, strict=True):
        cache = CompressedCache(policy, **options)
        with torch.no_grad():
            logits = [model(ids, past_key_values=cache).logits[0, -1]]
            for token in text[30:-1]:
                logits.append(model(token.view(1, 1), past_key_values=cache).logits[0, -1])
        chosen = torch.stack(logits).log_softmax(-1).gather(1, text[30:, None])
        torch.testing.assert_close(chosen.sum(), score, rtol=1e-5, atol=1e-5, check_dtype=False)


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


class AfterSeven(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 37)


def test_streaming_and_stopping(model: Any) -> None:
    ids, streamer = distinct_tokens(1, 30), Collected()
    cache = CompressedCache("h2o", 16)
    criteria = StoppingCriteriaList([AfterSeven()])
    got = _generate(model, cache, ids, streamer=streamer, stopping_criteria=criteria)
    expected = _generate(model, CompressedCache("h2o", 16), ids)
    assert torch.equal(got, expected[:, :37])
    assert streamer.tokens == [*got[0].tolist(), -1]


def test_attentions_and_hidden_states_are_returned(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    model = make_model(attn_implementation="eager")
    got = _generate(
        model,
        CompressedCache("h2o", 16),
        return_dict_in_generate=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    step = got.attentions[-1]
    assert step[0].shape == (2, 4, 1, 16)
    torch.testing.assert_close(step[0].sum(-1), torch.ones(2, 4, 1))
    assert len(got.hidden_states[-1]) == 3


# Drafts. Kept positions are compared too, for the state to be that of decoding token by token.


@pytest.fixture(scope="module")
def drafter(model: Any) -> Any:
    """Right about most tokens and wrong about some."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for number, weight in enumerate(other.parameters()):
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight.add_(0.01 * noise)
    return _eager_to_draft(other)


def _eager_to_draft(model: Any) -> Any:
    # By default a model that is not sure of itself drafts next to nothing.
    model.generation_config.assistant_confidence_threshold = 0.0
    model.generation_config.num_assistant_tokens = 5
    return model


@pytest.mark.parametrize(
    ("policy", "budget", "interval"),
    slow_but(["h2o", "snapkv", "gkv"], pairwise(KINDS, [16, 40], [1, 4])),
)
def test_drafts_change_nothing(
    model: Any, drafter: Any, policy: str, budget: int, interval: int
) -> None:
    ids = distinct_tokens(1, 30)
    rules = dict(budget=budget, interval=interval, recent=8, sinks=1, protect_prompt=False)
    plain = CompressedCache(policy, **rules)
    expected = _generate(model, plain, ids)
    for helper in (
        dict(assistant_model=drafter),
        dict(assistant_model=_eager_to_draft(copy.deepcopy(model))),
        dict(prompt_lookup_num_tokens=4),
    ):
        cache = CompressedCache(policy, **rules)
        assert torch.equal(_generate(model, cache, ids, **helper), expected)
        assert cache.get_seq_length() == plain.get_seq_length()
        for layer in range(2):
            assert held(cache, layer) == held(plain, layer)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("policy", slow_but(("h2o", "gkv"), KINDS))
def test_drafts_change_nothing_of_a_later_turn(
    model: Any, drafter: Any, policy: str, new: int
) -> None:
    ids, results = distinct_tokens(1, 33)[:, : 30 + new], []
    for helper in ({}, dict(assistant_model=drafter), dict(prompt_lookup_num_tokens=4)):
        cache = CompressedCache(policy, 16, interval=3, recent=8, protect_prompt=False)
        with torch.no_grad():
            model(ids[:, :30], past_key_values=cache)
        text = _generate(model, cache, ids, **helper)
        positions = [held(cache, layer) for layer in range(2)]
        results.append((text.tolist(), cache.get_seq_length(), positions))
    assert results[0] == results[1] == results[2]


def test_drafts_are_of_a_whole_text(model: Any) -> None:
    cache, ids = CompressedCache("h2o", 16), distinct_tokens(1, 50)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
    mask = torch.ones_like(ids)
    with pytest.raises(ValueError, match=r"needs the whole text, the 20 tokens .* got 30 tokens"):
        _generate(model, cache, ids[:, 20:], attention_mask=mask, prompt_lookup_num_tokens=4)


@pytest.mark.parametrize("calls", [1, 3])
def test_drafting_that_is_broken_off_leaves_no_draft(model: Any, calls: int) -> None:
    ids, twin, numbers = distinct_tokens(1, 30), _eager_to_draft(copy.deepcopy(model)), count(1)
    expected = _generate(model, CompressedCache("h2o", 16), ids)
    cache = CompressedCache("h2o", 16)

    def break_off(*_: Any) -> None:
        if next(numbers) == calls:
            raise KeyboardInterrupt

    handle = model.register_forward_hook(break_off)
    with pytest.raises(KeyboardInterrupt):
        _generate(model, cache, ids, assistant_model=twin)
    handle.remove()
    seen = cache.get_seq_length()
    assert (seen > 30) == (calls > 1)
    text = expected[:, : seen + 1] if seen else ids
    more = NEW + 30 - text.shape[1]
    assert torch.equal(_generate(model, cache, text, max_new_tokens=more), expected)


def test_new_tokens_alone_may_follow_drafts(model: Any) -> None:
    texts = []
    for alone in (False, True):
        cache = CompressedCache("h2o", 16)
        text = _generate(model, cache, distinct_tokens(1, 30), prompt_lookup_num_tokens=4)
        text = torch.cat([text, distinct_tokens(1, 5)], dim=1)
        mask, seen = torch.ones_like(text), cache.get_seq_length() if alone else 0
        text = _generate(model, cache, text[:, seen:], attention_mask=mask)
        texts.append((text[:, -NEW:].tolist(), cache.get_seq_length()))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("policy", slow_but(QUICK, KINDS))
def test_drafts_that_are_all_wrong_change_nothing(
    make_model: Callable[..., LlamaForCausalLM], policy: str
) -> None:
    # With few words, most drafts are found and few of them are right.
    model = make_model(vocab_size=16, attn_implementation="eager").double()
    ids = distinct_tokens(1, 40) % 15 + 1
    mask = torch.ones_like(ids)
    rules = dict(budget=16, recent=8, protect_prompt=False)
    options = dict(attention_mask=mask, eos_token_id=None)
    expected = _generate(model, CompressedCache(policy, **rules), ids, **options)
    cache = CompressedCache(policy, **rules)
    drafted = _generate(model, cache, ids, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(drafted, expected)


# Prompts below and above the budget, and from one token to the whole call.
_CROPS = [(12, 3), (30, 1), (30, 3), (30, 4), (30, 5)]


def test_drafts_that_are_right_save_forward_passes(model: Any) -> None:
    calls: list[int] = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    ids, twin = distinct_tokens(1, 30), _eager_to_draft(copy.deepcopy(model))
    twin.model.layers[0]._forward_hooks.clear()
    _generate(model, CompressedCache("h2o", 30 + NEW), ids, assistant_model=twin)
    handle.remove()
    assert len(calls) == 4


def test_a_plain_call_after_drafting_compresses_as_ever(model: Any) -> None:
    ids = distinct_tokens(1, 60)
    first, second = ids[:, :30], ids
    caches = []
    for helper in ({}, dict(prompt_lookup_num_tokens=4)):
        cache = CompressedCache("h2o", 16)
        text = _generate(model, cache, first, **helper)
        text = torch.cat([text, second[:, 30:]], dim=1)
        caches.append((_generate(model, cache, text), held(cache, 0)))
        assert cache.is_compileable or helper
        cache.reset()
        assert cache.is_compileable
    assert torch.equal(caches[0][0][:, :54], caches[1][0][:, :54])


@pytest.mark.parametrize(
    ("policy", "prompt", "taken"),
    slow_but(
        QUICK,
        (
            (policy, *_CROPS[(2 * number + own) % len(_CROPS)])
            for number, policy in enumerate(KINDS)
            for own in range(2)
        ),
    ),
)
def test_crop_takes_back_what_was_evicted(model: Any, policy: str, prompt: int, taken: int) -> None:
    ids = distinct_tokens(1, prompt + 5)
    cache, expected = (
        CompressedCache(policy, 16, interval=3, recent=8, protect_prompt=False) for _ in range(2)
    )
    with torch.no_grad():
        for used in (cache, expected):
            model(ids[:, :prompt], past_key_values=used)
            used.activate_past_recording()
            # The first call after this reads a prompt, the next ones drafts.
            model(ids[:, :1], past_key_values=used)
            used.crop(-1)
        model(ids[:, prompt:], past_key_values=cache)
        cache.crop(-taken)
        for token in range(prompt, prompt + 5 - taken):
            model(ids[:, token : token + 1], past_key_values=expected)
            expected.crop(0)
        for layer in range(2):
            assert held(cache, layer) == held(expected, layer)
        got, wanted = (model(ids[:, :1], past_key_values=c).logits for c in (cache, expected))
    torch.testing.assert_close(got, wanted)
    assert cache.get_seq_length() == expected.get_seq_length()
    with pytest.raises(ValueError, match="crop can take back at most the 1 tokens"):
        cache.crop(-2)
