"""What a cache promises whatever the policy: the budget, exactness, no leaks, constant memory."""

import copy
import gc
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationMixin,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    masking_utils,
)
from transformers.modeling_utils import AttentionInterface

from compressed_cache import POLICIES, CompressedCache, decode, measure
from compressed_cache.hf import attention_hook
from compressed_cache.versions import CACHE
from tests.conftest import distinct_tokens, held
from tests.grids import alternating, slow_but
from tests.kinds import KINDS, QUICK
from tests.reference.comparison import OPTIONS

# Those that give every layer the budget; tests/test_budgets.py has the others.
UNIFORM = [name for name in KINDS if not hasattr(POLICIES[name], "budgets")]
EVICTING = [name for name in UNIFORM if name != "full"]


def _generate(model: LlamaForCausalLM, ids: torch.Tensor, cache: object, new: int, **more: object):
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, **more)


@pytest.mark.parametrize("policy", slow_but(QUICK, UNIFORM))
def test_a_budget_for_everything_gives_the_tokens_of_the_dynamic_cache(
    model: LlamaForCausalLM, policy: str
) -> None:
    ids = distinct_tokens(2, 21)
    expected = _generate(model, ids, DynamicCache(), 40)
    assert torch.equal(
        _generate(model, ids, CompressedCache(policy, 61, protect_prompt=False), 40), expected
    )


@pytest.mark.parametrize("policy", [*UNIFORM, "shadowkv"])
def test_a_budget_for_everything_gives_the_logits_of_the_dynamic_cache(
    model: LlamaForCausalLM, policy: str
) -> None:
    ids = distinct_tokens(2, 30)
    ours, theirs = CompressedCache(policy, 40, protect_prompt=False), DynamicCache()
    for part in ids.split([21, *[1] * 9], dim=1):
        got = model(part, past_key_values=ours).logits
        expected = model(part, past_key_values=theirs).logits
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("policy", "prompt"), slow_but(QUICK, alternating(EVICTING, [9, 40])))
def test_the_budget_is_never_exceeded_and_allocated_once(
    model: LlamaForCausalLM, policy: str, prompt: int
) -> None:
    cache = CompressedCache(policy, 16, protect_prompt=False)
    ids = distinct_tokens(2, prompt + 60)
    model(ids[:, :prompt], past_key_values=cache)
    nbytes, addresses = (
        cache.nbytes,
        [t.data_ptr() for t in cache.layers[0].tensors()],
    )
    for token in range(prompt, prompt + 60):
        model(ids[:, token : token + 1], past_key_values=cache)
        assert cache.layers[0].keys.shape == (2, 2, 16, 12)
        for layer in range(2):
            for row in range(2):
                for head in held(cache, layer, row):
                    assert len(head) == len(set(head)) == min(16, token + 1)
                    assert token in head
    assert cache.nbytes == nbytes
    assert [t.data_ptr() for t in cache.layers[0].tensors()] == addresses
    assert cache.get_seq_length() == prompt + 60
    assert cache.evicted_tokens == prompt + 60 - 16


@pytest.mark.parametrize(("policy", "interval"), slow_but(QUICK, alternating(EVICTING, [1, 5])))
def test_sinks_and_recent_tokens_are_never_evicted(
    model: LlamaForCausalLM, policy: str, interval: int
) -> None:
    options = {"window": 4} if policy == "rkv" else {}
    cache = CompressedCache(
        policy, 24, interval=interval, sinks=3, recent=6, protect_prompt=False, **options
    )
    ids = distinct_tokens(1, 150)
    model(ids[:, :40], past_key_values=cache)
    for token in range(40, 150):
        model(ids[:, token : token + 1], past_key_values=cache)
        for head in held(cache, 0) + held(cache, 1):
            assert {0, 1, 2} <= set(head)
            assert set(range(token - 6, token + 1)) <= set(head)


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "snapkv+adakv", "h2o+simlayerkv"])
def test_sinks_that_come_behind_a_short_prompt_stay(model: LlamaForCausalLM, policy: str) -> None:
    cache = CompressedCache(policy, 9, interval=9, sinks=4, recent=0)
    _generate(model, distinct_tokens(2, 2), cache, 40)
    for layer in range(2):
        for row in range(2):
            for head in held(cache, layer, row):
                assert {0, 1, 2, 3} <= set(head)


@pytest.mark.parametrize("policy", ["raas", "random_prompt"])
def test_a_prompt_protected_by_default_yields_where_it_does_not_fit(
    model: LlamaForCausalLM, policy: str
) -> None:
    # One row fits with recent tokens and the incoming one, one is a token too long for that.
    ids = distinct_tokens(2, 26)
    ids[0, 0] = 0
    cache = CompressedCache(policy, 32, recent=6, interval=1)
    output = _generate(model, ids, cache, 60, attention_mask=(ids != 0).long())
    assert output.shape == (2, 86)
    for layer in range(2):
        assert cache.layers[layer].store.protected_prefix.tolist() == [25, 16]
        fits, too_long = held(cache, layer, 0), held(cache, layer, 1)
        for one, other in zip(fits, too_long, strict=True):
            assert set(range(25)) <= set(one)
            assert set(range(16)) <= set(other)
            assert set(range(79, 85)) <= set(other)
    assert not all(set(range(26)) <= set(head) for head in held(cache, 1, 1))
    again = CompressedCache(policy, 32, recent=6, interval=1)
    alone = model.generate(ids[1:], past_key_values=again, max_new_tokens=60, do_sample=False)
    assert torch.equal(alone[0, 26:], output[1, 26:])
    asked = CompressedCache(policy, 32, recent=6, protect_prompt=True)
    with pytest.raises(ValueError, match=r"prompt \+ recent \+ 1 with protect_prompt=True \(26"):
        model.generate(ids[1:], past_key_values=asked, max_new_tokens=2)


@pytest.mark.parametrize("interval", [1, 4])
def test_recent_by_default_yields_to_a_prompt_that_is_to_be_protected(
    model: LlamaForCausalLM, interval: int
) -> None:
    # h2o keeps half of a budget as recent, which would leave room for a prompt of 15.
    ids = distinct_tokens(2, 26)
    ids[0, :20] = 0
    cache = CompressedCache("h2o", 32, protect_prompt=True, interval=interval)
    output = _generate(model, ids, cache, 60, attention_mask=(ids != 0).long())
    last = 85 - interval  # when slots were last ranked, or later
    for layer in range(2):
        for head in held(cache, layer, 1):
            assert set(range(26)) <= set(head)
            assert set(range(last - 6 + interval, last)) <= set(head)
        # The row with a short prompt keeps heavy hitters too.
        for head in held(cache, layer, 0):
            assert set(range(6)) <= set(head)
            assert set(range(last - 20 - 16 + interval, last - 20)) <= set(head)
    for row, start in enumerate((20, 0)):
        again = CompressedCache("h2o", 32, protect_prompt=True, interval=interval)
        alone = model.generate(
            ids[row : row + 1, start:], past_key_values=again, max_new_tokens=60, do_sample=False
        )
        assert torch.equal(alone[0, -60:], output[row, -60:])
    full = CompressedCache("h2o", 26, protect_prompt=True)
    with pytest.raises(
        ValueError, match=r"at least prompt \+ 1 with protect_prompt=True \(26 \+ 1 ="
    ):
        model.generate(ids[1:], past_key_values=full, max_new_tokens=2)
    asked = CompressedCache("h2o", 32, recent=16, protect_prompt=True)
    with pytest.raises(ValueError, match=r"prompt \+ recent \+ 1 with protect_prompt=True \(26"):
        model.generate(ids[1:], past_key_values=asked, max_new_tokens=2)


def test_protection_by_default_is_still_one_in_a_restored_cache(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    cache = CompressedCache("raas", 16, recent=2)
    model.generate(distinct_tokens(1, 30), past_key_values=cache, max_new_tokens=4)
    cache.save(tmp_path / "cache.safetensors")
    loaded = CompressedCache.load(tmp_path / "cache.safetensors")
    assert loaded.eviction == cache.eviction
    assert "protect_prompt=True, prompt_yields=True" in repr(loaded)
    assert torch.equal(loaded.layers[0].store.protected_prefix, torch.tensor([8]))


@pytest.mark.parametrize(
    ("policy", "given", "shown"),
    [
        ("raas", {"protect_prompt": True}, "protect_prompt=True by default"),
        ("h2o", {"recent": 8}, "recent=8 by default"),
    ],
)
def test_a_default_is_not_the_same_value_given(
    model: LlamaForCausalLM, policy: str, given: dict[str, Any], shown: str
) -> None:
    cache, other = CompressedCache(policy, 16), CompressedCache(policy, 16, **given)
    assert cache.eviction.recent == other.eviction.recent
    with torch.no_grad():
        model(distinct_tokens(1, 30), past_key_values=cache)
    message = rf"must be of a cache like this one \(.*\), got one with .*{shown}"
    with pytest.raises(ValueError, match=message):
        other.restore(cache.snapshot())
    same = CompressedCache(policy, 16)
    same.restore(cache.snapshot())
    assert held(same, 0) == held(cache, 0)


@pytest.mark.parametrize("policy", slow_but(QUICK, EVICTING))
def test_a_protected_prompt_is_never_evicted(model: LlamaForCausalLM, policy: str) -> None:
    options = {"window": 4} if policy == "rkv" else {}
    cache = CompressedCache(policy, 32, recent=6, protect_prompt=True, **options)
    _generate(model, distinct_tokens(2, 20), cache, 100)
    for layer in range(2):
        for row in range(2):
            for head in held(cache, layer, row):
                assert set(range(20)) <= set(head)


@pytest.mark.parametrize("policy", slow_but((*QUICK, "shadowkv"), (*KINDS, "shadowkv")))
def test_reset_makes_a_cache_as_new_in_the_same_memory(
    model: LlamaForCausalLM, policy: str
) -> None:
    first, second = distinct_tokens(2, 33, seed=1), distinct_tokens(2, 12, seed=2)
    cache = CompressedCache(policy, 16, protect_prompt=False)
    _generate(model, first, cache, 30)
    addresses = [t.data_ptr() for layer in cache.layers for t in layer.tensors()]
    cache.reset()
    assert cache.get_seq_length() == cache.evicted_tokens == 0
    fresh = CompressedCache(policy, 16, protect_prompt=False)
    assert torch.equal(_generate(model, second, cache, 30), _generate(model, second, fresh, 30))
    assert [t.data_ptr() for layer in cache.layers for t in layer.tensors()] == addresses
    for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
        for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
            assert torch.equal(a, b)


def test_a_model_with_fewer_layers_may_come_after_one_with_more(make_model: object) -> None:
    ids, cache = distinct_tokens(1, 30), CompressedCache("h2o", 16)
    for layers in (3, 2, 3):
        model = make_model(num_hidden_layers=layers)
        cache.reset()
        got = _generate(model, ids, cache, 20)
        assert torch.equal(got, _generate(model, ids, CompressedCache("h2o", 16), 20))


@pytest.mark.parametrize("policy", slow_but(QUICK, EVICTING))
def test_layers_share_no_state(model: LlamaForCausalLM, policy: str) -> None:
    # At their defaults some keep the newest tokens of so short a text, in all layers alike, and rpc
    # keeps a prompt that fills the budget.
    cache = CompressedCache(policy, 16, recent=4, protect_prompt=False, **OPTIONS[policy])
    _generate(model, distinct_tokens(1, 8 if policy == "rpc" else 40), cache, 30)
    first, second = cache.layers
    storages = [{t.untyped_storage().data_ptr() for t in layer.tensors()} for layer in cache.layers]
    assert storages[0].isdisjoint(storages[1] - {0})
    if policy != "streaming_llm":
        assert not torch.equal(first.positions, second.positions)
    before = [t.clone() for t in second.tensors()]
    first.reset()
    for tensor, copied in zip(second.tensors(), before, strict=True):
        assert torch.equal(tensor, copied)


def test_heads_keep_sets_of_their_own_and_tova_one_for_all(model: LlamaForCausalLM) -> None:
    for policy, shared in (("knorm", False), ("random", False), ("h2o", False), ("tova", True)):
        cache = CompressedCache(policy, 12, protect_prompt=False)
        _generate(model, distinct_tokens(1, 40), cache, 20)
        one, other = held(cache, 0)
        assert (one == other) is shared


def test_full_grows_in_powers_of_two(model: LlamaForCausalLM) -> None:
    ids, expected = distinct_tokens(1, 250), []
    cache = CompressedCache("full", 16)
    assert torch.equal(_generate(model, ids, cache, 20), _generate(model, ids, DynamicCache(), 20))
    expected.append(cache.layers[0].keys.shape[2])
    assert expected == [512]
    assert cache.evicted_tokens == 0


def test_random_leaves_the_global_generator_alone_and_follows_its_seed(
    model: LlamaForCausalLM,
) -> None:
    ids = distinct_tokens(1, 40)
    kept = []
    for seed in (0, 0, 1):
        torch.manual_seed(7)
        state = torch.get_rng_state()
        cache = CompressedCache("random", 16, seed=seed)
        _generate(model, ids, cache, 30)
        assert torch.equal(torch.get_rng_state(), state)
        kept.append(held(cache, 0))
    assert kept[0] == kept[1] != kept[2]


@torch.no_grad()
@pytest.mark.parametrize(("redraw", "low", "high"), [(True, 0.0, 0.15), (False, 0.35, 0.65)])
def test_random_redraw_forgets_with_age_and_a_fixed_draw_samples_the_past(
    model: LlamaForCausalLM, redraw: bool, low: float, high: float
) -> None:
    """Of 320 tokens, what share of the 64 kept is from the first half?"""
    ids = distinct_tokens(4, 320)
    cache = CompressedCache("random", 64, redraw=redraw)
    model(ids[:, :8], past_key_values=cache)
    for token in range(8, 320):
        model(ids[:, token : token + 1], past_key_values=cache)
    old = (torch.stack([layer.positions for layer in cache.layers]) < 160).float().mean().item()
    assert low <= old <= high


# Which keep attention, queries and notes.
@pytest.mark.slow
@pytest.mark.parametrize("policy", ["h2o", "rkv", "gkv"])
def test_memory_is_the_same_after_200_and_after_1000_tokens(
    make_model: object, policy: str
) -> None:
    model = make_model(num_hidden_layers=1, hidden_size=16, intermediate_size=16, head_dim=4)
    cache = CompressedCache(policy, 16, protect_prompt=False)
    ids = distinct_tokens(1, 8)
    sizes, resident = [], []

    def tensors_alive() -> int:
        gc.collect()
        return sum(type(o) is torch.Tensor for o in gc.get_objects())

    def resident_mb() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() >> 20

    # With gradients on, as in a loop that forgets torch.no_grad().
    model(ids, past_key_values=cache)
    for token in range(1000):
        model(ids[:, token % 8 : token % 8 + 1], past_key_values=cache)
        if token + 1 in (200, 1000):
            sizes.append((cache.nbytes, tensors_alive()))
            resident.append(resident_mb())
    (bytes_early, tensors_early), (bytes_late, tensors_late) = sizes
    assert bytes_late == bytes_early
    # What tests before this one left behind may go in the meantime.
    assert tensors_late <= tensors_early
    assert resident[1] - resident[0] <= 4
    assert cache.get_seq_length() == 1008


def test_beams_move_every_tensor_in_place(model: LlamaForCausalLM) -> None:
    cache = CompressedCache("h2o", 16)
    ids = distinct_tokens(3, 30)
    _generate(model, ids, cache, 10)
    twin = copy.deepcopy(cache)
    addresses = [t.data_ptr() for t in cache.layers[0].tensors()]
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert [t.data_ptr() for t in cache.layers[0].tensors()] == addresses
    for mine, old in ((0, 2), (1, 2), (2, 0)):
        assert held(cache, 1, mine) == held(twin, 1, old)
        assert torch.equal(
            cache.layers[1].store.tokens.attention_state[mine],
            twin.layers[1].store.tokens.attention_state[old],
        )


def test_repr_says_policy_budget_and_tokens_seen(model: LlamaForCausalLM) -> None:
    cache = CompressedCache("h2o", 16)
    _generate(model, distinct_tokens(1, 30), cache, 11)
    for part in ("policy='h2o'", "budget=16", "tokens_seen=40"):
        assert part in repr(cache)


def test_the_hook_says_all_that_it_wraps() -> None:
    CompressedCache()
    own = attention_hook.__file__
    wrapped = {
        name
        for owner in (AttentionInterface, GenerationMixin, PreTrainedModel, masking_utils)
        for name, value in vars(owner).items()
        if getattr(getattr(value, "__code__", None), "co_filename", None) == own
    }
    names = re.findall(r"``(?:\w+\.)?(\w+)``", str(attention_hook.__doc__).partition("wraps")[2])
    assert wrapped == set(names)


@pytest.mark.slow
def test_importing_the_package_wraps_nothing() -> None:
    program = (
        "from transformers.modeling_utils import AttentionInterface\n"
        "before = AttentionInterface.get_interface\n"
        "from compressed_cache import CompressedCache\n"
        "print(AttentionInterface.get_interface is before)\n"
        "CompressedCache()\n"
        "print(AttentionInterface.get_interface is before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_every_release_takes_a_cache_by_the_new_name_and_nobody_warns(
    model: LlamaForCausalLM,
) -> None:
    ids = distinct_tokens(1, 40)
    expected = _generate(model, ids, CompressedCache("h2o", 16), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in (model, model.model):
            module(ids, cache=(cache := CompressedCache("h2o", 16)))
            assert cache.evicted_tokens == 40 - 16
        for more in ({}, {"custom_generate": decode}, {"prompt_lookup_num_tokens": 3}):
            cache = CompressedCache("h2o", 16)
            output = model.generate(ids, cache=cache, max_new_tokens=8, do_sample=False, **more)
            assert torch.equal(output, expected) or "prompt_lookup_num_tokens" in more
            assert cache.evicted_tokens > 0
        with measure(model) as measured:
            model.generate(ids, cache=CompressedCache("h2o", 16), max_new_tokens=8)
        assert measured.timing.tokens_in == 40


def test_what_transformers_says_of_the_old_name_is_heard(model: LlamaForCausalLM) -> None:
    ids = distinct_tokens(1, 40)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model.generate(ids, past_key_values=CompressedCache("h2o", 16), max_new_tokens=8)
    is_deprecated = CACHE == "cache"
    assert [warning.filename for warning in heard] == [__file__] * is_deprecated
    assert all("`past_key_values` is deprecated" in str(warning.message) for warning in heard)


@pytest.mark.parametrize("folder", ["compressed_cache", "integrations", "tasks", "examples"])
def test_nothing_of_ours_types_the_old_name(folder: str) -> None:
    files = [*(Path(__file__).parent.parent / folder).rglob("*.py")]
    assert files
    assert not [file for file in files if "past_key_values=" in file.read_text()]


def test_other_caches_are_not_affected_by_the_hook(model: LlamaForCausalLM) -> None:
    ids = distinct_tokens(2, 20)
    CompressedCache("h2o", 8)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with_cache = _generate(model, ids, DynamicCache(), 20)
        assert torch.equal(with_cache, _generate(model, ids, None, 20, use_cache=False))
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("policy", slow_but(QUICK, KINDS))
def test_eager_attention_gives_the_same_tokens_and_positions(
    model: LlamaForCausalLM, policy: str
) -> None:
    ids = distinct_tokens(2, 30)
    tokens, positions = [], []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        cache = CompressedCache(policy, 12, protect_prompt=False)
        tokens.append(_generate(model, ids, cache, 20))
        positions.append([held(cache, layer, row) for layer in range(2) for row in range(2)])
    model.set_attn_implementation("sdpa")
    assert torch.equal(*tokens)
    assert positions[0] == positions[1]


@pytest.mark.parametrize("rules", [dict(budget=[[10, 20], [12, 18]]), dict(budget=16, interval=4)])
def test_after_reset_the_layers_are_those_of_the_next_model(
    make_model: Callable[..., LlamaForCausalLM], rules: dict[str, Any]
) -> None:
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=400,
        sliding_window=16,
    )
    windowed, plain, ids = MistralForCausalLM(config).eval(), make_model(), distinct_tokens(1, 40)
    used, fresh = (CompressedCache("streaming_llm", **rules) for _ in range(2))
    windowed.generate(ids, past_key_values=used, max_new_tokens=4, do_sample=False)
    used.reset()
    texts = [_generate(plain, ids, cache, 20) for cache in (used, fresh)]
    assert torch.equal(*texts)
    for layer in range(2):
        assert held(used, layer) == held(fresh, layer)
    assert used.nbytes == fresh.nbytes
