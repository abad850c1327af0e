"""One compiled graph per policy, two with an interval, none for anything that may change later."""

import logging
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch._C._dynamo import eval_frame
from torch._inductor import compile_fx
from torch._inductor.fx_passes import post_grad
from torch._inductor.utils import fresh_cache
from transformers import LlamaForCausalLM, StaticCache

from compressed_cache import POLICIES, CompressedCache, compile_layers_once
from compressed_cache.hf import announced_calls
from compressed_cache.policies import SLOT_POLICIES
from compressed_cache.versions import cache_argument
from tests.compiling import CountingBackend, compiled
from tests.conftest import distinct_tokens, held
from tests.families import FAMILIES
from tests.grids import alternating, slow_but
from tests.kinds import KINDS, SMALL


@pytest.fixture
def backend() -> Iterator[CountingBackend]:
    torch._dynamo.reset()
    yield CountingBackend()
    torch._dynamo.reset()


# Of these tests most of the time goes into tracing, which takes longer the more layers there are,
# and a step takes its time in every call.
NEW = 17


def _generate(model: LlamaForCausalLM, ids: torch.Tensor, cache: object, **more: object):
    return model.generate(ids, past_key_values=cache, max_new_tokens=NEW, do_sample=False, **more)


# What a policy computes is the same at any interval, and what an interval changes is the same for
# any policy but those that draw.
INTERVALS = {
    *alternating(SLOT_POLICIES, [(1, 1), (4, 2)]),
    *product(("full", "random", "h2o", "vase"), [(1, 1), (4, 2)]),
}


@pytest.mark.parametrize(
    ("policy", "steps"), slow_but([("h2o", (4, 2))], sorted(INTERVALS)), ids=str
)
def test_generate_compiles_once_and_never_again(
    make_model: Callable[..., LlamaForCausalLM],
    backend: CountingBackend,
    policy: str,
    steps: tuple[int, int],
) -> None:
    """Steps: the interval, and how many graphs it needs."""
    interval, graphs = steps
    # How layers differ is a matter of the kind.
    layers = 2 if policy in KINDS else 1
    model = make_model(num_hidden_layers=layers)
    options = dict(interval=interval, recent=8, protect_prompt=False) | SMALL.get(policy, {})
    cache = CompressedCache(policy, 16, **options)
    for prompt in (33, 12, 50):
        ids = distinct_tokens(2, prompt)
        eager = CompressedCache(policy, 16, **options)
        expected = _generate(model, ids, eager)
        for used in (cache, CompressedCache(policy, 16, **options)):
            got = _generate(model, ids, used, compile_config=compiled(backend))
            assert torch.equal(got, expected)
            assert backend.graphs == (graphs if policy != "full" else 1)
            assert not [name for name in backend.moving if "layers" in name]
            assert used.get_seq_length() == eager.get_seq_length() == prompt + NEW - 1
            for layer in range(layers):
                assert held(used, layer) == held(eager, layer)
        addresses = _addresses(cache)
        cache.reset()
        _generate(model, ids, cache)
        assert _addresses(cache) == addresses
        cache.reset()


def _addresses(cache: Any) -> list[int]:
    tensors = [tensor for layer in cache.layers for tensor in layer.tensors()]
    constants = [tensor for store in cache.stores() for tensor in store.bound.constants.values()]
    return [tensor.data_ptr() for tensor in tensors + constants]


def test_padding_needs_no_other_graph(
    make_model: Callable[..., LlamaForCausalLM], backend: CountingBackend
) -> None:
    model = make_model()
    ids = distinct_tokens(2, 30)
    padded = ids.clone()
    padded[0, :11] = 0
    for batch in (ids, padded):
        mask = (batch != 0).long()
        got = _generate(
            model,
            batch,
            CompressedCache("h2o", 16),
            attention_mask=mask,
            compile_config=compiled(backend),
        )
        expected = _generate(model, batch, CompressedCache("h2o", 16), attention_mask=mask)
        assert torch.equal(got, expected)
    assert backend.graphs == 1


@pytest.mark.slow
def test_another_batch_size_is_one_more_graph(
    make_model: Callable[..., LlamaForCausalLM], backend: CountingBackend
) -> None:
    model = make_model()
    for rows in (2, 3, 2):
        _generate(
            model,
            distinct_tokens(rows, 20),
            CompressedCache("tova", 16),
            compile_config=compiled(backend),
        )
    assert backend.graphs <= 2


@pytest.mark.slow
def test_full_compiles_once_more_each_time_it_doubles(
    make_model: Callable[..., LlamaForCausalLM], backend: CountingBackend
) -> None:
    model, ids = make_model(), distinct_tokens(1, 250)
    cache = CompressedCache("full", 16)
    got = _generate(model, ids, cache, compile_config=compiled(backend))
    assert torch.equal(got, _generate(model, ids, None))
    assert cache.layers[0].keys.shape[2] == 512
    assert backend.graphs == 2


@pytest.mark.slow
@pytest.mark.parametrize(("interval", "most"), [(1, 3), (4, 5)])
def test_a_model_compiled_by_hand_gives_the_same_positions(
    make_model: Callable[..., LlamaForCausalLM],
    backend: CountingBackend,
    interval: int,
    most: int,
) -> None:
    """Nobody ticks the clock between two steps here; a few more graphs, the same result."""
    model = make_model()
    step = torch.compile(model.forward, backend=backend, fullgraph=True)
    ids = distinct_tokens(1, 80)
    caches = [CompressedCache("h2o", 16, interval=interval) for _ in range(2)]
    for cache, forward in zip(caches, (step, model.forward), strict=True):
        model(ids[:, :20], past_key_values=cache)
        for token in range(20, 80):
            forward(
                ids[:, token : token + 1],
                past_key_values=cache,
                position_ids=torch.tensor([[token]]),
            )
    assert backend.graphs <= most
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 80
    for layer in range(2):
        assert held(caches[0], layer) == held(caches[1], layer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compressed", "static"])
def test_no_limit_is_hit_where_a_model_compiled_by_hand_reads_prompts(
    make_model: Callable[..., LlamaForCausalLM],
    backend: CountingBackend,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    """Not even with more layers than a frame may be recompiled; the static cache is a control."""
    model = make_model(num_hidden_layers=9)
    step = torch.compile(model.forward, backend=backend)

    def decode(forward: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
        cache: Any = (
            CompressedCache("h2o", 16)
            if kind == "compressed"
            else StaticCache(model.config, max_cache_len=64)
        )
        tokens = [ids]
        for _ in range(5):
            logits = forward(tokens[-1], **cache_argument(cache)).logits
            tokens.append(logits[:, -1:].argmax(dim=-1))
        return torch.cat(tokens, dim=1)

    counts = []
    monitor = logging.getLogger("torch._dynamo")
    monitor.addHandler(caplog.handler)
    try:
        with torch.no_grad():
            for prompt in (20, 20, 33, 24):
                ids = distinct_tokens(2, prompt)
                assert torch.equal(decode(step, ids), decode(model.forward, ids))
                counts.append(backend.graphs)
    finally:
        monitor.removeHandler(caplog.handler)
    assert not [text for text in caplog.messages if "recompile_limit" in text]
    # Only the second length makes other graphs, for prompts of any length.
    assert counts[0] == counts[1] <= 5
    assert counts[2] == counts[3] <= 7


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=2)
def test_steps_that_are_not_compiled_because_of_the_limit_are_told_of_once(
    make_model: Callable[..., LlamaForCausalLM], backend: CountingBackend
) -> None:
    announced_calls._warn_uncompiled.cache_clear()
    model, ids = make_model(), distinct_tokens(1, 30)

    def generate(policy: str, **more: object) -> torch.Tensor:
        return _generate(model, ids, CompressedCache(policy, 16, recent=8, interval=1), **more)

    def compile_step(policy: str) -> torch.Tensor:
        return generate(policy, compile_config=compiled(backend, fullgraph=False))

    for policy in ("h2o", "tova"):
        compile_step(policy)
    with pytest.warns(UserWarning, match=r"recompile_limit allows 2 of them.*reset\(\)") as caught:
        late = compile_step("knorm")
    assert [one.category for one in caught].count(UserWarning) == 1
    assert backend.graphs == 2
    # Neither again, nor of those that are compiled, nor where nothing is to be.
    assert torch.equal(late, compile_step("knorm"))
    compile_step("h2o")
    assert torch.equal(late, generate("knorm"))
    torch._dynamo.reset()
    assert torch.equal(late, compile_step("knorm"))
    assert backend.graphs == 3


def test_what_is_not_to_be_compiled_is_no_cause_for_a_warning(
    make_model: Callable[..., LlamaForCausalLM], backend: CountingBackend
) -> None:
    announced_calls._warn_uncompiled.cache_clear()
    model, ids = make_model(), distinct_tokens(1, 30)
    _generate(model, ids, CompressedCache("h2o", 16))
    for chunk in (None, 10, 29):
        options = dict(prefill_chunk_size=chunk, compile_config=compiled(backend, fullgraph=False))
        _generate(model, ids, CompressedCache("h2o", 16), **options)


def test_a_prompt_compiled_as_one_graph_is_refused_in_words_that_help(
    make_model: Callable[..., LlamaForCausalLM], backend: CountingBackend
) -> None:
    model, ids, cache = make_model(), distinct_tokens(1, 30), CompressedCache("h2o", 16)
    step: Any = torch.compile(model.forward, backend=backend, fullgraph=True)
    with pytest.raises(RuntimeError, match="fullgraph=False"):
        step(ids, **cache_argument(cache))


@pytest.mark.slow
def test_chunks_are_read_eagerly_and_steps_after_them_are_compiled(
    make_model: Callable[..., LlamaForCausalLM],
    backend: CountingBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also those of later calls without chunks; a call is counted where it is not compiled."""
    model, ids, eager = make_model(), distinct_tokens(1, 31), list[int]()
    tell_call = CompressedCache.tell_call

    def count(self: CompressedCache, tokens: int) -> None:
        # Nor may the compiler see it and then give it up.
        assert eval_frame.get_eval_frame_callback() is None
        eager.append(tokens)
        tell_call(self, tokens)

    monkeypatch.setattr(CompressedCache, "tell_call", count)
    for chunk in (10, None, 10):
        config = compiled(backend)
        options = dict(prefill_chunk_size=chunk, compile_config=config)
        got = _generate(model, ids, CompressedCache("h2o", 16, protect_prompt=False), **options)
        assert eager == ([31] if chunk is None else [10, 10, 10, 1])
        assert backend.graphs == 1
        eager.clear()
        expected = _generate(
            model, ids, CompressedCache("h2o", 16, protect_prompt=False), prefill_chunk_size=chunk
        )
        assert torch.equal(got, expected)
        eager.clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        # One of each kind: what a layer holds, what it is shown, and constants of its own.
        *product(("full", "tova", "gkv", "vase", "triattention", "rkv_lsh", "rpc"), [(1, 1)]),
        *product(("h2o", "snapkv", "random"), [(4, 2)]),
    ],
    ids=str,
)
def test_one_layer_is_compiled_for_all(
    make_model: Callable[..., LlamaForCausalLM],
    backend: CountingBackend,
    policy: str,
    steps: tuple[int, int],
) -> None:
    interval, graphs = steps
    model, ids = make_model(num_hidden_layers=3), distinct_tokens(2, 33)

    def generate(**more: object) -> tuple[torch.Tensor, list[list[list[int]]]]:
        cache = CompressedCache(policy, 16, interval=interval, recent=8, protect_prompt=False)
        return _generate(model, ids, cache, **more), [held(cache, layer) for layer in range(3)]

    expected_tokens, expected_positions = generate()
    for _ in range(2):
        compile_layers_once(model)
        for more in ({}, {"compile_config": compiled(backend)}):
            tokens, positions = generate(**more)
            assert torch.equal(tokens, expected_tokens)
            assert positions == expected_positions
        assert backend.graphs == (graphs if policy != "full" else 1)
        # Each layer draws other numbers or has another number of slots, so for each there is other
        # code.
        draws = (
            policy in ("random", "random_prompt", "vase", "vase_dkv", "curdkv") and interval == 1
        )
        differs = draws or hasattr(POLICIES[policy], "budgets")
        assert len(backend.regions) == (0 if differs else 3)
        assert len(set(backend.regions)) <= 1


@pytest.mark.slow
def test_the_layer_whose_count_is_read_in_the_graph_stays_in_the_graph(
    make_model: Callable[..., LlamaForCausalLM], backend: CountingBackend
) -> None:
    """Inductor does not know what a region writes, so nothing outside may read it."""
    model, ids = make_model(num_hidden_layers=3), distinct_tokens(1, 30)
    compile_layers_once(model)
    step = torch.compile(model.forward, backend=backend, fullgraph=True)
    caches = [CompressedCache("h2o", 16) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :20], past_key_values=cache)
        for token in range(20, 30):
            outputs = [
                forward(ids[:, token : token + 1], past_key_values=cache).logits
                for forward, cache in zip((step, model.forward), caches, strict=True)
            ]
            assert torch.equal(*outputs)
    assert len(backend.regions) == 2


def test_other_caches_are_compiled_as_before(
    make_model: Callable[..., LlamaForCausalLM], backend: CountingBackend
) -> None:
    model = make_model()
    compile_layers_once(model)
    cache = StaticCache(model.config, max_cache_len=64)
    _generate(model, distinct_tokens(1, 30), cache, compile_config=compiled(backend))
    assert backend.graphs == 1
    assert backend.regions == []


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="decoder layers made by transformers, got Linear"):
        compile_layers_once(torch.nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "once"), [("rkv", False), ("h2o", True)], ids=["every layer", "one layer"]
)
def test_inductor_gives_the_tokens_of_eager(
    make_model: Callable[..., LlamaForCausalLM], policy: str, once: bool
) -> None:
    torch._dynamo.reset()
    # Each kernel is compiled by itself: as few layers and graphs as will do.
    layers, interval = (2, 2) if once else (1, 1)
    model, ids = make_model(num_hidden_layers=layers), distinct_tokens(2, 30)
    if once:
        compile_layers_once(model)
    ids[0, :7] = 0
    mask = (ids != 0).long()
    caches = [
        CompressedCache(policy, 16, interval=interval, protect_prompt=False) for _ in range(2)
    ]
    expected = _generate(model, ids, caches[0], attention_mask=mask)
    got = _generate(model, ids, caches[1], attention_mask=mask, compile_config=compiled("inductor"))
    assert torch.equal(got, expected)
    for layer in range(layers):
        for row in range(2):
            assert held(caches[1], layer, row) == held(caches[0], layer, row)
    torch._dynamo.reset()


class _Seen(Exception):
    """Ends a compilation of which enough is known."""


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "snapkv+adakv"])
def test_inductor_copies_no_memory_to_write_a_token(
    make_model: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """In a step that does not rank. What changes as a whole is written as a whole."""
    torch._dynamo.reset()
    copied: list[int] = []
    reinplace = post_grad.reinplace_inplaceable_ops

    def watch(*args: Any) -> None:
        reinplace(*args)
        copies = args[-1].find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
        copied.extend(copy.args[0].meta["val"].numel() for copy in copies)
        raise _Seen

    monkeypatch.setattr(post_grad, "reinplace_inplaceable_ops", watch)
    model, ids = make_model(num_hidden_layers=1), distinct_tokens(1, 30)
    options = {} if policy == "full" else dict(recent=8, protect_prompt=False)
    cache = CompressedCache(policy, 20, interval=4, **options)
    step = torch.compile(model.forward, fullgraph=True)
    with torch.no_grad(), fresh_cache():
        for part, forward in ((ids[:, :28], model), (ids[:, 28:29], model)):
            forward(part, **cache_argument(cache))
        with pytest.raises(Exception, match="_Seen"):
            step(ids[:, 29:], **cache_argument(cache))
    store = cache.layers[0].store
    changes = [store.counts]
    if store.bound.observer is not None:
        changes.append(store.tokens.attention_state)
    assert sorted(copied) == sorted(tensor.numel() for tensor in changes)
    torch._dynamo.reset()


@pytest.mark.slow
def test_inductor_reads_the_count_before_a_region_writes_it() -> None:
    """Compiled by hand, the two rotations of Gemma 3 are made of the count: one late in use."""
    (family,) = (family for family in FAMILIES if family.name == "Gemma 3")
    torch._dynamo.reset()
    model, ids = family.make(repeats=2), torch.arange(1, 25)[None]
    compile_layers_once(model)
    step = torch.compile(model.forward, fullgraph=True)
    caches = [CompressedCache("h2o", 12) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :20], **cache_argument(cache))
        for token in range(20, 24):
            outputs = [
                forward(ids[:, token : token + 1], **cache_argument(cache)).logits
                for forward, cache in zip((step, model.forward), caches, strict=True)
            ]
            torch.testing.assert_close(*outputs, rtol=0, atol=1e-4)
    torch._dynamo.reset()


def test_what_inductor_says_of_precision_on_cuda_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    compile_fx._warn_tf32_disabled.__wrapped__()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", SLOT_POLICIES)
def test_generate_replays_cuda_graphs(
    make_model: Callable[..., LlamaForCausalLM], policy: str
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, ids = make_model().cuda(), distinct_tokens(2, 30).cuda()
    options = dict(recent=8, protect_prompt=False) | SMALL.get(policy, {})
    expected = _generate(model, ids, CompressedCache(policy, 16, **options), disable_compile=True)
    for _ in range(2):
        got = _generate(model, ids, CompressedCache(policy, 16, **options))
        assert torch.equal(got, expected)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    torch._dynamo.reset()
