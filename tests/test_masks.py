"""What a mask says is obeyed in every call: of new tokens, of those held, and of padding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaForCausalLM

from compressed_cache import CompressedCache
from compressed_cache.policies import SLOT_POLICIES
from compressed_cache.versions import cache_argument
from tests.conftest import distinct_tokens, held
from tests.families import FAMILIES
from tests.grids import slow_but
from tests.kinds import QUICK
from tests.reference.comparison import OPTIONS
from tests.test_properties import every

LAYOUTS: dict[str, dict[str, Any]] = {
    "full": {},
    "h2o": dict(budget=64, recent=2),
    "snapkv": dict(budget=64, window=3, interval=4),
    "snapkv+adakv": dict(budget=64, window=3),
    "snapkv+simlayerkv": dict(budget=64, window=3),
    "h2o+think": dict(budget=64, recent=2, think_recent=64),
    "shadowkv": dict(budget=64, rank=None),
}
"""Everything fits, in each layout."""


@pytest.fixture(scope="module")
def model(make_model: Callable[..., LlamaForCausalLM]) -> Any:
    return make_model().double()


def _cache(policy: str) -> CompressedCache:
    return CompressedCache(policy, **LAYOUTS[policy])


@torch.no_grad()
def _call(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    return model(ids, attention_mask=mask, **cache_argument(cache), **more).logits


def _assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def _additive(mask: Tensor, hidden: float = torch.finfo(torch.float64).min) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, hidden)


# The new tokens among themselves.


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", LAYOUTS)
def test_branches_of_a_tree_do_not_see_one_another(
    make_model: Callable[..., LlamaForCausalLM], policy: str, attention: str
) -> None:
    model = make_model(attn_implementation=attention).double()
    text, branches = distinct_tokens(1, 12), distinct_tokens(1, 6, seed=5)
    alone = [
        model(torch.cat([text, branches[:, start : start + 2]], dim=1)).logits[0, 12:]
        for start in (0, 2, 4)
    ]
    own = torch.block_diag(*[torch.ones(2, 2).tril()] * 3).bool()
    mask = torch.cat([torch.ones(6, 12).bool(), own], dim=1)[None, None]
    # The eager attention of transformers adds what it is given.
    mask = mask if attention == "sdpa" else _additive(mask)
    places = torch.tensor([[12, 13] * 3])
    cache = _cache(policy)
    _call(model, cache, text)
    got = _call(model, cache, branches, mask, position_ids=places)
    _assert_close(got[0], torch.cat(alone))


@pytest.mark.parametrize("policy", ["h2o", "full"])
def test_eager_attention_obeys_a_bool_mask_of_a_first_prompt(
    make_model: Callable[..., LlamaForCausalLM], policy: str
) -> None:
    """That of transformers would add it to the logits, where it hides nothing."""
    text = distinct_tokens(2, 13)
    mask = torch.block_diag(torch.ones(5, 5).tril(), torch.ones(7, 7).tril()).bool()
    logits, positions = [], []
    for attention, own in (("sdpa", mask), ("eager", mask), ("eager", _additive(mask))):
        model, cache = make_model(attn_implementation=attention).double(), _cache(policy)
        given = own[None, None].expand(2, -1, -1, -1)
        calls = _call(model, cache, text[:, :12], given), _call(model, cache, text[:, 12:])
        logits.append(torch.cat(calls, dim=1))
        positions.append(held(cache, 1))
    for got, places in zip(logits[1:], positions[1:], strict=True):
        _assert_close(got, logits[0])
        assert places == positions[0]


def test_images_of_a_second_turn_see_both_ways() -> None:
    """A model that shows the tokens of an image one another, by a mask that transformers builds."""
    gemma = next(family for family in FAMILIES if family.config == "Gemma3TextConfig")
    model = gemma.make()
    text, more = distinct_tokens(1, 12) % 150 + 1, distinct_tokens(1, 16, seed=3) % 150 + 1
    own = torch.ones(16, 16).tril().bool()
    own[3:9, 3:9] = True
    window = torch.arange(28)[12:, None] - torch.arange(28) < gemma.window
    full = torch.cat([torch.ones(16, 12).bool(), own], dim=1)[None, None]
    sliding = full & window[None, None]
    logits = []
    for cache in (DynamicCache(), CompressedCache("h2o", 64)):
        _call(model, cache, text)
        masks = dict(full_attention=full, sliding_attention=sliding)
        masks = {kind: _additive(mask) for kind, mask in masks.items()}
        logits.append(_call(model, cache, more, masks))
    _assert_close(logits[1], logits[0])


@pytest.mark.parametrize("policy", LAYOUTS)
def test_each_head_may_have_a_mask_of_its_own(model: Any, policy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    text, more = distinct_tokens(2, 12), distinct_tokens(2, 5, seed=3)
    mask = torch.rand(2, 4, 5, 17, generator=generator) < 0.6
    mask = mask | torch.eye(5, 17).roll(12, dims=1).bool()
    logits = []
    for cache in (DynamicCache(), _cache(policy)):
        _call(model, cache, text)
        logits.append(_call(model, cache, more, mask))
    _assert_close(logits[1], logits[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_is_obeyed_in_later_calls(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    model, plain = make_model(attn_implementation="flex_attention"), make_model()
    text, more = distinct_tokens(2, 12), distinct_tokens(2, 4, seed=3)

    def see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key == query + 12) | ((key + query) % 3 == 0)

    mask = create_block_mask(see, 2, None, 4, 16, device="cpu")
    dense = torch.zeros(1, 1, 4, 16).bool()
    for query in range(4):
        for key in range(16):
            dense[..., query, key] = key == query + 12 or (key + query) % 3 == 0
    dynamic, cache = DynamicCache(), CompressedCache("h2o", 64)
    _call(plain, dynamic, text), _call(model, cache, text)
    expected = _call(plain, dynamic, more, dense)
    torch.testing.assert_close(_call(model, cache, more, mask), expected, rtol=0, atol=1e-4)


# What is held.


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("policy", [policy for policy in LAYOUTS if policy != "shadowkv"])
def test_hidden_columns_of_the_past_are_not_seen(model: Any, policy: str, tokens: int) -> None:
    text, more = distinct_tokens(2, 12), distinct_tokens(2, tokens, seed=3)
    mask = torch.ones(2, 12 + tokens).long()
    mask[0, 3:6] = mask[1, 7] = 0
    logits = []
    for cache in (DynamicCache(), _cache(policy)):
        _call(model, cache, text)
        where = torch.arange(12, 12 + tokens)[None]
        logits.append(_call(model, cache, more, mask, position_ids=where))
    _assert_close(logits[1], logits[0])


def test_a_prompt_of_which_something_is_hidden_is_protected_as_far_as_it_is_left(
    model: Any,
) -> None:
    cache = CompressedCache("random", 24, recent=2, protect_prompt=True)
    ids, mask = distinct_tokens(2, 80), torch.ones(2, 80).long()
    _call(model, cache, ids[:, :12])
    mask[0, 3:6] = mask[1, 7] = 0
    for token in range(12, 80):
        where = mask[:, :token].sum(dim=1, keepdim=True)
        here = ids[:, token : token + 1]
        _call(model, cache, here, mask[:, : token + 1], position_ids=where)
    for row, prompt in enumerate((9, 11)):
        assert cache.layers[0].store.protected_prefix[row] == prompt
        for head in held(cache, 0, row):
            assert set(range(prompt)) <= set(head)
    # Some token goes that would be protected by the length the prompt had.
    assert any(9 + token not in head for head in held(cache, 0, 0) for token in range(3))


def test_what_was_hidden_cannot_be_shown_again(model: Any) -> None:
    cache = _cache("h2o")
    _call(model, cache, distinct_tokens(1, 12))
    mask = torch.ones(1, 15).long()
    mask[:, 3:6] = 0
    _call(model, cache, distinct_tokens(1, 3, seed=1), mask)
    before = [layer.positions.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match="it shows 3 such tokens of row 0"):
        _call(model, cache, distinct_tokens(1, 3, seed=2), torch.ones(1, 18).long())
    assert all(torch.equal(a, b.positions) for a, b in zip(before, cache.layers, strict=True))
    mask = torch.cat([mask, torch.ones(1, 3).long()], dim=1)
    _call(model, cache, distinct_tokens(1, 3, seed=2), mask)


def test_queries_of_hidden_tokens_are_forgotten(model: Any) -> None:
    cache, ids, mask = CompressedCache("snapkv", 32, window=4), distinct_tokens(1, 13), [1] * 13
    mask[9:11] = [0, 0]

    def ring() -> dict[int, Tensor]:
        store = cache.layers[1].store
        places = store.query_positions[0].tolist()
        return dict(zip(places, store.queries[0].clone().unbind(dim=2), strict=True))

    _call(model, cache, ids[:, :12])
    before = ring()
    _call(model, cache, ids[:, 12:], torch.tensor([mask]))
    after = ring()
    assert sorted(after) == [-1, 8, 9, 10]
    assert torch.equal(after[8], before[8]) and torch.equal(after[9], before[11])


def test_a_prompt_off_the_device_cannot_be_hidden_in_part(model: Any) -> None:
    cache = _cache("shadowkv")
    _call(model, cache, distinct_tokens(1, 12))
    mask = torch.ones(1, 15).long()
    mask[:, 3:6] = 0
    with pytest.raises(NotImplementedError, match="must not hide tokens of the first prompt"):
        _call(model, cache, distinct_tokens(1, 3, seed=1), mask)


def test_columns_that_were_evicted_stay_gone(model: Any) -> None:
    """The two heads of a layer hold other tokens; a mask of columns means the same for both."""
    cache = CompressedCache("random", 8, recent=2)
    _call(model, cache, distinct_tokens(1, 20))
    kept = [[set(head) for head in held(cache, layer)] for layer in range(2)]
    assert kept[0][0] != kept[0][1]
    more, hidden = distinct_tokens(1, 3, seed=3), {1, 5, 9, 12, 18}
    mask = torch.ones(1, 1, 3, 23).bool().tril(20)
    mask[..., list(hidden)] = False
    snapshot = cache.snapshot()
    logits = _call(model, cache, more, mask)
    cache.restore(snapshot)
    for layer in cache.layers:
        gone = torch.isin(layer.positions, torch.tensor(list(hidden)))
        assert gone.any()
        layer.positions.masked_fill_(gone, -1)
    _assert_close(logits, _call(model, cache, more))


@every(40)
@given(
    policy=st.sampled_from(SLOT_POLICIES),
    calls=st.lists(st.integers(1, 7), min_size=2, max_size=5),
    rows=st.integers(1, 3),
    is_additive=st.booleans(),
    share=st.sampled_from([0.2, 0.5, 0.9]),
    seed=st.integers(0, 1000),
)
def test_random_masks_of_several_turns_are_those_of_the_dynamic_cache(
    model: Any,
    policy: str,
    calls: list[int],
    rows: int,
    is_additive: bool,
    share: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = distinct_tokens(rows, sum(calls), seed=seed)
    dynamic, cache = DynamicCache(), CompressedCache(policy, 64, protect_prompt=False)
    seen = 0
    for new in calls:
        mask = torch.rand(rows, 1, new, seen + new, generator=generator) < share
        mask = mask | torch.eye(new, seen + new).roll(seen, dims=1).bool()
        if is_additive:
            bias = torch.randn(mask.shape, generator=generator).double()
            mask = torch.where(mask, bias, torch.finfo(torch.float64).min)
        part = ids[:, seen : seen + new]
        expected = _call(model, dynamic, part, mask)
        _assert_close(_call(model, cache, part, mask), expected)
        seen += new


@pytest.mark.parametrize("policy", LAYOUTS)
def test_columns_count_padding_which_positions_leave_out(model: Any, policy: str) -> None:
    text, more = distinct_tokens(2, 12), distinct_tokens(2, 4, seed=3)
    real = torch.ones(2, 12).long()
    real[0, :5] = 0
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 1, 4, 16, generator=generator) < 0.6
    mask = mask | torch.eye(4, 16).roll(12, dims=1).bool()
    mask[0, :, :, :5] = False
    places = (real.cumsum(dim=1) - 1).clamp(min=0)
    where = real.sum(dim=1, keepdim=True) + torch.arange(4)
    logits = []
    for cache in (DynamicCache(), _cache(policy)):
        _call(model, cache, text, real, position_ids=places)
        logits.append(_call(model, cache, more, mask, position_ids=where))
    _assert_close(logits[1], logits[0])


@pytest.mark.parametrize("name", ["Gemma 3", "Mistral"])
def test_a_window_is_counted_in_tokens_in_a_further_prompt(name: str) -> None:
    """Compared with one call; the second row ends its answer before its next prompt begins."""
    (family,) = (family for family in FAMILIES if family.name == name)
    model, ids = family.make(), distinct_tokens(2, 50) % 150 + 1
    real = torch.ones(2, 50).bool()
    real[1, :4] = real[1, 28:33] = False
    cache = CompressedCache("h2o", 64)
    logits = torch.cat(_turns(model, cache, ids, real, [25, 25]), dim=1)
    for row in range(2):
        expected = model(ids[row, real[row]][None], use_cache=False).logits[0]
        _assert_close(logits[row, real[row]], expected)


# Biases.


@pytest.mark.parametrize("hidden", [torch.finfo(torch.float64).min, -torch.inf])
@pytest.mark.parametrize("policy", LAYOUTS)
def test_a_finite_bias_is_no_padding(model: Any, policy: str, hidden: float) -> None:
    text = distinct_tokens(2, 20)
    mask = _additive(torch.ones(20, 20).tril().bool(), hidden)
    mask[:, :5] += 0.5
    mask[:, 7] -= 1e4
    steps = distinct_tokens(2, 1, seed=1), distinct_tokens(2, 3, seed=2)
    logits = []
    for cache in (DynamicCache(), _cache(policy)):
        parts = [_call(model, cache, text, mask[None, None])]
        parts += [_call(model, cache, more) for more in steps]
        logits.append(torch.cat(parts, dim=1))
        if isinstance(cache, CompressedCache):
            assert (cache.layers[0].store.next_position == 24).all()
    _assert_close(logits[1], logits[0])


def test_policies_are_shown_the_attention_that_took_place(model: Any) -> None:
    """A bias that takes all attention away from a token makes it the first to go."""
    text = distinct_tokens(1, 20)
    mask = _additive(torch.ones(20, 20).tril().bool())
    mask[3:, 3] = -1e3
    cache = CompressedCache("h2o", 19, recent=1)
    _call(model, cache, text, mask[None, None])
    for layer in range(2):
        assert held(cache, layer) == [[p for p in range(20) if p != 3]] * 2


# Refused.


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("columns", [2, 12, 14, 17])
def test_a_mask_of_another_text_is_refused(model: Any, columns: int, tokens: int) -> None:
    cache = _cache("h2o")
    _call(model, cache, distinct_tokens(1, 12))
    more = distinct_tokens(1, tokens, seed=1)
    mask = torch.ones(1, 1, tokens, columns).bool()
    with pytest.raises(ValueError, match=f"must have {12 + tokens} columns"):
        _call(model, cache, more, mask)
    if columns < 12 + tokens:
        cache = _cache("h2o")
        _call(model, cache, distinct_tokens(1, 12))
        with pytest.raises(ValueError, match="must cover the 12 tokens the cache has seen"):
            _call(model, cache, more, torch.ones(1, columns).long())


def test_a_mask_of_whole_numbers_is_refused(model: Any) -> None:
    cache = _cache("h2o")
    _call(model, cache, distinct_tokens(1, 12))
    with pytest.raises(TypeError, match=r"bool or float, got torch\.int64"):
        _call(model, cache, distinct_tokens(1, 3), torch.ones(1, 1, 3, 15).long())


# Rows that end early.


def _turns(
    model: Any, cache: CompressedCache, ids: Tensor, real: Tensor, calls: list[int]
) -> list[Tensor]:
    """Logits of each call, all of whose tokens are read with a mask of the text so far."""
    found, start = [], 0
    for new in calls:
        here = slice(start, start + new)
        mask = real[:, : start + new].long()
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, here]
        found.append(_call(model, cache, ids[:, here], mask, position_ids=places))
        start += new
    return found


CALLS = [24, *[1] * 12, 9, *[1] * 10, 5]
ENDED = [[6, 4], [12, 10], [1, 9], [11, 10]]
"""Of each row, how many tokens both answers have."""
LAYOUTS_OF_ROWS = ("snapkv+adakv", "snapkv+simlayerkv", "h2o+merging", "rpc+growing")
POLICIES_OF_ROWS = (*SLOT_POLICIES, *LAYOUTS_OF_ROWS)


def _conversation() -> tuple[Tensor, Tensor]:
    """Rows with left padding, answers padded after their ends, and a second prompt padded too,
    which the last row does not have at all."""
    ids, real = distinct_tokens(4, sum(CALLS)), torch.ones(4, sum(CALLS)).bool()
    for row, (first, second) in enumerate(ENDED):
        real[row, : 5 * row] = False
        real[row, 24 + first : 36] = False
        real[row, 36 : 36 + 3 * row] = False
        real[row, 45 + second : 55] = False
    return ids, real


def _options(policy: str, interval: int) -> tuple[str, dict[str, Any]]:
    # Windows that are full after a few steps.
    options: dict[str, Any] = dict(budget=16, interval=interval, sinks=1, recent=6)
    options |= OPTIONS.get(policy, {})
    if policy == "rpc+growing":
        return "rpc", dict(options, window=4, compression=2.0, protect_prompt=False)
    return policy, dict(options, protect_prompt=False)


@pytest.mark.parametrize("interval", slow_but((4,), (1, 4)))
@pytest.mark.parametrize("policy", slow_but((*QUICK, *LAYOUTS_OF_ROWS), POLICIES_OF_ROWS))
def test_rows_that_end_early_are_what_they_are_alone(
    model: Any, policy: str, interval: int
) -> None:
    ids, real = _conversation()
    name, options = _options(policy, interval)
    batch = CompressedCache(name, **options)
    together = _turns(model, batch, ids, real, CALLS)
    # A prompt begins an interval for all rows, also for the one that has none.
    misses_none = interval > 1
    for row in range(len(ENDED) - misses_none):
        alone = CompressedCache(name, **options)
        own, calls, compared = real[row], [], []
        start = 0
        for number, new in enumerate(CALLS):
            tokens = int(own[start : start + new].sum())
            if tokens:
                calls.append(tokens)
                compared.append(number)
            start += new
        text = ids[row, own][None]
        expected = _turns(model, alone, text, torch.ones_like(text).bool(), calls)
        for number, logits in zip(compared, expected, strict=True):
            # A second prompt ends where its padding, which is on the left, does not matter.
            _assert_close(together[number][row, -1], logits[0, -1])
        for layer in range(2):
            assert held(batch, layer, row) == held(alone, layer)


def test_padding_steps_that_were_read_as_text_are_dropped(model: Any) -> None:
    """Plain ``generate`` pads rows that have ended without a word."""
    ids, real = _conversation()
    for policy in SLOT_POLICIES:
        if policy == "pyramidkv":
            # Gives its last layer less than this text.
            continue
        batch = CompressedCache(policy, 80, protect_prompt=False)
        seen = real.clone()
        seen[:, 24:36] = True
        _turns(model, batch, ids, seen, CALLS[:13])
        mask = real[:, :45].long()
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, 36:]
        logits = _call(model, batch, ids[:, 36:45], mask, position_ids=places)
        for row in range(3):
            alone = CompressedCache(policy, 80, protect_prompt=False)
            text = ids[row, :45][real[row, :45]][None]
            expected = _call(model, alone, text)
            _assert_close(logits[row, -1], expected[0, -1])
            assert held(batch, 1, row) == held(alone, 1)
            assert int(batch.layers[0].store.next_position[row]) == text.shape[1]


class _Waits(TorchDispatchMode):
    """Counts what would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_prompt_is_waited_for_as_often_with_more_layers(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    ids = distinct_tokens(2, 20)
    ids[0, :7] = 0
    counts = []
    for layers in (2, 5):
        model = make_model(num_hidden_layers=layers)
        with _Waits() as waits, torch.no_grad():
            _call(model, CompressedCache("snapkv", 16), ids, (ids != 0).long())
        counts.append(waits.count)
    assert 0 < counts[0] == counts[1]


def test_padding_of_a_prompt_that_failed_is_forgotten(model: Any) -> None:
    ids = distinct_tokens(1, 12)
    cache, masks = CompressedCache("full", 16), torch.ones(2, 1, 12, dtype=torch.int64)
    masks[0, :, :5] = 0

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressed_cache.layer.read_call", fail)
        with pytest.raises(RuntimeError, match="memory"):
            _call(model, cache, ids, masks[0])
    _call(model, cache, ids, masks[1])
    assert cache.columns.known is not None and bool(cache.columns.known.all())
