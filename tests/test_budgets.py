"""Budgets that differ from layer to layer and from head to head."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, LlamaConfig, LlamaForCausalLM

from compressed_cache import CompressedCache
from compressed_cache.integrations.harness.arguments import take_press
from compressed_cache.policies import Policy
from compressed_cache.policies import statistics_file as files
from compressed_cache.policies.budgets import is_per_head
from compressed_cache.policies.capabilities import Protected
from compressed_cache.policies.methods.adakv import AdaKV
from compressed_cache.policies.methods.criticalkv import CriticalKV
from compressed_cache.policies.methods.duo_attention import DuoAttention
from compressed_cache.policies.methods.h2o import H2O
from compressed_cache.policies.methods.pyramidkv import PyramidKV
from compressed_cache.policies.methods.shadowkv import ShadowKV
from compressed_cache.policies.view import Slots
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.versions import cache_argument
from tests.compiling import CountingBackend, compiled
from tests.grids import alternating, pairwise, slow_but
from tests.reference.comparison import NUM_STEPS, OPTIONS, assert_agree, distinct_tokens, make_model
from tests.reference.llama import ReferenceLlama
from tests.reference.policies import POLICIES, Rules, Score, View, critical_adakv, snapkv

LENGTHS = [21, 12, 5]
TEXTS = [distinct_tokens(length + NUM_STEPS, seed=20 + length) for length in LENGTHS]


def pyramid(budget: int, num_layers: int, protected: int, beta: int) -> list[int]:
    """Budgets on a falling line; what rounding down left over goes where it took most."""
    mean = Fraction(budget - protected)
    last = max(mean / beta, Fraction(1))
    first = mean + (mean - last)
    line = [first + (last - first) * depth / (num_layers - 1) for depth in range(num_layers)]
    budgets = [int(exact) for exact in line]
    while sum(budgets) < num_layers * mean:
        depth = max(range(num_layers), key=lambda depth: line[depth] - budgets[depth])
        budgets[depth] += 1
    return [protected + slots for slots in budgets]


def test_budgets_of_pyramidkv_fall_on_a_line_and_sum_to_those_of_a_uniform_one() -> None:
    policy = PyramidKV()
    for budget, num_layers, protected in product((33, 64, 127, 256), (2, 3, 4, 28), (0, 8, 32)):
        kept = Protected(sinks=0, recent=protected, least_recent=0)
        budgets = policy.budgets(budget, 8, kept, LlamaConfig(num_hidden_layers=num_layers))
        assert budgets == pyramid(budget, num_layers, protected, beta=20)
        assert sum(budgets) == num_layers * budget
        assert budgets == sorted(budgets, reverse=True)
        assert min(budgets) > protected


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        # With 60 slots of the mean free, of which the last layer has 3: 117 to 3.
        (200, [125, 87, 49, 11]),
        (125, [125, 87, 49, 11]),
        # The first layer has no more than the prompt fills, the last what that leaves.
        (124, [124, 87, 49, 12]),
        # Not twice the mean any more.
        (119, [68, 68, 68, 68]),
        (30, [68, 68, 68, 68]),
    ],
)
def test_pyramidkv_fits_short_prompts_as_its_authors_do(length: int, expected: list[int]) -> None:
    model = make_model(torch.float32, num_layers=4)
    cache = CompressedCache("pyramidkv", 68, sinks=2, recent=6, window=6, fit_prompt=True)
    model(torch.arange(length)[None] % 100, **cache_argument(cache))
    budgets = [layer.positions.shape[2] for layer in cache.layers]
    assert budgets == pytest.approx(expected, abs=1) and sum(budgets) == 4 * 68
    assert budgets[0] == expected[0]
    uniform = CompressedCache("pyramidkv", 68, sinks=2, recent=6, window=6)
    model(torch.arange(length)[None] % 100, **cache_argument(uniform))
    assert [layer.positions.shape[2] for layer in uniform.layers] == pytest.approx(
        [125, 87, 49, 11], abs=1
    )


def test_prompts_that_call_for_different_budgets_are_refused() -> None:
    model = make_model(torch.float32, num_layers=4)
    cache = CompressedCache("pyramidkv", 68, sinks=2, recent=6, window=6, fit_prompt=True)
    ids, mask = torch.ones(2, 150, dtype=torch.int64), torch.ones(2, 150, dtype=torch.int64)
    mask[0, :50] = 0
    with pytest.raises(ValueError, match="some of 100, 150 tokens"):
        model(ids, attention_mask=mask, **cache_argument(cache))
    mask[0, :] = 1
    mask[0, :20] = 0
    model(ids, attention_mask=mask, **cache_argument(cache))
    assert cache.layers[0].positions.shape[2] == 125


@pytest.mark.parametrize("interval", [1, 3])
def test_pyramidkv_keeps_the_tokens_of_the_reference(interval: int, tolerance: float) -> None:
    model = make_model(num_layers=3)
    options = {"window": 6, "kernel_size": 3}
    rules = Rules(14, interval, sinks=1, recent=3)
    assert_agree(
        model,
        ReferenceLlama(model),
        TEXTS,
        LENGTHS,
        name="pyramidkv",
        rules=rules,
        tolerance=tolerance,
        score=partial(snapkv, **options),
        expected_rules=replace(rules, budget=tuple(pyramid(14, 3, 4, beta=20))),
        options=options,
    )


@pytest.mark.parametrize("interval", [1, 3, 13])
@pytest.mark.parametrize("name", slow_but(("h2o",), ("h2o", "keydiff", "rkv")))
def test_a_list_gives_each_layer_its_budget(name: str, interval: int, tolerance: float) -> None:
    model = make_model(num_layers=3)
    rules = Rules((8, 30, 14), interval, sinks=1, recent=4)
    assert_agree(
        *(model, ReferenceLlama(model), TEXTS, LENGTHS),
        name=name,
        rules=rules,
        tolerance=tolerance,
    )


def test_slots_of_all_layers_are_those_of_a_uniform_budget() -> None:
    model, ids = make_model(torch.float32, num_layers=4), torch.tensor([TEXTS[0]])
    sizes = []
    for name, budget in [("snapkv", 24), ("snapkv", [40, 30, 16, 10]), ("pyramidkv", 24)]:
        cache = CompressedCache(name, budget, interval=1, window=4)
        model.generate(ids, past_key_values=cache, max_new_tokens=3)
        slots = [layer.positions.shape[2] for layer in cache.layers]
        assert sum(slots) == 4 * 24
        assert slots == [layer.keys.shape[2] for layer in cache.layers]
        sizes.append(cache.nbytes)
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("budget", [[8, 8, 8], [8]])
def test_a_list_for_another_number_of_layers_is_refused(budget: list[int]) -> None:
    model = make_model(torch.float32)
    with pytest.raises(ValueError, match=rf"each of the 2 layers .* got {len(budget)}"):
        CompressedCache("h2o", budget, config=model.config)
    cache = CompressedCache("h2o", budget)
    with pytest.raises(ValueError, match=rf"each of the 2 layers .* got {len(budget)}"):
        model(torch.tensor([[1, 2, 3]]), past_key_values=cache)


@pytest.mark.parametrize(
    ("policy", "budget", "error", "message"),
    [
        ("h2o", [], ValueError, "must not have an empty list"),
        ("h2o", [8, 0], ValueError, "budget must be an int >= 1, got 0"),
        ("h2o", [8, "8"], TypeError, "budget must be an int >= 1, a list"),
        ("h2o", [8, [8, 8]], TypeError, "budget must be an int >= 1, a list"),
        ("h2o", [64, 6], ValueError, r"sinks \+ recent \+ 1 \(2 \+ 4 \+ 1 = 7\), got 6"),
        ("pyramidkv", [8, 8], ValueError, "one number with 'pyramidkv', which shares it out"),
    ],
)
def test_budgets_that_cannot_work_are_refused(
    policy: str, budget: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CompressedCache(policy, budget, sinks=2, recent=4)


def test_a_list_counts_layers_of_full_attention_only() -> None:
    from tests.families import FAMILIES

    for name, shape in [("Gemma 3", 10), ("LFM2", None)]:
        (family,) = (family for family in FAMILIES if family.name == name)
        model, cache = family.make(repeats=2), CompressedCache("h2o", [24, 12])
        with torch.no_grad():
            model(torch.arange(1, 41)[None], past_key_values=cache)
        assert [layer.keys.shape[2] for layer in cache.layers[1::2]] == [24, 12]
        if shape is not None:
            assert [layer.keys.shape[2] for layer in cache.layers[::2]] == [shape, shape]


def test_a_file_and_a_snapshot_bring_budgets_along(tmp_path: Any) -> None:
    model, ids = make_model(torch.float32), torch.tensor([TEXTS[0]])
    cache = CompressedCache("h2o", [20, 10])
    model(ids[:, :30], past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = CompressedCache.load(tmp_path / "cache.safetensors")
    assert loaded.rules == cache.rules
    again = CompressedCache("h2o", [20, 10])
    again.restore(cache.snapshot())
    expected = model(ids[:, 30:31], past_key_values=cache).logits
    for other in (loaded, again):
        assert torch.equal(model(ids[:, 30:31], past_key_values=other).logits, expected)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.array, torch.tensor])
def test_whole_numbers_of_any_library_are_ints(kind: Callable[[int], Any]) -> None:
    cache: Any = CompressedCache(
        "snapkv", [kind(12), 14], interval=kind(2), sinks=kind(1), recent=kind(5), window=kind(4)
    )
    assert cache.eviction.arguments == dict(
        budget=(12, 14), interval=2, sinks=1, recent=5, protect_prompt=False
    )
    numbers = [*cache.eviction.budget, cache.policy.window, cache.eviction.interval]
    assert {type(number) for number in numbers} == {int}
    rank = ShadowKV(rank=kind(12)).rank
    assert (rank, type(rank)) == (12, int)
    for given in (kind(0), kind(-1)):
        with pytest.raises(ValueError, match="budget must be an int >= 1"):
            CompressedCache("h2o", given)
    others = np.float64(12.0), np.array([12]), torch.tensor(12.0), torch.tensor([12])
    for other in (*others, np.True_, torch.tensor(True)):
        with pytest.raises(TypeError, match="budget must be an int >= 1"):
            CompressedCache("h2o", other)


def test_the_harness_takes_a_list_with_slashes() -> None:
    press = take_press({"kv_press": "h2o", "kv_budget": "64/32"})
    assert press is not None and press.make_cache().rules.budget == (64, 32)
    with pytest.raises(TypeError, match="a list with one for each layer"):
        take_press({"kv_press": "h2o", "kv_budget": "64/x"})


ATTENTION = {
    "h2o": {},
    "observed_attention": {},
    "snapkv": {"window": 6, "kernel_size": 3},
    "h2o+caote": {},
    "expected_attention": {"n_future": 20, "n_sinks": 1, "epsilon": 0.02},
}


@pytest.mark.parametrize(
    ("name", "floor", "interval"),
    slow_but(("h2o", "snapkv"), pairwise([*ATTENTION], [0.0, 0.2, 0.75, 1.0], [1, 3, 13])),
)
def test_adakv_keeps_the_tokens_of_the_reference(
    precise_model: LlamaForCausalLM,
    reference: ReferenceLlama,
    tolerance: float,
    name: str,
    floor: float,
    interval: int,
) -> None:
    rules = Rules(14, interval, sinks=1, recent=3)
    assert_agree(
        *(precise_model, reference, TEXTS, LENGTHS),
        name=f"{name}+adakv",
        rules=rules,
        tolerance=tolerance,
        score=partial(POLICIES[name], **ATTENTION[name]),
        options={"floor": floor, **ATTENTION[name]},
        floor=floor,
    )


@pytest.mark.parametrize(
    ("name", "floor", "ratio", "interval"),
    slow_but(
        ("h2o",),
        pairwise(
            ["h2o", "observed_attention", "snapkv"], [0.0, 0.2, 0.75], [0.0, 0.5, 1.0], [1, 3, 13]
        ),
    ),
)
def test_criticalkv_behind_adakv_keeps_the_tokens_of_the_reference(
    precise_model: LlamaForCausalLM,
    reference: ReferenceLlama,
    tolerance: float,
    name: str,
    floor: float,
    ratio: float,
    interval: int,
) -> None:
    options = {"first_stage_ratio": ratio, "score_offset": 0.02, **ATTENTION[name]}
    assert_agree(
        *(precise_model, reference, TEXTS, LENGTHS),
        name=f"{name}+adakv+criticalkv",
        rules=Rules(14, interval, sinks=1, recent=3),
        tolerance=tolerance,
        score=partial(POLICIES[f"{name}+criticalkv"], **options),
        options={"floor": floor, **options},
        floor=floor,
    )


@pytest.mark.parametrize("base", ["h2o", "snapkv", "h2o+adakv"])
def test_criticalkv_whose_first_stage_is_all_changes_nothing(
    precise_model: LlamaForCausalLM, base: str
) -> None:
    text, kept = torch.tensor([distinct_tokens(50, seed=3)]), []
    options: dict[str, Any] = {"first_stage_ratio": 1.0}
    for name, own in [(base, {}), (f"{base}+criticalkv", options)]:
        cache = CompressedCache(name, 16, recent=3, interval=2, **own)
        precise_model(text[:, :30], past_key_values=cache)
        kept.append([positions(cache)])
        for at in range(30, 50):
            precise_model(text[:, at : at + 1], past_key_values=cache)
            kept[-1].append(positions(cache))
    assert kept[0] == kept[1]


class Skewed(Policy):
    """Attention of the first head is on few tokens, that of the second on all alike."""

    name = "skewed"
    scores_attention = True

    def scores(self, slots: Slots) -> Tensor:
        noise = (slots.positions.double() * 12.9898).sin() * 43758.5453
        weights = (torch.tensor([16.0, 0.2])[:, None] * (noise - noise.floor())).exp()
        return (weights / weights.sum(dim=-1, keepdim=True)).float()


@pytest.mark.parametrize(("floor", "ratio"), [(0.2, 0.5), (0.2, 0.1), (0.5, 0.5)])
def test_criticalkv_behind_adakv_keeps_what_kvpress_keeps(floor: float, ratio: float) -> None:
    model, full = make_model(), DynamicCache()
    policy = CriticalKV(base=AdaKV(base=Skewed(), floor=floor), first_stage_ratio=ratio)
    cache = CompressedCache(policy, 150)
    text = torch.randint(1, 160, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for past in (cache, full):
            model(text, past_key_values=past)
    weights = ReferenceLlama(model)
    for index, layer in enumerate(positions(cache)):
        values: Any = full.layers[index].values
        norms = []
        for head in range(2):
            rows = values[0, head].double().numpy()
            reach = [np.abs(rows @ part.T).sum(axis=1) for part in weights.projections(index, head)]
            norms.append(np.mean(reach, axis=0).tolist())
        view: Any = SimpleNamespace(positions=torch.arange(300).expand(1, 2, 300))
        scores = Skewed().scores(view)[0].tolist()
        rules: Any = dict(budget=150, floor=int(floor * 150), first_stage_ratio=ratio)
        expected = critical_adakv(scores, norms, **rules)
        assert layer[0] == expected
        # With half of 150 for each head first it would be 75 and 225 at all floors.
        counts = [len(head) for head in expected]
        assert counts == ([48, 252] if floor == 0.2 else [75, 225])


@pytest.mark.parametrize(
    ("budget", "floor", "tokens"), [(14, 0.2, 3), (100, 0.07, 7), (10, 0.0, 0), (10, 1.0, 10)]
)
def test_the_floor_of_a_head_is_rounded_up_from_what_was_written(
    precise_model: LlamaForCausalLM, budget: int, floor: float, tokens: int
) -> None:
    cache = CompressedCache("h2o+adakv", budget, floor=floor, recent=0)
    precise_model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    assert [layer.store.bound.floor for layer in cache.layers] == [tokens, tokens]


@pytest.mark.parametrize("interval", [1, 3, 13])
@pytest.mark.parametrize(
    "name",
    slow_but(
        ("h2o", "snapkv"),
        (
            *("h2o", "keydiff", "snapkv", "expected_attention", "rkv", "gkv", "vase"),
            *("h2o+caote", "h2o+criticalkv", "snapkv+ams"),
        ),
    ),
)
def test_a_list_of_lists_gives_each_head_its_budget(
    precise_model: LlamaForCausalLM,
    reference: ReferenceLlama,
    tolerance: float,
    name: str,
    interval: int,
) -> None:
    rules = Rules(((8, 20), (30, 9)), interval, sinks=1, recent=4)
    assert_agree(
        *(precise_model, reference, TEXTS, LENGTHS), name=name, rules=rules, tolerance=tolerance
    )


POOLS = {
    "h2o+adakv": (16, {}),
    "snapkv+adakv": ([12, 20], {"window": 6}),
    "snapkv+adakv+criticalkv": ([12, 20], {"window": 6}),
    "expected_attention+adakv": (16, {}),
    "rkv": ([[12, 20], [18, 14]], {"window": 6}),
    "h2o": ([[10, 22], [23, 9]], {}),
}


def make_pool(name: str, **rules: Any) -> CompressedCache:
    budget, options = POOLS[name]
    return CompressedCache(name, budget, **{"recent": 3, **rules}, **options)


def generate(model: Any, ids: Tensor, cache: CompressedCache, **more: Any) -> Tensor:
    more = {"max_new_tokens": NUM_STEPS, "do_sample": False, "pad_token_id": 0, **more}
    return model.generate(ids, past_key_values=cache, **more)


def positions(cache: CompressedCache) -> list[list[list[list[int]]]]:
    """By layer, row and head."""
    return [
        [
            [sorted(p for p in head if p >= 0) for head in row]
            for row in layer.held().positions.tolist()
        ]
        for layer in cache.layers
    ]


@pytest.mark.parametrize("name", slow_but(("h2o+adakv", "rkv"), POOLS))
@pytest.mark.parametrize("prompt", [5, 40])
def test_a_pool_has_the_slots_of_a_uniform_budget_and_keeps_them(name: str, prompt: int) -> None:
    model, ids = make_model(torch.float32), torch.tensor([distinct_tokens(prompt, seed=1)])
    cache = make_pool(name)
    uniform = CompressedCache(name.replace("+adakv", ""), 16, **POOLS[name][1])
    for filled in (cache, uniform):
        model(ids, past_key_values=filled)
    addresses = [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors()]
    slots = sum(layer.positions[0].numel() for layer in cache.layers)
    assert slots == 2 * 2 * 16
    # Owners, and victims where there is a list of them, are numbers of 8 bytes.
    bookkeeping = [layer.store.owners.nbytes + layer.store.victims.nbytes for layer in cache.layers]
    victims = sum(layer.store.victims.nbytes for layer in uniform.layers)
    assert cache.nbytes == uniform.nbytes + sum(bookkeeping) - victims
    before = cache.nbytes
    for token in range(NUM_STEPS):
        model(torch.tensor([[token + 1]]), past_key_values=cache)
        held = sum(len(head) for layer in positions(cache) for row in layer for head in row)
        assert held <= slots
        assert all(token + prompt in head for layer in positions(cache) for head in layer[0])
    assert held == slots
    budget = cache.eviction.budget
    if is_per_head(budget):
        assert [[len(head) for head in layer[0]] for layer in positions(cache)] == [
            *map(list, budget)
        ]
    assert cache.nbytes == before
    assert addresses == [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors()]


# What an interval changes is the same for any pool.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "interval"), [*alternating(POOLS, [4, 1]), ("h2o+adakv", 1)])
def test_a_pool_is_compiled_once(name: str, interval: int) -> None:
    torch._dynamo.reset()
    backend = CountingBackend()
    model = make_model(torch.float32)
    cache = make_pool(name, interval=interval)
    for prompt in (33, 12):
        ids = torch.tensor([distinct_tokens(prompt, seed=seed) for seed in (1, 2)])
        eager = make_pool(name, interval=interval)
        expected = generate(model, ids, eager)
        got = generate(model, ids, cache, compile_config=compiled(backend))
        assert torch.equal(got, expected)
        assert positions(cache) == positions(eager)
        cache.reset()
    assert backend.graphs == (1 if interval == 1 else 2)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", slow_but(("h2o+adakv", "rkv"), POOLS))
def test_a_prompt_in_chunks_and_a_second_turn_keep_what_a_pool_may(name: str) -> None:
    model = make_model()
    ids = torch.tensor([distinct_tokens(12, seed=1)])
    whole, chunked = make_pool(name), make_pool(name)
    expected = generate(model, ids, whole)
    # The chunks fit the slots, so nothing is evicted between them.
    got = generate(model, ids[:, :8], chunked, max_new_tokens=1)
    chunked.reset()
    got = generate(model, ids, chunked, prefill_chunk_size=4)
    if "adakv" in name:
        assert torch.equal(got, expected)
        assert positions(chunked) == positions(whole)
    turn = torch.cat([got, torch.tensor([distinct_tokens(30, seed=2)])], dim=1)
    generate(model, turn, chunked)
    assert sum(len(h) for layer in positions(chunked) for h in layer[0]) == 2 * 2 * 16


@pytest.mark.parametrize("name", POOLS)
def test_a_pool_is_saved_and_its_rows_are_moved(name: str, tmp_path: Any) -> None:
    model = make_model()
    ids = torch.tensor([distinct_tokens(30, seed=seed) for seed in (1, 2)])
    cache = make_pool(name, interval=2)
    model(ids[:, :25], past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = CompressedCache.load(tmp_path / "cache.safetensors")
    swapped = make_pool(name, interval=2)
    swapped.restore(cache.snapshot())
    swapped.batch_select_indices(torch.tensor([1, 0, 1]))
    for token in range(25, 30):
        step = ids[:, token : token + 1]
        expected = model(step, past_key_values=cache).logits
        assert torch.equal(model(step, past_key_values=loaded).logits, expected)
        moved = model(step[[1, 0, 1]], past_key_values=swapped).logits
        torch.testing.assert_close(moved, expected[[1, 0, 1]])


@pytest.mark.parametrize(
    ("policy", "budget", "options", "message"),
    [
        ("keydiff+adakv", 16, {}, "whose scores are attention, such as 'snapkv.adakv'"),
        ("snapkv+criticalkv+adakv", 16, {}, "Write 'adakv' right after 'snapkv'"),
        ("h2o+adakv", 16, {"floor": 1.5}, "floor must be between 0 and 1, got 1.5"),
        ("h2o+adakv", [[8, 8], [8, 8]], {}, "shares the slots of a layer among its heads"),
        ("tova+adakv", 16, {}, "'tova.adakv' treats all heads"),
        ("h2o+adakv+think", 16, {}, "'h2o.adakv.think' treats all heads"),
        ("tova", [[8, 8], [8, 8]], {}, "'tova' treats all heads"),
        ("rpc", [[8, 8], [8, 8]], {}, "'rpc' treats all heads"),
        ("h2o+adakv+chunkkv", 16, {}, "'h2o.adakv.chunkkv' treats all heads"),
        ("h2o+adakv+merging", 16, {}, "'h2o.adakv.merging' merges tokens in slots of one head"),
        ("h2o+merging", [[8, 8], [8, 8]], {}, "'h2o.merging' merges tokens in slots of one head"),
    ],
)
def test_pools_that_cannot_work_are_refused(
    policy: str, budget: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CompressedCache(policy, budget, **options)


def test_a_list_for_another_number_of_heads_is_refused() -> None:
    config = make_model(torch.float32).config
    with pytest.raises(ValueError, match="each of the 2 key/value heads of layer 1, got 3"):
        CompressedCache("h2o", [[8, 8], [8, 8, 8]], config=config)


@pytest.mark.parametrize("name", POOLS)
def test_a_protected_prompt_must_fit_every_head(name: str) -> None:
    model = make_model()
    cache = make_pool(name, protect_prompt=True)
    generate(model, torch.tensor([[1, 2, 3, 4, 5]]), cache)
    assert all(set(range(5)) <= set(head) for layer in positions(cache) for head in layer[0])
    cache = make_pool(name, protect_prompt=True)
    with pytest.raises(ValueError, match="budget must be at least prompt"):
        model(torch.arange(1, 22)[None], past_key_values=cache)


def test_sliding_layers_are_plain_in_a_pool() -> None:
    from tests.families import FAMILIES

    (family,) = (family for family in FAMILIES if family.name == "Gemma 3")
    model, cache = family.make(repeats=2), CompressedCache("h2o+adakv", [24, 12])
    ids = torch.arange(1, 41)[None]
    got = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    shapes = [tuple(layer.positions.shape) for layer in cache.layers]
    assert shapes == [(1, 2, 10), (1, 1, 48), (1, 2, 10), (1, 1, 24)]
    whole = CompressedCache("h2o+adakv", 64)
    expected = model.generate(ids, past_key_values=whole, max_new_tokens=20, do_sample=False)
    full = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(expected, full)
    assert got.shape == full.shape


GATES = [[0.9, 0.2], [0.5, 0.5]]
"""At a sparsity of one half, the second head of each layer streams: of equals the later one."""


@pytest.fixture
def gates(tmp_path: Path) -> str:
    path = tmp_path / "full_attention_heads.tsv"
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in GATES))
    return str(path)


def duo(view: View, base: Score, *, streaming: set[tuple[int, int]]) -> list[float]:
    """Last tokens in streaming heads, what ``base`` says in others."""
    if (view.layer, view.head) not in streaming:
        return base(view)
    return [float(token.position) for token in view.held]


@dataclass(frozen=True)
class DuoRules(Rules):
    """Streaming heads have ``first`` tokens as sinks."""

    streaming: frozenset[tuple[int, int]] = frozenset()
    first: int = 0

    def of_head(self, layer: int, head: int) -> Rules:
        return replace(self, sinks=self.first) if (layer, head) in self.streaming else self


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize(
    ("sparsity", "streaming", "shares"),
    slow_but(
        (0.5, 0.75),
        [
            (0.5, {(0, 1), (1, 1)}, ((24, 8), (24, 8))),
            (0.25, {(0, 1)}, ((19, 8), (19, 18))),
            (0.75, {(0, 1), (1, 0), (1, 1)}, ((40, 8), (8, 8))),
            (0.0, set(), ((16, 16), (16, 16))),
            (1.0, {(0, 0), (0, 1), (1, 0), (1, 1)}, ((16, 16), (16, 16))),
        ],
    ),
)
@pytest.mark.parametrize("name", slow_but(("h2o",), ("h2o", "keydiff", "rkv")))
def test_duo_attention_keeps_the_tokens_of_the_reference(
    precise_model: LlamaForCausalLM,
    reference: ReferenceLlama,
    tolerance: float,
    gates: str,
    name: str,
    sparsity: float,
    streaming: set[tuple[int, int]],
    shares: tuple[tuple[int, ...], ...],
    interval: int,
) -> None:
    assert sum(map(sum, shares)) == 2 * 2 * 16
    rules = Rules(16, interval, sinks=1, recent=5)
    # 3 and 7 shrink to 2 and 6, half of the budget, where others can use what is left.
    own = OPTIONS[name]
    options = {"gates": gates, "sparsity": sparsity, "duo_sinks": 3, "duo_recent": 7, **own}
    score = partial(duo, base=partial(POLICIES[name], **own), streaming=streaming)
    expected = DuoRules(shares, interval, sinks=1, recent=5)
    first = 3 if sparsity == 1 else 2
    expected = replace(expected, streaming=frozenset(streaming), first=first)
    assert_agree(
        *(precise_model, reference, TEXTS, LENGTHS),
        name=f"{name}+duo_attention",
        rules=rules,
        tolerance=tolerance,
        score=score,
        expected_rules=expected,
        options=options,
    )


def test_streaming_heads_shrink_with_the_budget_and_leave_the_rest_to_the_others(
    gates: str,
) -> None:
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, hidden_size=32
    )
    policy = DuoAttention(base=H2O(), gates=gates)
    for budget, expected in [(1024, [1728, 320]), (640, [960, 320]), (100, [150, 50])]:
        assert policy.budgets(budget, 2, Protected(0, 7, 7), config) == [expected, expected]
    # One first token, 7 recent ones and the newest.
    assert policy.budgets(10, 2, Protected(0, 7, 7), config) == [[11, 9], [11, 9]]
    assert policy.budgets(10, 2, Protected(0, 7, 0), config) == [[15, 5], [15, 5]]


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize(
    ("policy", "options", "first", "last"),
    [
        ("knorm", {}, 4, 12),
        # What is given holds, the newest token comes on top.
        ("knorm", {"sinks": 16}, 16, 1),
        ("knorm", {"sinks": 2, "recent": 24}, 4, 25),
        ("h2o", {"recent": 63}, 0, 64),
        ("h2o", {"recent": 20, "duo_sinks": 64, "duo_recent": 256}, 6, 26),
        # A default of recent, 32 here, yields.
        ("h2o", {}, 4, 12),
        ("h2o", {"duo_sinks": 10}, 10, 12),
    ],
)
def test_streaming_heads_hold_first_and_last_tokens_and_what_is_protected(
    gates: str, policy: str, options: dict[str, Any], first: int, last: int, interval: int
) -> None:
    model, ids = make_model(torch.float32), torch.tensor([distinct_tokens(100, seed=1)])
    options = {"duo_sinks": 4, "duo_recent": 12, "interval": interval, **options}
    cache = CompressedCache(f"{policy}+duo_attention", 64, gates=gates, **options)
    with torch.no_grad():
        model(ids[:, :80], past_key_values=cache)
        for token in range(80, 100):
            model(ids[:, token : token + 1], past_key_values=cache)
    for layer in positions(cache):
        retrieval, streaming = layer[0]
        assert streaming == [*range(first), *range(100 - last, 100)]
        assert len(retrieval) == min(100, 2 * 64 - len(streaming))
        recent = cache.eviction.recent
        assert set(retrieval) >= set(range(99 - recent + interval, 99))


def test_gates_of_a_calibration_are_those_of_its_file() -> None:
    config = AutoConfig.from_pretrained(MODEL_PATH)
    heads = config.num_key_value_heads
    shares = DuoAttention(base=H2O()).budgets(64, heads, Protected(0, 7, 7), config)
    counts = [slots for layer in shares for slots in layer]
    assert sum(counts) == config.num_hidden_layers * heads * 64
    found = files.load_layers("duo_attention", None, config, "gates")
    by_gate = sorted(
        zip(
            [gate for layer in sorted(found) for gate in found[layer].tolist()], counts, strict=True
        )
    )
    assert [slots for _, slots in by_gate[: len(counts) // 2]] == [32] * (len(counts) // 2)
    assert min(slots for _, slots in by_gate[len(counts) // 2 :]) > 64


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.5}, ValueError, "sparsity must be between 0 and 1, got 1.5"),
        ({"duo_recent": 0}, ValueError, "duo_recent must be >= 1, got 0"),
        ({"gates": "nowhere.tsv"}, FileNotFoundError, "no file of gates 'nowhere.tsv'"),
        ({"gates": "nowhere.safetensors"}, FileNotFoundError, "no calibration file"),
        ({"gates": 3}, TypeError, "gates must be a str or None, got 3"),
    ],
)
def test_duo_attention_refuses_what_cannot_work(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CompressedCache("h2o+duo_attention", 64, **options)


def test_gates_of_another_model_are_refused(gates: str) -> None:
    model = make_model(torch.float32, num_layers=3)
    cache = CompressedCache("h2o+duo_attention", 16, gates=gates)
    with pytest.raises(ValueError, match="gates must be of 2 key/value heads in layer 2, got 0"):
        model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    Path(gates).write_text("0.5\tnan\n")
    with pytest.raises(ValueError, match=r"full_attention_heads.tsv' must have finite numbers"):
        model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    with pytest.raises(ValueError, match="duo_attention cannot share out the slots of 'pyramidkv'"):
        CompressedCache("pyramidkv+duo_attention", 64)
    with pytest.raises(ValueError, match="adakv cannot share out the slots of"):
        CompressedCache("h2o+duo_attention+adakv", 64)
