"""More than one prompt: turns of a conversation, chunks, snapshots, rows and files."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from compressed_cache import POLICIES, CompressedCache
from tests.compiling import CountingBackend, compiled
from tests.conftest import distinct_tokens, held
from tests.families import FAMILIES
from tests.grids import alternating, slow_but
from tests.kinds import KINDS, QUICK

# Those that give every layer the budget; tests/test_budgets.py has the others.
UNIFORM = [name for name in KINDS if not hasattr(POLICIES[name], "budgets")]
EVICTING = [name for name in UNIFORM if name != "full"]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., LlamaForCausalLM]) -> Any:
    return make_model().double()


def _generate(model: Any, ids: torch.Tensor, cache: Any, new: int = 12, **more: Any) -> Any:
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, **more)


def _padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    pad = torch.nn.functional.pad
    ids = torch.stack([pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return ids, mask


# Turns.


@pytest.mark.parametrize(("policy", "second"), slow_but(QUICK, alternating(UNIFORM, [1, 9, 40])))
def test_turns_with_a_budget_for_everything_are_those_of_the_dynamic_cache(
    model: Any, policy: str, second: int
) -> None:
    texts = []
    for cache in (DynamicCache(), CompressedCache(policy, 140, protect_prompt=False)):
        text = _generate(model, distinct_tokens(2, 20), cache)
        for turn in range(2):
            text = torch.cat([text, distinct_tokens(2, second, seed=turn)], dim=1)
            text = _generate(model, text, cache)
        texts.append(text)
    assert torch.equal(*texts)


@pytest.mark.parametrize(("policy", "interval"), slow_but(QUICK, alternating(EVICTING, [1, 4])))
def test_a_long_second_prompt_sees_what_is_held_and_all_of_itself(
    model: Any, policy: str, interval: int
) -> None:
    """Compared with full attention under a mask that hides what each head has evicted."""
    cache = CompressedCache(policy, 16, interval=interval, recent=8, protect_prompt=False)
    ids = distinct_tokens(1, 80)
    model(ids[:, :30], past_key_values=cache)
    kept = [held(cache, layer) for layer in range(2)]
    got = model(ids[:, 30:], past_key_values=cache).logits

    hidden = torch.ones(2, 4, 80, 80, dtype=torch.bool).tril()
    for layer in range(2):
        for head, positions in enumerate(kept[layer]):
            gone = sorted(set(range(30)) - set(positions))
            for query in (2 * head, 2 * head + 1):
                hidden[layer, query, 30:][:, gone] = False
    handles = [
        layer.self_attn.register_forward_pre_hook(_masked(hidden[number]), with_kwargs=True)
        for number, layer in enumerate(model.model.layers)
    ]
    expected = model(ids, use_cache=False).logits[:, 30:]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(got, expected)
    for layer in range(2):
        for head, before in zip(held(cache, layer), kept[layer], strict=True):
            assert len(head) == 16
            assert set(head) <= {*before, *range(30, 80)}
            assert set(head) >= set(range(72, 80))


def _masked(mask: torch.Tensor) -> Any:
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": mask[None]}

    return hook


@pytest.mark.parametrize(("policy", "interval"), slow_but(QUICK, alternating(KINDS, [1, 4])))
def test_padded_second_prompts_are_what_they_are_alone(
    model: Any, policy: str, interval: int
) -> None:
    rules = dict(budget=20, interval=interval, recent=8, sinks=1, protect_prompt=False)
    firsts = [distinct_tokens(1, n, seed=n)[0] for n in (9, 30, 22)]
    seconds = [distinct_tokens(1, n, seed=40 + n)[0] for n in (25, 3, 12)]
    batch = CompressedCache(policy, **rules)
    (ids, mask), new = _padded(firsts), 6
    text = _generate(model, ids, batch, new, attention_mask=mask)
    more, more_mask = _padded(seconds)
    mask = torch.cat([mask, torch.ones(3, new, dtype=torch.long), more_mask], dim=1)
    text = torch.cat([text, more], dim=1)
    together = _generate(model, text, batch, attention_mask=mask)
    for row, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        alone = CompressedCache(policy, **rules)
        answer = _generate(model, first[None], alone, new)
        expected = _generate(model, torch.cat([answer, second[None]], dim=1), alone)
        assert torch.equal(together[row, -12:], expected[0, -12:])
        for layer in range(2):
            assert held(batch, layer, row) == held(alone, layer)


def test_only_the_first_prompt_is_protected(model: Any) -> None:
    cache = CompressedCache("random", 40, protect_prompt=True, recent=4)
    text = _generate(model, distinct_tokens(1, 20), cache, 30)
    text = torch.cat([text, distinct_tokens(1, 30, seed=2)], dim=1)
    _generate(model, text, cache, 30)
    for head in held(cache, 0):
        assert set(range(20)) <= set(head)


# Chunks.


@pytest.mark.parametrize("policy", slow_but((*QUICK, "shadowkv"), (*KINDS, "shadowkv")))
def test_a_chunk_for_everything_is_no_chunk(model: Any, policy: str) -> None:
    ids = distinct_tokens(2, 30)
    cache, whole = (
        CompressedCache(policy, 16, protect_prompt=False),
        CompressedCache(policy, 16, protect_prompt=False),
    )
    got = _generate(model, ids, cache, prefill_chunk_size=64)
    assert torch.equal(got, _generate(model, ids, whole))
    assert [held(cache, layer) for layer in range(2)] == [held(whole, layer) for layer in range(2)]


@pytest.mark.parametrize(("policy", "chunk"), slow_but(QUICK, alternating(UNIFORM, [2, 7, 29])))
def test_chunks_with_a_budget_for_everything_give_the_tokens_of_the_dynamic_cache(
    model: Any, policy: str, chunk: int
) -> None:
    rows = [distinct_tokens(1, n, seed=n)[0] for n in (30, 17, 5)]
    ids, mask = _padded(rows)
    expected = _generate(model, ids, DynamicCache(), attention_mask=mask)
    cache = CompressedCache(policy, 60, protect_prompt=False)
    got = _generate(model, ids, cache, attention_mask=mask, prefill_chunk_size=chunk)
    assert torch.equal(got, expected)


def test_chunks_never_hold_more_than_budget_and_chunk(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressed_cache.ops import attention

    sizes: list[int] = []
    original = attention.attention_rows

    def watched(queries: torch.Tensor, keys: torch.Tensor, **more: Any) -> Any:
        sizes.append(keys.shape[2])
        return original(queries, keys, **more)

    monkeypatch.setattr(attention, "attention_rows", watched)
    cache = CompressedCache("h2o", 32)
    _generate(model, distinct_tokens(1, 350), cache, prefill_chunk_size=50)
    assert max(sizes) == 32 + 50
    assert cache.layers[0].keys.shape[2] == 32
    assert cache.evicted_tokens == 350 + 11 - 32


@pytest.mark.parametrize("policy", UNIFORM)
@pytest.mark.parametrize("chunk", [1, 8])
def test_a_chunk_of_one_token_is_of_the_prompt(model: Any, policy: str, chunk: int) -> None:
    """With padding, and again in a further turn."""
    rows = [distinct_tokens(1, n, seed=n)[0] for n in (25, 17, 5)]
    ids, mask = _padded(rows)
    cache, other = CompressedCache(policy, 80, protect_prompt=False), DynamicCache()
    # The last token of an answer is read with the next turn.
    for length in (25, 25 + 11 + 9):
        assert ids.shape[1] == length
        got = _generate(model, ids, cache, attention_mask=mask, prefill_chunk_size=chunk)
        assert cache.counter.prompt == length
        assert torch.equal(got, _generate(model, ids, other, attention_mask=mask))
        ids = torch.cat([got, distinct_tokens(3, 8, seed=3)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 20), value=1)


@pytest.mark.parametrize(("chunk", "interval"), [(13, 1), (39, 3), (1, 1)])
def test_a_last_chunk_of_one_token_is_protected(model: Any, chunk: int, interval: int) -> None:
    cache = CompressedCache("knorm", 45, protect_prompt=True, recent=2, interval=interval)
    _generate(model, distinct_tokens(1, 40), cache, 40, prefill_chunk_size=chunk)
    assert cache.counter.prompt == 40
    for layer in range(2):
        assert all(set(range(40)) <= set(head) for head in held(cache, layer))


def test_a_turn_of_one_token_is_a_step(model: Any) -> None:
    cache = CompressedCache("h2o", 16)
    model(distinct_tokens(1, 30), past_key_values=cache)
    _generate(model, distinct_tokens(1, 31), cache, 5, prefill_chunk_size=7)
    assert cache.counter.prompt == 30


def test_a_prompt_in_chunks_is_protected_as_a_whole(model: Any) -> None:
    cache = CompressedCache("random", 40, protect_prompt=True, recent=4)
    _generate(model, distinct_tokens(1, 30), cache, 60, prefill_chunk_size=7)
    for head in held(cache, 1):
        assert set(range(30)) <= set(head)
    with pytest.raises(ValueError, match="budget must be at least prompt"):
        cache = CompressedCache("random", 30, protect_prompt=True, recent=4)
        _generate(model, distinct_tokens(1, 30), cache, prefill_chunk_size=7)


# Snapshots, rows and files.


@pytest.mark.parametrize("policy", slow_but(QUICK, KINDS))
def test_one_context_answers_many_questions(model: Any, policy: str) -> None:
    context = distinct_tokens(1, 40)
    cache = CompressedCache(policy, 24, interval=3, recent=8, protect_prompt=False)
    model(context, past_key_values=cache)
    addresses = [tensor.data_ptr() for tensor in cache.layers[0].tensors()]
    snapshot, answers = cache.snapshot(), []
    for copied in (False, True):
        for question in (3, 20):
            text = torch.cat([context, distinct_tokens(1, question, seed=question)], dim=1)
            used = copy.deepcopy(cache) if copied else cache
            answers.append(_generate(model, text, used))
            fresh = CompressedCache(policy, 24, interval=3, recent=8, protect_prompt=False)
            model(context, past_key_values=fresh)
            assert torch.equal(answers[-1], _generate(model, text, fresh))
            for layer in range(2):
                assert held(used, layer) == held(fresh, layer)
            cache.restore(snapshot)
            assert cache.get_seq_length() == 40
    assert [tensor.data_ptr() for tensor in cache.layers[0].tensors()] == addresses


@pytest.mark.slow
def test_a_restored_cache_needs_no_other_graph(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    torch._dynamo.reset()
    model, context, backend = make_model(), distinct_tokens(1, 40), CountingBackend()
    cache = CompressedCache("h2o", 24)
    model(context, past_key_values=cache)
    snapshot = cache.snapshot()
    for question in (5, 9):
        cache.restore(snapshot)
        text = torch.cat([context, distinct_tokens(1, question, seed=question)], dim=1)
        _generate(model, text, cache, compile_config=compiled(backend))
    assert backend.graphs == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("policy", slow_but((*QUICK, "shadowkv"), (*KINDS, "shadowkv")))
def test_rows_can_be_repeated_and_chosen(model: Any, policy: str) -> None:
    ids = distinct_tokens(2, 30)
    repeated, chosen, plain = (CompressedCache(policy, 16, protect_prompt=False) for _ in range(3))
    for cache in (repeated, chosen, plain):
        model(ids, past_key_values=cache)
    repeated.batch_repeat_interleave(3)
    chosen.batch_select_indices(torch.tensor([1]))
    expected = _generate(model, torch.cat([ids, distinct_tokens(2, 8, seed=8)], dim=1), plain)
    more = distinct_tokens(2, 8, seed=8).repeat_interleave(3, dim=0)
    text = torch.cat([ids.repeat_interleave(3, dim=0), more], dim=1)
    assert torch.equal(_generate(model, text, repeated), expected.repeat_interleave(3, dim=0))
    text = torch.cat([ids, distinct_tokens(2, 8, seed=8)], dim=1)[1:]
    assert torch.equal(_generate(model, text, chosen), expected[1:])


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
from compressed_cache import CompressedCache

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
cache = CompressedCache.load(folder + "/cache.safetensors")
text = torch.load(folder + "/text.pt")
out = model.generate(text, past_key_values=cache, max_new_tokens=12, do_sample=False)
torch.save(out, folder + "/out.pt")
"""


@pytest.mark.parametrize("name", ["Gemma 2", "GPT-OSS"])
def test_a_file_knows_padding_and_how_logits_become_weights(name: str, tmp_path: Path) -> None:
    """Soft-capped logits, learned sinks and sliding windows; a turn that begins with padding."""
    (family,) = (family for family in FAMILIES if family.name == name)
    model, ids = family.make(), distinct_tokens(2, 50) % 150 + 1
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, 30:34] = 0
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    caches = [CompressedCache("h2o", 16)]
    with torch.no_grad():
        for start, end in ((0, 30), (30, 49), (49, 50)):
            inputs = dict(attention_mask=mask[:, :end], position_ids=places[:, start:end])
            logits = [model(ids[:, start:end], past_key_values=c, **inputs).logits for c in caches]
            assert torch.equal(logits[0], logits[-1])
            if not start:
                caches[0].save(tmp_path / "cache.safetensors")
                caches.append(CompressedCache.load(tmp_path / "cache.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["random", "snapkv"])
def test_another_process_goes_on_from_a_file(model: Any, policy: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    context = distinct_tokens(2, 30)
    cache = CompressedCache(policy, 16, interval=3, sinks=1, recent=8, protect_prompt=False)
    first = _generate(model, context, cache, 10)
    cache.save(tmp_path / "cache.safetensors")
    text = torch.cat([first, distinct_tokens(2, 8, seed=1)], dim=1)
    torch.save(text, tmp_path / "text.pt")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)],
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert torch.equal(torch.load(tmp_path / "out.pt"), _generate(model, text, cache))
    loaded = CompressedCache.load(tmp_path / "cache.safetensors")
    assert loaded.rules == cache.rules and loaded.policy == cache.policy


def test_a_refused_prompt_leaves_nothing_behind(model: LlamaForCausalLM) -> None:
    long, short, token = distinct_tokens(1, 30), distinct_tokens(1, 5), torch.tensor([[7]])
    used, fresh = (CompressedCache("h2o", 16, protect_prompt=True) for _ in range(2))
    with pytest.raises(ValueError, match="budget must be at least"):
        model(long, past_key_values=used)
    with torch.no_grad():
        for cache in (used, copy.deepcopy(used), pickle.loads(pickle.dumps(used)), fresh):
            first = model(short, past_key_values=cache).logits
            found = first, model(token, past_key_values=cache).logits
            assert cache.get_seq_length() == 6
            if cache is not fresh:
                other = found
    torch.testing.assert_close(found, other, rtol=0, atol=0)


def test_a_crop_of_the_first_call_keeps_the_model(
    model: LlamaForCausalLM, make_model: Callable[..., LlamaForCausalLM]
) -> None:
    torch.manual_seed(5)
    other = make_model().apply(model._init_weights)
    cache = CompressedCache("h2o", 16)
    cache.activate_past_recording()
    model(distinct_tokens(1, 30), past_key_values=cache)
    cache.crop(-5)
    with pytest.raises(ValueError, match="model must be the one that read the prompt"):
        other(distinct_tokens(1, 1), past_key_values=cache)


@pytest.mark.parametrize("shape", [(2, 24), (1, 30), (2, 1)])
def test_after_a_crop_of_the_whole_first_call_any_prompt_may_come(
    model: LlamaForCausalLM, shape: tuple[int, int]
) -> None:
    used, fresh = CompressedCache("h2o", 16), CompressedCache("h2o", 16)
    used.activate_past_recording()
    ids, token = distinct_tokens(*shape), distinct_tokens(shape[0], 1)
    with torch.no_grad():
        model(distinct_tokens(2, 20), past_key_values=used)
        used.crop(-20)
        assert used.get_seq_length() == 0
        found, expected = (
            [model(part, past_key_values=cache).logits for part in (ids, token)]
            for cache in (used, fresh)
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for layer in range(2):
        assert held(used, layer) == held(fresh, layer)


def test_a_hybrid_comes_back_to_what_it_held() -> None:
    hybrid = next(family for family in FAMILIES if family.name == "Qwen3-Next").make()
    cache, token = CompressedCache("h2o", 16), torch.tensor([[7]])
    with torch.no_grad():
        hybrid(torch.arange(10, 30)[None], past_key_values=cache)
        snapshot = cache.snapshot()
        expected = hybrid(token, past_key_values=cache).logits
        cache.restore(snapshot)
        assert cache.get_seq_length() == 20
        found = hybrid(token, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_drafting_that_is_over_says_nothing_of_the_next_prompt(model: LlamaForCausalLM) -> None:
    used, fresh = CompressedCache("h2o", 16), CompressedCache("h2o", 16)
    first, token, last = distinct_tokens(1, 30), torch.tensor([[7]]), distinct_tokens(1, 12)
    used.expected_prompt = 20
    with torch.no_grad():
        for cache in (used, fresh):
            cache.activate_past_recording()
            model(first[:, :20], past_key_values=cache)
            for _ in range(2):
                # Nobody crops, so the second of these is not drafted.
                model(token, past_key_values=cache)
            cache.activate_past_recording()
            model(last, past_key_values=cache)
    for layer in range(2):
        assert held(used, layer) == held(fresh, layer)
    assert used.expected_prompt is None
