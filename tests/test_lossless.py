"""Drafts of a compressed cache leave the text that of the full cache."""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    SynthIDTextWatermarkingConfig,
)
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from compressed_cache import CompressedCache, DraftStatistics, lossless
from compressed_cache.hf import lossless as loop
from compressed_cache.hf.draft_length import DraftLength
from compressed_cache.hf.drafter import Drafter
from compressed_cache.hf.full_cache import FullCache
from compressed_cache.hf.full_layer import few_sizes
from compressed_cache.ops.acceptance import accept_greedy, accept_sampled
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.versions import cache_argument
from tests.compiling import CountingBackend, compiled
from tests.conftest import VOCABULARY, distinct_tokens
from tests.families import EACH_FAMILY, FAMILIES, LINEAR, Family

OFTEN = list(range(20, VOCABULARY, 20))  # so many ends that rows end at different steps
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "ends": dict(eos_token_id=OFTEN),
    "minimal length": dict(eos_token_id=OFTEN, min_new_tokens=12),
    "repetition penalty": dict(repetition_penalty=1.3, no_repeat_ngram_size=3),
    "one token": dict(max_new_tokens=1),
    "two tokens": dict(max_new_tokens=2),
    "chunks of the prompt": dict(prefill_chunk_size=11),
    "several sequences": dict(num_return_sequences=2, do_sample=True, top_k=1),
    "one draft": dict(num_draft_tokens=1),
    "adaptive": dict(adaptive=True),
}
SYNTH_ID = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3, context_history_size=64)
OURS = ("num_draft_tokens", "adaptive", "refresh", "statistics")


@pytest.fixture(scope="module")
def model(make_model: Callable[..., LlamaForCausalLM]) -> Any:
    # Tokens that come again and again, so that some drafts are right.
    return make_model(initializer_range=0.12)


def _padded() -> dict[str, Tensor]:
    ids = distinct_tokens(3, 30)
    ids[0, :11] = ids[1, :4] = 0
    return dict(input_ids=ids, attention_mask=(ids != 0).long())


def _cache(policy: str = "snapkv", budget: int = 24, **options: Any) -> CompressedCache:
    return CompressedCache(policy, budget, recent=4, protect_prompt=False, **options)


def _plain(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(3)
    options = {"max_new_tokens": 40, "do_sample": False, **_padded(), **options}
    options = {name: value for name, value in options.items() if name not in OURS}
    return model.generate(**cache_argument(DynamicCache()), **options)


def _lossless(model: Any, cache: Any = None, **options: Any) -> Tensor:
    torch.manual_seed(3)
    cache = _cache() if cache is None else cache
    options = {"max_new_tokens": 40, "do_sample": False, "adaptive": False, **_padded(), **options}
    return model.generate(**cache_argument(cache), custom_generate=lossless, **options)


def test_counts_may_be_numbers_of_numpy(model: Any) -> None:
    counts = dict(num_draft_tokens=np.int64(3), refresh=np.int32(8))
    assert torch.equal(_lossless(model, _cache("snapkv"), **counts), _plain(model))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_text_is_that_of_the_full_cache(model: Any, rows: int, mode: str) -> None:
    inputs = {name: tensor[:rows] for name, tensor in _padded().items()}
    options = {**inputs, **MODES[mode]}
    assert torch.equal(_lossless(model, **options), _plain(model, **options))


def test_rows_accept_different_numbers_and_end_at_different_steps(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the test above would show nothing."""
    counts: list[list[int]] = []

    def accept(drafts: Tensor, scores: Tensor) -> Any:
        found = accept_greedy(drafts, scores)
        counts.append(found[0].tolist())
        return found

    monkeypatch.setattr(loop, "accept_greedy", accept)
    new = _lossless(model, eos_token_id=OFTEN)[:, 30:]
    assert len(set((new != 0).sum(dim=1).tolist())) > 1
    assert any(len(set(round_)) > 1 for round_ in counts)
    assert {0, 4} <= set(itertools.chain(*counts))


@pytest.mark.parametrize(
    "policy", ["h2o", "streaming_llm", "tova", "snapkv+adakv", "rkv", "learned_gate"]
)
def test_policies(model: Any, policy: str) -> None:
    assert torch.equal(_lossless(model, CompressedCache(policy, 24)), _plain(model))


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_families(family: Family) -> None:
    model = family.make().float()
    ids = torch.randint(1, 160, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if LINEAR not in family.kinds:
        mask[0, :5] = 0
    inputs = dict(input_ids=ids, attention_mask=mask, max_new_tokens=24)
    try:
        got = _lossless(model, CompressedCache("h2o", 12), **inputs)
    except NotImplementedError as error:
        own = "prepares its inputs in a way of its own" in str(error)
        assert own or (LINEAR in family.kinds and "linear-attention" in str(error))
        return
    assert LINEAR not in family.kinds
    assert torch.equal(got, _plain(model, **inputs))


def test_the_shipped_model() -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_PATH).float().eval()
    ids = torch.randint(1, model.config.vocab_size, (8, 64), generator=torch.manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(8):
        mask[row, : 3 * row] = 0
    inputs = dict(input_ids=ids, attention_mask=mask, eos_token_id=None, max_new_tokens=48)
    statistics = DraftStatistics()
    got = _lossless(model, _cache(), statistics=statistics, **inputs)
    assert torch.equal(got, _plain(model, **inputs))
    assert 0.0 < statistics.acceptance_rate < 1.0


@pytest.mark.parametrize("refresh", [None, 3])
def test_the_compressed_cache_holds_the_text_of_each_row(model: Any, refresh: int | None) -> None:
    """And a further turn finds it as any loop leaves it."""
    cache = _cache("streaming_llm")
    text = _lossless(model, cache, eos_token_id=OFTEN, refresh=refresh)
    lengths = (text[:, 30:] != 0).sum(dim=1)
    assert int(lengths.min()) < int(lengths.max())
    assert cache.get_seq_length() == 30 + min(int(lengths.max()), 39)
    for row in range(3):
        real = _padded()["attention_mask"][row].bool()
        read = min(int(lengths[row]), 39)
        own = torch.cat([text[row, :30][real], text[row, 30 : 30 + read]])
        alone = _cache("streaming_llm")
        with torch.no_grad():
            prompt = int(real.sum())
            model(own[None, :prompt], **cache_argument(alone))
            for token in own[prompt:]:
                model(token[None, None], **cache_argument(alone))
        for layer in range(2):
            found = cache.layers[layer].positions, alone.layers[layer].positions
            assert found[0] is not None and found[1] is not None
            assert torch.equal(found[0][row].sort().values, found[1][0].sort().values)
    more = distinct_tokens(3, 7, seed=1)
    mask = torch.cat([_padded()["attention_mask"], text[:, 30:] != 0, more != 0], dim=1).long()
    turn = dict(input_ids=torch.cat([text, more], dim=1), attention_mask=mask)
    expected = _plain(model, **turn, max_new_tokens=9)
    assert torch.equal(_lossless(model, cache, **turn, max_new_tokens=9), expected)


def test_a_prompt_of_embeddings(model: Any) -> None:
    embeddings = model.get_input_embeddings()(_padded()["input_ids"])
    inputs = dict(input_ids=None, inputs_embeds=embeddings)
    assert torch.equal(_lossless(model, **inputs), _plain(model, **inputs))


class _Notes(BaseStreamer):
    def __init__(self) -> None:
        self.put_in: list[list[Any]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.put_in.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("rows", [1, 3])
def test_a_streamer_gets_what_it_gets_from_generate(model: Any, rows: int) -> None:
    plain, streamer = _Notes(), _Notes()
    options = {name: tensor[:rows] for name, tensor in _padded().items()}
    _plain(model, streamer=plain, eos_token_id=OFTEN, **options)
    _lossless(model, streamer=streamer, eos_token_id=OFTEN, **options)
    assert streamer.put_in == plain.put_in and len(plain.put_in) > 2
    assert streamer.ended == plain.ended == 1


class _BansByRow(LogitsProcessor):
    """Bans what was written last, in place, and a token of each row."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(len(scores))
        scores[rows, (rows * 7 + input_ids.shape[1]) % VOCABULARY] = -torch.inf
        return scores.scatter_(1, input_ids[:, -1:], -torch.inf)


class _EndsAt(StoppingCriteria):
    """Ends row ``b`` at ``lengths[b]`` tokens."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return input_ids.shape[1] >= self.lengths


@pytest.mark.parametrize("ends", [{}, dict(eos_token_id=OFTEN)])
def test_processors_and_criteria_of_the_user(model: Any, ends: dict[str, Any]) -> None:
    options: dict[str, Any] = dict(
        logits_processor=LogitsProcessorList([_BansByRow()]),
        stopping_criteria=StoppingCriteriaList([_EndsAt(35, 33, 50)]),
        **ends,
    )
    assert torch.equal(_lossless(model, **options), _plain(model, **options))


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_held_ends_where_the_text_does(model: Any, rows: int) -> None:
    """Also where a criterion ends it among drafts that are right, and no token does."""
    whole = {name: tensor[:rows] for name, tensor in _padded().items()}
    for ends in ((33, 35, 38), (40, 34, 45), (36, 36, 36)):
        criteria = StoppingCriteriaList([_EndsAt(*ends[:rows])])
        cache, statistics = _cache(budget=29), DraftStatistics()
        text = _lossless(model, cache, stopping_criteria=criteria, statistics=statistics, **whole)
        length = max(ends[:rows])
        assert text.shape[1] == length and cache.get_seq_length() == length - 1
        read = whole["attention_mask"].sum(dim=1) + length - 31
        assert all(torch.equal(layer.store.next_position, read) for layer in cache.layers)
        assert statistics.tokens == rows * (length - 31)
        assert torch.equal(text, _plain(model, stopping_criteria=criteria, **whole))


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_constraint_is_asked_of_no_other_text_than_by_generate(
    model: Any, rows: int, do_sample: bool
) -> None:
    """It may have no answer after the end of a row, nor to the text of another row."""
    end, free = 399, range(20, 398)
    # Of two rows all drafts are right.
    answers = [[free] * 9 + [[end]], [[token] for token in (*range(9), end)], [[7], [end]]]

    def allowed(row: int, text: Tensor) -> list[int]:
        new = text[30:].tolist()
        if end in new and rows > 1:
            return [0]
        fits = all(token in some for token, some in zip(new, answers[row], strict=False))
        return [*answers[row][len(new)]] if fits and len(new) < len(answers[row]) else []

    whole = {name: tensor[:rows] for name, tensor in _padded().items()}
    options = dict(whole, eos_token_id=end, prefix_allowed_tokens_fn=allowed, do_sample=do_sample)
    text = _lossless(model, _cache(budget=6), **options)[:, 30:].tolist()
    for own, new in zip(answers, text, strict=False):
        assert all(token in some for token, some in zip(new, own, strict=False))
    if not do_sample:
        assert text == _plain(model, **options)[:, 30:].tolist()


@pytest.mark.parametrize("refresh", [None, 5])
def test_a_text_goes_on_from_its_last_token(model: Any, refresh: int | None) -> None:
    """A step and not a prompt: it overwrites what was chosen for it before."""
    for length in (20, 22, 26, 28):
        cache = _cache(interval=8)
        text = _lossless(model, cache, max_new_tokens=length, refresh=refresh)
        assert cache.counter.steps >= 0
        mask = torch.cat([_padded()["attention_mask"], torch.ones(3, length).long()], dim=1)
        more = model.generate(
            text, attention_mask=mask, **cache_argument(cache), max_new_tokens=20, do_sample=False
        )
        assert cache.get_seq_length() == more.shape[1] - 1


class _Fails(_Notes):
    def put(self, value: Tensor) -> None:
        super().put(value)
        if len(self.put_in) == 9:
            raise RuntimeError("no more")


@pytest.mark.parametrize("rows", [1, 3])
def test_a_text_that_is_broken_off_leaves_no_draft(model: Any, rows: int) -> None:
    inputs = dict(input_ids=distinct_tokens(rows, 30), attention_mask=torch.ones(rows, 30).long())
    cache, streamer = _cache("streaming_llm"), _Fails()
    with pytest.raises(RuntimeError, match="no more"):
        _lossless(model, cache, streamer=streamer, **inputs)
    read = cache.layers[0].store.next_position.tolist()
    assert max(read) == cache.get_seq_length()
    # What was given out is of all rows, so that some may be ahead of it.
    assert 30 < min(read) < 30 + 8
    assert all(len(tokens) == rows for tokens in streamer.put_in[1:])


class _Remembers(StoppingCriteria):
    """Ends a batch when each row has had one of some tokens after the prompt, of which it sees the
    last three, as the stop sequences of lm_eval do."""

    def __init__(self, *tokens: int, rows: int, prompt: int) -> None:
        self.tokens, self.prompt = torch.tensor(tokens), prompt
        self.done_tracker = [False] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        last = input_ids[:, self.prompt :][:, -3:]
        for row, found in enumerate(torch.isin(last, self.tokens).any(dim=1).tolist()):
            self.done_tracker[row] |= found
        return False not in self.done_tracker


def test_a_cache_that_assisted_decoding_wrote_with_may_draft(model: Any) -> None:
    cache, ids = _cache(), _padded()["input_ids"][2:]
    one = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    text = model.generate(
        **cache_argument(cache), **one, prompt_lookup_num_tokens=3, max_new_tokens=9
    )
    more = dict(input_ids=text, attention_mask=torch.ones_like(text))
    assert torch.equal(_lossless(model, cache, **more), _plain(model, **more))


def test_criteria_that_remember_see_nothing_that_a_row_does_not_have(model: Any) -> None:
    """Neither the padding nor the end of the prompt, which both would end a row."""
    text = _plain(model)[:, 30:]
    common = [token for token in text.flatten().unique().tolist() if (text == token).any(1).all()]
    for stop in (0, int(text[0, 2])), (0, *common), (0, int(_padded()["input_ids"][1, -1])):
        found = []
        for generate in (_plain, _lossless):
            criterion = _Remembers(*stop, rows=3, prompt=30)
            got = generate(
                model,
                stopping_criteria=StoppingCriteriaList([criterion]),
                eos_token_id=stop[-1],
                **({} if generate is _plain else dict(num_draft_tokens=3)),
            )[:, 30:]
            ends = torch.isin(got, torch.tensor(stop)).int()
            lengths = torch.where(ends.any(1), ends.argmax(1), got.shape[1]).tolist()
            found.append([row[:length].tolist() for row, length in zip(got, lengths, strict=True)])
        assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "interval", "graphs"), [("h2o", 1, 4), ("snapkv", 4, 6)])
def test_drafts_are_compiled_as_steps_are(
    model: Any, monkeypatch: pytest.MonkeyPatch, policy: str, interval: int, graphs: int
) -> None:
    torch._dynamo.reset()
    backend = CountingBackend()
    options = dict(compile_config=compiled(backend))
    cache, eager = (_cache(policy, interval=interval) for _ in range(2))
    got = _lossless(model, cache, **options)
    # One for drafts and one for reading what was accepted, each twice where not all steps rank, and
    # one each for verifying drafts and the last token.
    assert backend.graphs == graphs
    assert torch.equal(got, _lossless(model, eager)) and torch.equal(got, _plain(model))
    # The text would be the same whatever it holds.
    for one, other in zip(cache.layers, eager.layers, strict=True):
        for held, expected in zip(one.store.tokens, other.store.tokens, strict=True):
            torch.testing.assert_close(held, expected)
        assert torch.equal(one.store.counts, other.store.counts)
    # Another cache finds these, and so does verifying fewer drafts than there may be at most.
    monkeypatch.setattr(DraftLength, "choose", lambda self: next(lengths))
    lengths = itertools.cycle(range(5))
    again = _lossless(model, _cache(policy, interval=interval), adaptive=True, **options)
    assert backend.graphs == graphs and torch.equal(again, got)
    # Fewer at most are another graph of the full cache.
    lengths = itertools.repeat(2)
    again = _lossless(model, _cache(policy, interval=interval), num_draft_tokens=2, **options)
    assert backend.graphs == graphs + 1 and torch.equal(again, got)
    torch._dynamo.reset()


@pytest.mark.slow
def test_verifying_is_compiled_where_layers_have_windows() -> None:
    torch._dynamo.reset()
    [family] = [one for one in FAMILIES if one.name == "Gemma 3"]
    model, backend = family.make().float(), CountingBackend()
    inputs = _padded()
    inputs["input_ids"] = inputs["input_ids"] % 160
    # As many graphs as there are sizes of batches are not too many of one function.
    with torch._dynamo.config.patch(recompile_limit=1):
        cache, options = CompressedCache("h2o", 12), dict(compile_config=compiled(backend))
        got = _lossless(model, cache, **options, **inputs)
    assert torch.equal(got, _plain(model, **inputs))
    # For drafts, for reading what was accepted, for verifying them, and for verifying a last token
    # where it has to be read.
    assert 3 <= backend.graphs <= 4
    few = {name: tensor[1:] for name, tensor in inputs.items()}
    with torch._dynamo.config.patch(recompile_limit=1):
        got = _lossless(model, CompressedCache("h2o", 12), **options, **few)
    assert torch.equal(got, _plain(model, **few))
    torch._dynamo.reset()


# What rows take back.


@pytest.mark.parametrize("is_windowed", [False, True])
@pytest.mark.parametrize("shapes", ["stay", "change"])
def test_the_full_cache_holds_each_row_in_order(
    monkeypatch: pytest.MonkeyPatch, shapes: str, is_windowed: bool
) -> None:
    """Tokens are numbers here, and so are their keys."""
    closed: list[int] = []
    close = FullCache.close_holes
    monkeypatch.setattr(FullCache, "close_holes", lambda self: closed.append(1) or close(self))
    full = FullCache(math.inf, needs_hidden_states=False, is_windowed=is_windowed)
    real = torch.arange(40) >= torch.tensor([[12], [0], [7]])
    keys = torch.where(real, torch.arange(40.0), -1.0)[:, None, :, None].expand(-1, 2, -1, 4)
    full.layer(0).append(keys, -keys)
    full.holds(real)
    rows = [row[keep].tolist() for row, keep in zip(keys[:, 0, :, 0], real, strict=True)]
    generator = torch.Generator().manual_seed(0)
    for call in range(120):
        new = 1000.0 + 10 * call + torch.arange(5.0)
        states = new[:, None].expand(3, 2, 5, 4)
        if shapes == "stay":
            # One more column of a mask for each that there is memory for.
            assert full.begin(5).shape[1] == full.layers[0].capacity == full.get_mask_sizes(5, 0)[0]
            full.update(states, -states, 0)
            full.end(5)
        else:
            full.update(states, -states, 0)
        kept = torch.randint(0, 6, (3,), generator=generator).tolist()
        full.keep(kept, 5)
        for row, count in zip(rows, kept, strict=True):
            row += new[:count].tolist()
    assert full.layers[0].capacity == 512 and max(map(len, rows)) > 256
    for row, tokens in enumerate(rows):
        for held, sign in ((full.layers[0].keys, 1.0), (full.layers[0].values, -1.0)):
            assert held is not None and held.shape[2] == full.real.shape[1]
            expected = torch.tensor(tokens)[None, :, None].expand(2, -1, 4) * sign
            assert torch.equal(held[row][:, full.real[row]], expected)
    if is_windowed:
        assert full.real[:, -min(map(len, rows)) :].all()
        # The padding of the prompt has stayed.
        assert full.real.shape[1] == max(12 + len(rows[0]), len(rows[1]), 7 + len(rows[2]))
    else:
        # To close holes all is copied.
        assert 0 < len(closed) < 20
        assert full.real.shape[1] <= max(map(len, rows)) * 8 / 7 + 5


@pytest.mark.parametrize("name", ["Mistral", "Gemma 3"])
def test_windows_reach_as_far_over_padding_between_turns_as_in_generate(name: str) -> None:
    [family] = [one for one in FAMILIES if one.name == name]
    model = family.make().float()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 160, (3, 44), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :9] = mask[1, 30:40] = mask[2, 33:] = 0
        mask[:, 41:] = 1
        first = dict(input_ids=ids[:, :24], attention_mask=mask[:, :24])
        cache = CompressedCache("h2o", 20)
        with torch.no_grad():
            model(**first, **cache_argument(cache))
        turn = dict(input_ids=ids, attention_mask=mask, max_new_tokens=25)
        assert torch.equal(_lossless(model, cache, **turn), _plain(model, **turn))


def test_memory_is_of_few_sizes_and_not_much_more_than_the_longest_text_takes() -> None:
    sizes = {few_sizes(tokens, 3000) for tokens in range(1, 3001)}
    assert sizes == {256, 512, 1024, 2048, 3072}
    assert {few_sizes(tokens, math.inf) for tokens in range(1025, 2049)} == {2048}
    assert len({few_sizes(longest, longest) for longest in range(1025, 2049)}) == 4
    assert few_sizes(700, 600) == 768  # it was longer than was known


# Tokens that come back.


@pytest.mark.parametrize("policy", ["knorm", "snapkv", "rkv", "keydiff", "expected_attention"])
@pytest.mark.parametrize("interval", [1, 8])
def test_a_refreshed_text_is_that_of_the_full_cache(model: Any, policy: str, interval: int) -> None:
    cache = CompressedCache(policy, 24, interval=interval)
    assert torch.equal(_lossless(model, cache, refresh=8), _plain(model))


def _positions(drafter: Drafter) -> set[int]:
    """What the first head of the first layer holds of the first row."""
    positions = drafter.cache.layers[0].store.tokens.positions[0, 0].tolist()
    return {place for place in positions if place >= 0}


def test_a_refreshed_cache_holds_the_best_of_all_tokens(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def refreshed(self: Drafter, full: Any) -> None:
        choose(self, full)
        norms = full.layers[0].keys[0, 0][full.real[0]].double().norm(dim=-1)
        lengths.append(len(norms))
        older = len(norms) - 4
        assert _positions(self) == {*norms[:older].argsort()[:20].tolist()} | {
            *range(older, len(norms))
        }
        assert int(self.cache.layers[0].store.next_position[0]) == len(norms)

    choose = Drafter.refresh
    monkeypatch.setattr(Drafter, "refresh", refreshed)
    _lossless(model, _cache("knorm"), refresh=10)
    # The longest row counts: after 10 of its 39 tokens, 20 and 30, or a little later.
    assert len(lengths) in (2, 3, 4)


def test_the_step_after_a_refresh_ranks(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slots that were to be overwritten next hold other tokens now."""
    due: list[int] = []

    def refreshed(self: Drafter, full: Any) -> None:
        counter = self.cache.counter
        seen, due[len(due) :] = counter.tokens_seen, [counter.steps % 8]
        choose(self, full)
        assert counter.ranks and counter.ranks_at(0) and not counter.ranks_at(1)
        assert counter.tokens_seen == seen and not counter.is_first_prompt

    choose = Drafter.refresh
    monkeypatch.setattr(Drafter, "refresh", refreshed)
    _lossless(model, _cache("snapkv", interval=8), refresh=5)
    assert any(due)


def test_before_anything_is_evicted_every_token_is_held_once(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[list[int]] = []

    def refreshed(self: Drafter, full: Any) -> None:
        choose(self, full)
        for layer in self.cache.layers:
            for head in layer.store.tokens.positions.flatten(0, 1).tolist():
                held.append([place for place in head if place >= 0])

    choose = Drafter.refresh
    monkeypatch.setattr(Drafter, "refresh", refreshed)
    inputs = {name: tensor[:, 20:] for name, tensor in _padded().items()}
    assert torch.equal(_lossless(model, refresh=2, **inputs), _plain(model, **inputs))
    assert min(map(len, held)) < 24 == max(map(len, held))
    assert all(len(set(places)) == len(places) for places in held)


@pytest.mark.parametrize("refresh", [None, 6])
def test_evicted_tokens_come_back_where_they_are_chosen_anew(
    model: Any, monkeypatch: pytest.MonkeyPatch, refresh: int | None
) -> None:
    held: list[set[int]] = []

    def begin(self: Drafter) -> None:
        start(self)
        held.append(_positions(self))

    start = Drafter.begin
    monkeypatch.setattr(Drafter, "begin", begin)
    _lossless(model, _cache("snapkv"), refresh=refresh)
    back = [after & {*range(max(before))} - before for before, after in itertools.pairwise(held)]
    assert any(back) is (refresh is not None)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(refresh=0), ValueError, "refresh must be at least 1, got 0"),
        (dict(refresh=2.0), TypeError, "refresh must be an int, got 2.0"),
        (dict(refresh=8, policy="h2o"), NotImplementedError, "'h2o' ranks by more than keys"),
        (dict(refresh=8, policy="gkv"), NotImplementedError, "'gkv' ranks by more than keys"),
        (dict(refresh=8, policy="snapkv+adakv"), NotImplementedError, "leave out refresh"),
        (dict(refresh=8, policy="snapkv+think"), NotImplementedError, "leave out refresh"),
    ],
)
def test_what_cannot_be_chosen_anew_is_refused(
    model: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        _lossless(model, CompressedCache(options.pop("policy", "snapkv"), 24), **options)


# Sampling.


def _chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """In standard deviations above what is expected where ``probabilities`` are right."""
    expected = counts.sum() * probabilities.double()
    used = expected > 5
    # All that is rare counts as one.
    rest = counts[~used].sum(), expected[~used].sum()
    found = torch.cat([counts[used].double(), rest[0].double()[None]])
    wanted = torch.cat([expected[used], rest[1][None]]).clamp(min=1e-9)
    statistic = float(((found - wanted) ** 2 / wanted)[: len(found) - (rest[1] < 5).item()].sum())
    freedom = int(used.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def _accepts_all(drafts: Tensor, draft_probabilities: Tensor, probabilities: Tensor) -> Any:
    accepted = torch.full((len(drafts),), drafts.shape[1])
    return accepted, torch.multinomial(probabilities[:, -1], 1)


def _draws_anew(drafts: Tensor, draft_probabilities: Tensor, probabilities: Tensor) -> Any:
    """After a rejection from the model itself: the drafts' favourites come too often."""
    accepted, _ = accept_sampled(drafts, draft_probabilities, probabilities)
    rows = torch.arange(len(drafts))
    return accepted, torch.multinomial(probabilities[rows, accepted], 1)


RULES = [(accept_sampled, True), (_accepts_all, False), (_draws_anew, False)]


@pytest.mark.parametrize(("rule", "is_right"), RULES)
def test_accepted_tokens_have_the_distribution_of_the_model(
    rule: Callable[..., Any], is_right: bool
) -> None:
    torch.manual_seed(0)
    rows, drafts, vocabulary = 40_000, 2, 6
    wanted = torch.randn(drafts + 1, vocabulary).softmax(dim=-1)
    proposed = torch.randn(drafts, vocabulary).softmax(dim=-1)
    wanted[0, 2] = 0.0
    wanted /= wanted.sum(dim=-1, keepdim=True)
    drawn = torch.stack([torch.multinomial(one, rows, replacement=True) for one in proposed], dim=1)
    accepted, after = rule(
        drawn, proposed.expand(rows, -1, -1), wanted.expand(rows, -1, -1).contiguous()
    )
    tokens = torch.cat([drawn, drawn[:, :1]], dim=1)
    tokens.scatter_(1, accepted[:, None], after)
    distances = []
    for place in range(drafts + 1):
        found = tokens[accepted >= place, place]
        distances.append(_chi_square(found.bincount(minlength=vocabulary), wanted[place]))
    assert (max(distances) < 4.0) == is_right
    if is_right:
        assert 0 < int(accepted.sum()) < rows * drafts


@pytest.mark.parametrize(("rule", "is_right"), RULES)
def test_a_sampled_text_has_the_distribution_of_the_full_cache(
    make_model: Callable[..., LlamaForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
    rule: Callable[..., Any],
    is_right: bool,
) -> None:
    model: Any = make_model(vocab_size=8, initializer_range=0.5)
    monkeypatch.setattr(loop, "accept_sampled", rule)
    rows = 3000
    prompt = torch.randint(1, 8, (1, 24), generator=torch.Generator().manual_seed(2))
    options = dict(do_sample=True, temperature=1.5, top_k=6, num_draft_tokens=2, max_new_tokens=3)
    torch.manual_seed(0)
    got = model.generate(
        prompt.expand(rows, -1),
        attention_mask=torch.ones(rows, 24, dtype=torch.int64),
        custom_generate=lossless,
        **cache_argument(CompressedCache("streaming_llm", 8, sinks=1)),
        **options,
    )
    texts = torch.tensor(list(itertools.product(range(8), repeat=3)))
    whole = torch.cat([prompt.expand(len(texts), -1), texts], dim=1)
    with torch.no_grad():
        logits = model(whole).logits[:, 23:26] / 1.5
    sixth = logits.topk(6, dim=-1).values[..., -1:]
    logits = logits.masked_fill(logits < sixth, -torch.inf)
    chances = logits.softmax(dim=-1).gather(2, texts[:, :, None]).prod(dim=1).squeeze(1)
    index = got[:, 24] * 64 + got[:, 25] * 8 + got[:, 26]
    assert (_chi_square(index.bincount(minlength=512), chances) < 4.0) == is_right


# How many to draft.


def test_statistics_add_up(model: Any) -> None:
    statistics = DraftStatistics()
    _lossless(model, statistics=statistics)
    assert statistics.tokens == 3 * 39
    assert 0 < statistics.accepted < statistics.drafted
    assert statistics.acceptance_rate == statistics.accepted / statistics.drafted
    # Each verification brings a token beside the drafts; some are after the end of a text.
    assert statistics.tokens <= statistics.row_verifications + statistics.accepted
    assert 1.0 < statistics.tokens_per_verification <= 5.0
    assert statistics.drafting_s > 0.0 and statistics.verifying_s > 0.0
    assert statistics.plain_from is None
    _lossless(model, statistics=statistics)
    assert statistics.tokens == 2 * 3 * 39
    assert math.isnan(DraftStatistics().acceptance_rate)
    assert math.isnan(DraftStatistics().tokens_per_verification)


def _lengths(rate: float, draft_s: float, rounds: int = 60) -> list[int]:
    length, chosen, carry = DraftLength(6, adapts=True), [], 0.0
    for _ in range(rounds):
        count = length.choose()
        chosen.append(count)
        expected = sum(rate**place for place in range(1, count + 1)) + carry
        accepted = min(int(expected), count)
        carry = expected - accepted
        length.add(count, [accepted], count * draft_s, 1.0 + 0.01 * count)
    return chosen


@pytest.mark.parametrize("policy", ["h2o", "knorm"])
def test_no_row_takes_more_than_the_text_has(model: Any, policy: str) -> None:
    """Where no token ends it, whatever was accepted."""
    cache, statistics = _cache(policy), DraftStatistics()
    inputs = dict(input_ids=distinct_tokens(3, 30), attention_mask=torch.ones(3, 30).long())
    options: dict[str, Any] = dict(inputs, num_draft_tokens=8, max_new_tokens=21)
    text = _lossless(model, cache, statistics=statistics, **options)
    assert torch.equal(text, _plain(model, **options))
    assert statistics.tokens == 3 * 20
    assert statistics.accepted <= statistics.tokens - statistics.row_verifications + 3
    for layer in cache.layers:
        assert layer.store.next_position.tolist() == [50] * 3


def test_given_up_drafts_leave_rows_that_are_level(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a further turn would take the columns that a row is behind for padding."""

    def accept(drafts: Tensor, scores: Tensor) -> Any:
        count, _ = accept_greedy(drafts, scores)
        # As if some rows had had luck before drafting was given up.
        count = count.clamp(max=0) if len(rounds) > 3 else count
        rounds.append(count.tolist())
        return count, scores.argmax(dim=-1).gather(1, count[:, None])

    rounds: list[list[int]] = []
    ticks = itertools.count()
    monkeypatch.setattr(loop._Loop, "_now", lambda self: next(ticks) * 1.0)
    monkeypatch.setattr(loop, "accept_greedy", accept)
    cache, statistics = _cache("knorm"), DraftStatistics()
    inputs = dict(input_ids=distinct_tokens(3, 30), attention_mask=torch.ones(3, 30).long())
    text = _lossless(
        model, cache, statistics=statistics, adaptive=True, max_new_tokens=60, **inputs
    )
    assert torch.equal(text, _plain(model, max_new_tokens=60, **inputs))
    assert statistics.plain_from is not None and len({*map(tuple, rounds)}) > 1
    assert any(len(set(counts)) > 1 for counts in rounds)
    (read,) = {*cache.layers[0].store.next_position.tolist()}
    assert read == cache.get_seq_length() < text.shape[1] - 1
    turn = torch.cat([text, distinct_tokens(3, 5, seed=1)], dim=1)
    model.generate(
        turn,
        attention_mask=torch.ones_like(turn),
        **cache_argument(cache),
        max_new_tokens=3,
        do_sample=False,
    )
    assert cache.layers[0].store.next_position.tolist() == [turn.shape[1] + 2] * 3
    # Of this text alone.
    _lossless(model, _cache("knorm"), statistics=statistics, max_new_tokens=3)
    assert statistics.plain_from is None


def test_more_drafts_than_there_is_room_for_are_given_up_as_others_are(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def count(*args: Any) -> None:
        nonlocal calls
        calls += 1

    # By a clock that shows how often the model was called.
    monkeypatch.setattr(loop._Loop, "_now", lambda self: float(calls))
    monkeypatch.setattr(
        loop, "accept_greedy", lambda drafts, scores: accept_greedy(drafts * 0 - 1, scores)
    )
    handle = model.register_forward_pre_hook(count)
    statistics = DraftStatistics()
    options: dict[str, Any] = dict(adaptive=True, num_draft_tokens=10**9, max_new_tokens=40)
    _lossless(model, statistics=statistics, **options)
    handle.remove()
    assert statistics.plain_from is not None
    assert statistics.drafted <= 3 * 3 * 38


def test_the_number_of_drafts_follows_what_they_bring() -> None:
    assert _lengths(0.95, 0.05)[-1] == 6
    assert 1 <= _lengths(0.6, 0.2)[-1] <= 3
    assert _lengths(0.1, 0.5)[-10:] == [0] * 10
    # Drafts that cost nearly nothing are worth it even where few are right.
    assert _lengths(0.3, 0.01)[-1] >= 1


def test_drafts_that_bring_nothing_are_given_up(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(loop._Loop, "_now", lambda self: next(ticks) * 1.0)
    monkeypatch.setattr(
        loop, "accept_greedy", lambda drafts, scores: accept_greedy(drafts * 0 - 1, scores)
    )
    statistics, cache = DraftStatistics(), _cache()
    got = _lossless(model, cache, statistics=statistics, adaptive=True, max_new_tokens=60)
    assert torch.equal(got, _plain(model, max_new_tokens=60))
    assert statistics.plain_from is not None and statistics.plain_from < 30
    assert cache.get_seq_length() < 30 + statistics.plain_from


# Bad input.


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(num_draft_tokens=0), ValueError, "num_draft_tokens must be at least 1, got 0"),
        (dict(num_draft_tokens=2.0), TypeError, "num_draft_tokens must be an int, got 2.0"),
        (dict(adaptive="no"), TypeError, "adaptive must be True, False or None, got 'no' (str)"),
        (dict(statistics={}), TypeError, "statistics must be DraftStatistics(), got {} (dict)"),
        (dict(statistics=DraftStatistics), TypeError, "statistics must be DraftStatistics()"),
        (dict(guidance_scale=1.5), NotImplementedError, "ClassifierFreeGuidance"),
        (dict(watermarking_config=SYNTH_ID), NotImplementedError, "SynthIDTextWatermark"),
        (dict(cache=CompressedCache("kvzip", 24)), NotImplementedError, "but drafts follow the"),
        (dict(num_beams=2), NotImplementedError, "greedy decoding and sampling, got beam_search"),
        (dict(return_dict_in_generate=True), NotImplementedError, "return_dict_in_generate"),
        (dict(use_cache=False), ValueError, "leave use_cache on"),
        (dict(cache=DynamicCache()), ValueError, "drafts with a CompressedCache"),
        (dict(cache=CompressedCache(telemetry=True)), NotImplementedError, "telemetry cannot tell"),
    ],
)
def test_what_it_cannot_do_is_refused(
    model: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    options = dict(options)
    with _unread(model), pytest.raises(error, match=re.escape(words)):
        _lossless(model, options.pop("cache", None), **options)


@contextmanager
def _unread(model: Any) -> Iterator[None]:
    """Fails if the model reads anything."""

    def read(*args: Any) -> None:
        pytest.fail("the model was called")

    handle = model.register_forward_pre_hook(read)
    try:
        yield
    finally:
        handle.remove()


def test_what_the_model_wants_to_know_of_every_token_is_refused() -> None:
    config = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=VOCABULARY, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    types = dict(token_type_ids=torch.full((3, 30), 7))
    with _unread(model), pytest.raises(NotImplementedError, match="cannot give 'token_type_ids'"):
        _lossless(model, **types)
    assert torch.equal(_lossless(model), _plain(model))


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="dynamic", factor=4.0),
        dict(
            rope_type="longrope",
            original_max_position_embeddings=40,
            short_factor=[1.0] * 6,
            long_factor=[2.0] * 6,
        ),
    ],
    ids=["dynamic", "longrope"],
)
def test_angles_that_depend_on_the_length_are_refused_where_they_do(
    make_model: Callable[..., LlamaForCausalLM], rope: dict[str, Any]
) -> None:
    long = 40 if rope["rope_type"] == "dynamic" else 400
    parameters = rope | dict(rope_theta=10_000.0)
    model = make_model(max_position_embeddings=long, rope_parameters=parameters)
    assert torch.equal(_lossless(model, max_new_tokens=10), _plain(model, max_new_tokens=10))
    words = f"rope_type '{rope['rope_type']}', whose angles depend on the length beyond 40"
    with _unread(model), pytest.raises(NotImplementedError, match=words):
        _lossless(model, max_new_tokens=11)
    embeddings = model.get_input_embeddings()(_padded()["input_ids"])
    # The prompt counts also where it is not of ids, or not all of it is.
    for ids in (None, _padded()["input_ids"][:, :3]):
        inputs: dict[str, Any] = dict(input_ids=ids, inputs_embeds=embeddings)
        got = _lossless(model, max_new_tokens=10, **inputs)
        assert torch.equal(got, _plain(model, max_new_tokens=10, **inputs))
        with _unread(model), pytest.raises(NotImplementedError, match=words):
            _lossless(model, max_new_tokens=11, **inputs)


def test_a_text_that_was_read_is_refused_before_it_is_read_again(model: Any) -> None:
    cache = _cache()
    _lossless(model, cache, max_new_tokens=5)
    with _unread(model), pytest.raises(ValueError, match="the text must begin with the 34 tokens"):
        _lossless(model, cache)


def test_other_rows_are_refused_before_they_are_read(model: Any) -> None:
    cache = _cache()
    text = _lossless(model, cache, max_new_tokens=5)
    mask = torch.ones_like(text)
    with _unread(model), pytest.raises(ValueError, match=r"batch size must stay 3 .*, got 2\."):
        _lossless(model, cache, input_ids=text[:2], attention_mask=mask[:2])


def test_only_the_new_part_of_a_text_is_refused(model: Any) -> None:
    cache = _cache()
    _lossless(model, cache, max_new_tokens=5)
    mask = torch.cat([_padded()["attention_mask"], torch.ones(3, 10, dtype=torch.int64)], dim=1)
    with pytest.raises(ValueError, match="lossless needs the whole text, got 6 tokens and a mask"):
        _lossless(model, cache, input_ids=distinct_tokens(3, 6), attention_mask=mask)


@pytest.mark.parametrize("cache", [("snapkv", 256), ("full", 8)])
def test_where_nothing_is_evicted_nothing_is_drafted(model: Any, cache: tuple[str, int]) -> None:
    statistics = DraftStatistics()
    with pytest.warns(UserWarning, match="nothing is drafted"):
        got = _lossless(model, CompressedCache(*cache), statistics=statistics)
    assert torch.equal(got, _plain(model))
    assert statistics.drafted == 0
