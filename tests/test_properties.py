"""What must hold for every policy, budget, length, padding and seed."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from compressed_cache import POLICIES, CompressedCache
from compressed_cache.policies import SLOT_POLICIES, make_policy, option_names
from compressed_cache.policies.capabilities import needs_of
from tests.compiling import CountingBackend, compiled
from tests.conftest import distinct_tokens, held
from tests.grids import slow_but
from tests.kinds import SMALL

NEW = 14


def every(max_examples: int) -> settings:
    """So many cases, the same at every run: a failure must not depend on when it is looked for."""
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@pytest.fixture(scope="module")
def model(make_model: Callable[..., LlamaForCausalLM]) -> Any:
    return make_model().double()


@st.composite
def caches(draw: st.DrawFn) -> Callable[[], CompressedCache]:
    """A way to make equal caches."""
    policy = draw(st.sampled_from(SLOT_POLICIES))
    sinks, recent = draw(st.integers(0, 3)), draw(st.integers(0, 6))
    options = {"window": draw(st.integers(1, 5))} if "window" in option_names(policy) else {}
    recent = max(recent, needs_of(make_policy(policy, **options)).recent)
    rules = dict(
        budget=sinks + recent + draw(st.integers(1, 30)),
        interval=draw(st.integers(1, 9)),
        sinks=sinks,
        recent=recent,
        protect_prompt=False,
    )
    return lambda: CompressedCache(policy, **rules, **options)


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4)
seeds = st.integers(0, 1000)


def _padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    return ids, (ids != 0).long()


def _texts(lengths: list[int], seed: int) -> list[torch.Tensor]:
    return [distinct_tokens(1, n, seed=seed + row)[0] for row, n in enumerate(lengths)]


def _generate(model: Any, cache: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    more = {"max_new_tokens": NEW, "do_sample": False, **more}
    return model.generate(ids, past_key_values=cache, **more)


def _held(cache: CompressedCache, row: int = 0) -> list[Any]:
    return [held(cache, layer, row) for layer in range(2)]


@pytest.mark.slow
@every(60)
@given(make=caches(), lengths=lengths, seed=seeds)
def test_a_padded_row_is_what_it_is_alone(
    model: Any, make: Callable[[], CompressedCache], lengths: list[int], seed: int
) -> None:
    rows = _texts(lengths, seed)
    ids, mask = _padded(rows)
    batch = make()
    together = _generate(model, batch, ids, attention_mask=mask)
    for number, row in enumerate(rows):
        alone = make()
        expected = _generate(model, alone, row[None])
        assert torch.equal(together[number, -NEW:], expected[0, -NEW:])
        assert _held(batch, number) == _held(alone)


@pytest.mark.slow
@every(40)
@given(make=caches(), lengths=lengths, again=lengths, seed=seeds)
def test_reset_is_as_good_as_new(
    model: Any,
    make: Callable[[], CompressedCache],
    lengths: list[int],
    again: list[int],
    seed: int,
) -> None:
    used = make()
    for which in (lengths, again):
        ids, mask = _padded(_texts(which, seed))
        used.reset()
        fresh = make()
        got = _generate(model, used, ids, attention_mask=mask)
        assert torch.equal(got, _generate(model, fresh, ids, attention_mask=mask))
        assert _held(used) == _held(fresh)


@pytest.mark.slow
@every(40)
@given(make=caches(), lengths=lengths, seed=seeds, more=st.integers(0, 20))
def test_a_chunk_as_long_as_the_prompt_changes_nothing(
    model: Any, make: Callable[[], CompressedCache], lengths: list[int], seed: int, more: int
) -> None:
    ids, mask = _padded(_texts(lengths, seed))
    whole, chunked = make(), make()
    expected = _generate(model, whole, ids, attention_mask=mask)
    chunk = ids.shape[1] + more
    got = _generate(model, chunked, ids, attention_mask=mask, prefill_chunk_size=chunk)
    assert torch.equal(got, expected)
    assert _held(whole) == _held(chunked)


@every(40)
@given(make=caches(), length=st.integers(2, 60), chunk=st.integers(1, 20), seed=seeds)
def test_the_budget_holds_and_protected_tokens_stay(
    model: Any, make: Callable[[], CompressedCache], length: int, chunk: int, seed: int
) -> None:
    cache = make()
    ids = distinct_tokens(1, length, seed=seed)
    _generate(model, cache, ids, prefill_chunk_size=chunk)
    seen, rules = length + NEW - 1, cache.rules
    budgets = [layer.store.bound.budget for layer in cache.layers]
    held = zip(budgets, _held(cache), strict=True)
    for budget, head in ((budget, head) for budget, heads in held for head in heads):
        assert len(head) == len(set(head))
        if cache.policy.evicts:
            assert len(head) == min(seen, budget)
            assert set(head) >= set(range(min(rules.sinks, seen)))
        assert set(head) >= set(range(max(0, seen - 1 - rules.recent), seen))


@pytest.mark.slow
@every(8)
@given(make=caches(), lengths=lengths, seed=seeds)
def test_compiled_is_eager(
    model: Any, make: Callable[[], CompressedCache], lengths: list[int], seed: int
) -> None:
    torch._dynamo.reset()
    backend = CountingBackend()
    ids, mask = _padded(_texts(lengths, seed))
    eager, other = make(), make()
    expected = _generate(model, eager, ids, attention_mask=mask)
    config = compiled(backend)
    got = _generate(model, other, ids, attention_mask=mask, compile_config=config)
    assert torch.equal(got, expected)
    assert _held(eager) == _held(other)
    assert backend.graphs <= (1 if eager.rules.interval == 1 else 2)
    torch._dynamo.reset()


@pytest.mark.slow
def test_two_threads_with_two_models_do_not_mix(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    models = [make_model(), make_model(num_hidden_layers=3)]
    policies = [name for name in POLICIES if name != "kvzip"]
    work = [
        (models[turn % 2], policies[turn % len(policies)], turn)
        for turn in range(2 * len(policies))
    ]

    def run(model: Any, policy: str, seed: int) -> torch.Tensor:
        ids = distinct_tokens(2, 30, seed=seed)
        cache = CompressedCache(policy, 16, protect_prompt=False, **SMALL.get(policy, {}))
        return _generate(model, cache, ids)

    expected = [run(*job) for job in work]
    got: dict[int, torch.Tensor] = {}

    def take(which: int) -> None:
        for number in range(which, len(work), 2):
            got[number] = run(*work[number])

    threads = [threading.Thread(target=take, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[number], text) for number, text in enumerate(expected))


@pytest.mark.parametrize(
    ("policy", "broken", "interval"),
    slow_but(
        ("keydiff", "h2o", "rkv"),
        (
            (policy, broken, (1, 4)[(number + own) % 2])
            for number, policy in enumerate(name for name in SLOT_POLICIES if name != "full")
            for own, broken in enumerate(("k_proj", "q_proj", "v_proj"))
        ),
    ),
)
def test_what_is_not_a_number_harms_neither_other_rows_nor_what_is_protected(
    model: Any, policy: str, broken: str, interval: int
) -> None:
    """One token of the first row goes wrong in the first layer."""
    options = dict(sinks=2, recent=8, interval=interval) | SMALL.get(policy, {})
    ids = distinct_tokens(2, 80)
    caches = [CompressedCache(policy, 24, **options, protect_prompt=False) for _ in range(2)]

    def poison(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output[0] = torch.nan
        return output

    with torch.no_grad():
        for cache, wrong in zip(caches, (False, True), strict=True):
            model(ids[:, :30], past_key_values=cache)
            for token in range(30, 80):
                if token == 40 and wrong:
                    projection = getattr(model.model.layers[0].self_attn, broken)
                    handle = projection.register_forward_hook(poison)
                    model(ids[:, token : token + 1], past_key_values=cache)
                    handle.remove()
                else:
                    model(ids[:, token : token + 1], past_key_values=cache)
    good, bad = caches
    # What a policy remembers of the other tokens is not lost.
    assert bad.layers[0].store.tokens.attention_state.isfinite().all()
    assert _held(good, 1) == _held(bad, 1)
    for head in held(bad, 0, 0):
        assert len(head) == len(set(head)) == bad.layers[0].store.bound.budget
        assert {0, 1, *range(71, 80)} <= set(head)
    if broken == "k_proj" and policy in ("knorm", "keydiff", "rkv", "rkv_lsh", "gkv"):
        # The broken key is the first to go once it is not protected any more.
        assert all(40 not in head for head in held(bad, 0, 0))
