"""SimLayerKV: which layers are lazy, what they keep, and what that leaves of the memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache
from tests.compiling import CountingBackend, compiled
from tests.reference.comparison import (
    NUM_STEPS,
    assert_same_kept,
    assert_same_logits,
    distinct_tokens,
    make_model,
    run_library,
)
from tests.reference.llama import ReferenceLlama
from tests.reference.policies import Rules, View, snapkv

BUDGET = 20
# Half the budget, of which as large a part is sinks as the options have.
FEW, SINKS = 10, 2
OPTIONS: dict[str, Any] = {
    "lazy_queries": 5,
    "lazy_sinks": 8,
    "lazy_recent": 32,
    "window": 6,
    "kernel_size": 3,
}
LENGTH = 34


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model(torch.float64, num_layers=3)


def _laziness(model: LlamaForCausalLM, text: list[int]) -> list[float]:
    """Of each layer, the share of attention on the first and last tokens, counted one by one."""
    eager = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model(torch.tensor([text]), output_attentions=True).attentions
    model.set_attn_implementation(eager)
    shares = []
    for weights in layers:
        mass = [
            float(head[query, key])
            for head in weights[0]
            for query in range(len(text) - OPTIONS["lazy_queries"], len(text))
            for key in range(len(text))
            if key < SINKS or key >= len(text) - (FEW - SINKS)
        ]
        shares.append(sum(mass) / (len(weights[0]) * OPTIONS["lazy_queries"]))
    return shares


def _between(values: list[float]) -> float:
    """A threshold that the larger half passes."""
    ordered = sorted(values)
    return (ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2


@pytest.mark.parametrize("interval", [1, 3])
def test_lazy_layers_keep_first_and_last_tokens_and_the_others_what_the_scorer_says(
    model: LlamaForCausalLM, interval: int
) -> None:
    text = distinct_tokens(LENGTH + NUM_STEPS, seed=1)
    prompt, rest = text[:LENGTH], text[LENGTH:]
    shares = _laziness(model, prompt)
    threshold = (sorted(shares)[1] + sorted(shares)[2]) / 2
    is_lazy = [share > threshold for share in shares]
    assert sorted(is_lazy) == [False, False, True]

    def score(view: View) -> list[float]:
        if not is_lazy[view.layer]:
            return snapkv(view, window=6, kernel_size=3)
        return [1e9 if t.position < SINKS else t.position for t in view.held]

    _, watch = run_library(
        model,
        [prompt],
        NUM_STEPS,
        name="snapkv+simlayerkv",
        rules=Rules(BUDGET, interval, recent=3),
        forced=[rest],
        options=OPTIONS | {"lazy_threshold": threshold},
    )
    budgets = tuple(FEW if lazy else BUDGET for lazy in is_lazy)
    trace = ReferenceLlama(model).generate(
        prompt,
        NUM_STEPS,
        score=score,
        rules=Rules(budgets, interval, recent=3),
        forced=rest,
    )
    assert_same_kept(trace, watch, 0)
    assert_same_logits(trace, watch, 0, 1e-4)
    # The memory of the others is freed.
    assert [layer.keys.shape[2] for layer in watch.cache.layers] == list(budgets)


def test_a_layer_is_lazy_from_its_share_of_the_attention_on(model: LlamaForCausalLM) -> None:
    text = distinct_tokens(LENGTH, seed=1)
    for layer, share in enumerate(_laziness(model, text)):
        for threshold, slots in ((share - 1e-5, FEW), (share + 1e-5, BUDGET)):
            options = OPTIONS | {"lazy_threshold": threshold}
            cache = CompressedCache("snapkv+simlayerkv", BUDGET, recent=3, **options)
            with torch.no_grad():
                model(torch.tensor([text]), past_key_values=cache)
            assert cache.layers[layer].keys.shape[2] == slots


def test_each_row_of_a_batch_is_judged_for_itself(model: LlamaForCausalLM) -> None:
    texts = [distinct_tokens(length + NUM_STEPS, seed=length) for length in (34, 27, 41, 9)]
    prompts = [text[:-NUM_STEPS] for text in texts]
    forced = [text[-NUM_STEPS:] for text in texts]
    shares = [_laziness(model, prompt) for prompt in prompts[:3]]
    options = OPTIONS | {"lazy_threshold": _between([rows[0] for rows in shares])}
    rules = Rules(BUDGET, interval=3, recent=3)

    def run(rows: list[int]) -> Any:
        chosen = [prompts[row] for row in rows], [forced[row] for row in rows]
        return run_library(
            model,
            chosen[0],
            NUM_STEPS,
            name="snapkv+simlayerkv",
            rules=rules,
            forced=chosen[1],
            options=options,
        )[1]

    together, sizes = run([0, 1, 2, 3]), []
    for row in range(4):
        alone = run([row])
        sizes.append(alone.cache.layers[0].keys.shape[2])
        for step in range(NUM_STEPS):
            assert together.kept(step, row) == alone.kept(step, 0)
    # The last prompt is too short to tell, and asks for all slots as one that is not lazy.
    assert set(sizes[:3]) == {FEW, BUDGET}
    assert sizes[3] == BUDGET


@pytest.mark.parametrize(
    ("threshold", "twin"),
    [(1.0, ("snapkv", BUDGET)), (0.0, ("streaming_llm", FEW))],
)
def test_never_lazy_is_the_scorer_and_always_lazy_is_streaming(
    model: LlamaForCausalLM, threshold: float, twin: tuple[str, int]
) -> None:
    ids = torch.tensor([distinct_tokens(LENGTH, seed=seed) for seed in (1, 2)])
    policy, budget = twin
    own = {"window": 6, "kernel_size": 3} if policy == "snapkv" else {}
    sinks = 0 if policy == "snapkv" else SINKS
    other = CompressedCache(policy, budget, interval=2, sinks=sinks, recent=3, **own)
    lazy = CompressedCache(
        "snapkv+simlayerkv", BUDGET, interval=2, recent=3, lazy_threshold=threshold, **OPTIONS
    )
    assert torch.equal(_generate(model, ids, lazy), _generate(model, ids, other))
    assert [x.positions.tolist() for x in lazy.layers] == [
        x.positions.tolist() for x in other.layers
    ]


def test_a_protected_prompt_stays_in_lazy_layers_too(model: LlamaForCausalLM) -> None:
    ids = torch.tensor([distinct_tokens(16, seed=1)])
    cache = CompressedCache(
        "snapkv+simlayerkv", 24, recent=3, protect_prompt=True, lazy_threshold=0.0, **OPTIONS
    )
    _generate(model, ids, cache)
    for layer in cache.layers:
        assert layer.keys.shape[2] == 16 + 3 + 1
        for head in layer.positions[0]:
            assert set(range(16)) <= set(head.tolist())


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize(
    ("policy", "options", "first", "last"),
    [
        ("knorm", {}, 4, 16),
        # What is given holds, the newest token comes on top.
        ("knorm", {"recent": 24}, 4, 25),
        ("knorm", {"sinks": 16, "recent": 10}, 16, 11),
        ("h2o", {"recent": 10, "lazy_sinks": 16, "lazy_recent": 48}, 8, 24),
        # A default of recent, 32 here, yields.
        ("h2o", {}, 4, 16),
        ("h2o", {"protect_prompt": True}, 40, 1),
        ("h2o", {"protect_prompt": True, "recent": 8}, 40, 9),
    ],
)
def test_lazy_layers_hold_first_and_last_tokens_and_what_is_protected(
    model: LlamaForCausalLM,
    policy: str,
    options: dict[str, Any],
    first: int,
    last: int,
    interval: int,
) -> None:
    lazy: dict[str, Any] = {"lazy_threshold": 0.0, "lazy_sinks": 4, "lazy_recent": 16}
    cache = CompressedCache(f"{policy}+simlayerkv", 64, interval=interval, **(lazy | options))
    text = torch.tensor([distinct_tokens(100, seed=1)])
    with torch.no_grad():
        model(text[:, :40], past_key_values=cache)
        for token in range(40, 100):
            model(text[:, token : token + 1], past_key_values=cache)
    for layer in cache.layers:
        for head in layer.held().positions[0]:
            assert sorted(head.tolist()) == [*range(first), *range(100 - last, 100)]


def test_turns_rows_files_and_snapshots_keep_closed_slots_closed(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    texts = [distinct_tokens(LENGTH, seed=seed) for seed in (1, 2, 3)]
    shares = [_laziness(model, text)[0] for text in texts]
    threshold = (sorted(shares)[0] + sorted(shares)[1]) / 2
    lazy = [row for row in range(3) if shares[row] > threshold]
    assert len(lazy) == 2
    cache = CompressedCache(
        "h2o+simlayerkv",
        BUDGET,
        recent=3,
        lazy_threshold=threshold,
        **{name: value for name, value in OPTIONS.items() if name.startswith("lazy")},
    )
    with torch.no_grad():
        model(torch.tensor(texts), past_key_values=cache)
        held = cache.snapshot()
        more = torch.tensor([distinct_tokens(7, seed=9)] * 3)
        model(more, past_key_values=cache)
        assert _counts(cache, 0) == [FEW if row in lazy else BUDGET for row in range(3)]
        cache.restore(held)
        cache.save(tmp_path / "cache.safetensors")
        cache.batch_select_indices(torch.tensor([lazy[0], lazy[0]]))
        for token in more[0, :5]:
            model(token.expand(2, 1), past_key_values=cache)
        assert _counts(cache, 0) == [FEW, FEW]
        loaded = CompressedCache.load(tmp_path / "cache.safetensors")
        for token in more[0, :5]:
            model(token.expand(3, 1), past_key_values=loaded)
        assert _counts(loaded, 0) == [FEW if row in lazy else BUDGET for row in range(3)]
        row = loaded.layers[0].positions[lazy[0]]
        assert torch.equal(row.sort().values, cache.layers[0].positions[0].sort().values)
        cache.reset()
        model(torch.tensor(texts[:2]), past_key_values=cache)
        assert _counts(cache, 0) == [FEW if row in lazy else BUDGET for row in range(2)]


@pytest.fixture
def backend() -> Iterator[CountingBackend]:
    torch._dynamo.reset()
    yield CountingBackend()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("interval", "graphs"), [(1, 1), (4, 2)])
def test_it_compiles_once(backend: CountingBackend, interval: int, graphs: int) -> None:
    model = make_model(torch.float32)
    ids = torch.tensor([distinct_tokens(LENGTH, seed=seed) for seed in (1, 2, 3)])
    shares = [_laziness(model, row)[0] for row in ids.tolist()]
    options = OPTIONS | {"lazy_threshold": (min(shares) + max(shares)) / 2, "recent": 3}
    caches = [
        CompressedCache("snapkv+simlayerkv", BUDGET, interval=interval, **options) for _ in range(2)
    ]
    expected = _generate(model, ids, caches[0])
    got = _generate(model, ids, caches[1], compile_config=compiled(backend))
    assert torch.equal(got, expected)
    assert backend.graphs == graphs


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("h2o+simlayerkv", {"lazy_threshold": 1.5}, "lazy_threshold must be from 0 to 1, got 1.5"),
        ("h2o+simlayerkv", {"lazy_queries": 0}, "lazy_queries must be >= 1, got 0"),
        ("h2o+simlayerkv", {"lazy_sinks": -1}, "lazy_sinks must be >= 0, got -1"),
        ("h2o+simlayerkv", {"lazy_recent": 0}, "lazy_recent must be >= 1, got 0"),
        ("h2o+adakv+simlayerkv", {}, "cannot leave slots of 'h2o.adakv' empty"),
        ("rpc+simlayerkv", {"compression": 4.0}, "cannot leave slots of 'rpc' empty"),
        ("h2o+simlayerkv+chunk", {}, "Leave one of the two out"),
        ("h2o+simlayerkv", {"budget": [[20, 20], [20, 20]]}, "treats all heads of a layer alike"),
    ],
)
def test_what_makes_no_sense_is_refused(policy: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressedCache(policy, **({"budget": 64} | options))


def test_a_protected_prompt_in_chunks_is_refused(model: LlamaForCausalLM) -> None:
    ids = torch.tensor([distinct_tokens(30, seed=1)])
    cache = CompressedCache(
        "h2o+simlayerkv", 40, recent=3, protect_prompt=True, lazy_recent=8, lazy_threshold=0.0
    )
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(NotImplementedError, match="protect_prompt must be False"):
            model(ids[:, 20:], past_key_values=cache)


def _generate(model: Any, ids: Tensor, cache: CompressedCache, **more: Any) -> Tensor:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=30,
        do_sample=False,
        **more,
    )


def _counts(cache: CompressedCache, layer: int) -> list[int]:
    held = (cache.layers[layer].positions >= 0).sum(dim=2)
    assert (held == held[:, :1]).all()
    return held[:, 0].tolist()
