"""ShadowKV against its own float64 reference, and what a layout off the device must keep up."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LogitsProcessorList

from compressed_cache import CompressedCache
from compressed_cache.versions import CACHE
from tests.compiling import CountingBackend, compiled
from tests.conftest import held
from tests.families import EACH_FAMILY, FULL, LINEAR, SLIDING, Family
from tests.reference.comparison import Watch, distinct_tokens, make_model
from tests.reference.llama import ReferenceLlama
from tests.reference.shadowkv import Numbers, ShadowText

STEPS = 24
SMALL = Numbers(budget=12, chunk_size=4, outlier_chunks=2, local_chunks=1)


def make_cache(numbers: Numbers = SMALL) -> CompressedCache:
    return CompressedCache("shadowkv", **asdict(numbers))


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def generate(
    model: LlamaForCausalLM,
    cache: CompressedCache,
    rows: list[list[int]],
    *,
    steps: int = STEPS,
    forced: list[list[int]] | None = None,
    **more: Any,
) -> tuple[Tensor, Watch]:
    watch = Watch(cache, None if forced is None else torch.tensor(forced))
    inputs = padded(rows)
    more = {"do_sample": False, "logits_processor": LogitsProcessorList([watch]), **more}
    output = model.generate(**inputs, **{CACHE: cache}, max_new_tokens=steps, **more)
    return output[:, inputs["input_ids"].shape[1] :], watch


def assert_follows(
    model: LlamaForCausalLM,
    reference: ReferenceLlama,
    lengths: list[int],
    numbers: Numbers,
    tolerance: float,
) -> None:
    texts = [distinct_tokens(n + STEPS, seed=n) for n in lengths]
    prompts = [text[:n] for text, n in zip(texts, lengths, strict=True)]
    forced = [text[n:] for text, n in zip(texts, lengths, strict=True)]
    _, watch = generate(model, make_cache(numbers), prompts, forced=forced)
    for row, prompt in enumerate(prompts):
        text = ShadowText(reference, numbers)
        logits = text.read(prompt)[-1]
        text.seal()
        assert watch.kept(0, row) == text.kept()
        for step in range(STEPS):
            np.testing.assert_allclose(
                watch.logits[step][row].double().numpy(), logits, rtol=0, atol=tolerance
            )
            if step + 1 < STEPS:
                logits = text.read([forced[row][step]])[-1]
                assert watch.kept(step + 1, row) == text.attended


NUMBERS = [
    SMALL,
    replace(SMALL, rank=12),
    replace(SMALL, budget=20, chunk_size=5, outlier_chunks=0, local_chunks=0, rank=20),
    replace(SMALL, budget=3, chunk_size=1, outlier_chunks=0, local_chunks=2),
]


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_what_is_fetched_is_that_of_the_reference(
    precise_model: LlamaForCausalLM, reference: ReferenceLlama, tolerance: float, numbers: Numbers
) -> None:
    # Prompts with chunks to choose from, with as many as are fetched, with none, with no full one.
    assert_follows(precise_model, reference, [70, 27, 9, 3], numbers, tolerance)


@pytest.mark.parametrize("num_key_value_heads", [1, 4])
def test_any_grouping_fetches_what_the_reference_does(
    num_key_value_heads: int, tolerance: float
) -> None:
    model = make_model(seed=2, num_key_value_heads=num_key_value_heads)
    assert_follows(model, ReferenceLlama(model), [66], replace(SMALL, rank=9), tolerance)


def test_a_further_prompt_fetches_by_the_sum_over_its_queries(
    precise_model: LlamaForCausalLM, reference: ReferenceLlama, tolerance: float
) -> None:
    rows = [distinct_tokens(90, seed=seed) for seed in (5, 6)]
    lengths, more = [60, 44], [9, 6]
    cache = make_cache()
    ids = padded([row[:n] for row, n in zip(rows, lengths, strict=True)])
    turns = [row[n + 1 : n + 1 + m] for row, n, m in zip(rows, lengths, more, strict=True)]
    turn = padded(turns)
    mask = ids["attention_mask"]
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        precise_model(**ids, position_ids=places, **{CACHE: cache})
        for fed, seen in (
            (torch.tensor([[row[n]] for row, n in zip(rows, lengths, strict=True)]), 1),
            (turn["input_ids"], turn["attention_mask"]),
            (torch.tensor([[7], [8]]), 1),
        ):
            new = torch.ones_like(fed) * seen
            mask = torch.cat([mask, new], dim=1)
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
            logits = precise_model(
                fed, attention_mask=mask, position_ids=places, **{CACHE: cache}
            ).logits
    for row, tokens in enumerate(rows):
        text = ShadowText(reference, SMALL)
        text.read(tokens[: lengths[row]])
        text.seal()
        text.read([tokens[lengths[row]]])
        text.read(turns[row])
        expected = text.read([7 + row])[-1]
        found = logits[row, -1].double().numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
        assert [held(cache, layer, row) for layer in range(2)] == [
            [list(head) for head in layer] for layer in text.attended
        ]


@pytest.mark.parametrize("rank", [None, 12])
def test_a_prompt_in_parts_is_taken_anew_with_each(
    precise_model: LlamaForCausalLM, reference: ReferenceLlama, tolerance: float, rank: int | None
) -> None:
    numbers = replace(SMALL, rank=rank)
    prompt = distinct_tokens(61, seed=9)
    _, watch = generate(precise_model, make_cache(numbers), [prompt], prefill_chunk_size=26)
    text = ShadowText(reference, numbers)
    for start in (0, 26, 52):
        if start:
            text.open()
        logits = text.read(prompt[start : start + 26])[-1]
        text.seal()
    assert watch.kept(0, 0) == text.kept()
    np.testing.assert_allclose(watch.logits[0][0].double().numpy(), logits, rtol=0, atol=tolerance)
    if rank is None:
        _, whole = generate(precise_model, make_cache(numbers), [prompt])
        assert [watch.kept(c, 0) for c in range(STEPS)] == [whole.kept(c, 0) for c in range(STEPS)]


@pytest.mark.parametrize("rank", [None, 32, 1000])
def test_a_budget_as_long_as_the_prompt_is_full_attention(
    precise_model: LlamaForCausalLM, rank: int | None
) -> None:
    rows = [distinct_tokens(60, seed=1), distinct_tokens(31, seed=2)]
    expected, full = generate(precise_model, CompressedCache("full"), rows)
    cache = make_cache(replace(SMALL, budget=60, rank=rank))
    found, watch = generate(precise_model, cache, rows)
    assert torch.equal(found, expected)
    assert cache.evicted_tokens == 0
    # Turning a key back and forth costs what the float32 angles of transformers leave over.
    error = max(float((a - b).abs().max()) for a, b in zip(full.logits, watch.logits, strict=True))
    assert error <= (0 if rank is None else 1e-5)
    for row in range(2):
        assert [watch.kept(c, row) for c in range(1, STEPS)] == [
            full.kept(c, row) for c in range(1, STEPS)
        ]


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_every_family_can_be_held_off_the_device(family: Family) -> None:
    """Softcaps, sinks, windows, layers without rotation and of linear attention."""
    model, steps = family.make(), range(1, 8)
    inputs = padded([distinct_tokens(60, seed=1), distinct_tokens(51, seed=2)])
    found = []
    caches = [CompressedCache("full"), make_cache(replace(SMALL, budget=60, rank=None))]
    if family.turns:
        # Keys of low rank are turned back.
        caches.append(make_cache(replace(SMALL, budget=60, rank=1000)))
    for cache in caches:
        mask, logits = inputs["attention_mask"], []
        with torch.no_grad():
            model(**inputs, **{CACHE: cache})
            for token in steps:
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                ids = torch.full((2, 1), token)
                logits.append(model(ids, attention_mask=mask, **{CACHE: cache}).logits)
        found.append(torch.cat(logits))
        for layer, kind in zip(cache.layers, family.kinds, strict=True):
            if kind != LINEAR:
                assert layer.is_sliding == (kind == SLIDING)
                holds = cache.policy.name == "shadowkv" and kind == FULL
                assert (layer.store.offloaded_bytes > 0) == holds
    # What a model in float32 or its angles lose when sums are taken in another order.
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 12])
def test_one_graph_for_all_lengths_that_share_a_power_of_two(
    precise_model: LlamaForCausalLM, rank: int | None
) -> None:
    torch._dynamo.reset()
    backend = CountingBackend()
    for lengths in ([70, 40], [55, 31], [20, 3]):
        rows = [distinct_tokens(n, seed=n) for n in lengths]
        numbers = replace(SMALL, rank=rank)
        eager, cache = make_cache(numbers), make_cache(numbers)
        expected, _ = generate(precise_model, eager, rows)
        found, _ = generate(precise_model, cache, rows, compile_config=compiled(backend))
        assert torch.equal(found, expected)
        assert [held(cache, layer) for layer in range(2)] == [
            held(eager, layer) for layer in range(2)
        ]
    assert backend.graphs == 1
    torch._dynamo.reset()


def test_slots_double_for_generated_tokens_and_the_context_stays(
    precise_model: LlamaForCausalLM,
) -> None:
    rows = [distinct_tokens(60, seed=1)]
    cache = make_cache(replace(SMALL, budget=60, rank=12))
    generate(precise_model, cache, rows, steps=2)
    context = [
        cache.layers[0].store.factors.data_ptr(),
        cache.layers[0].store.offloaded_values.data_ptr(),
    ]
    offloaded, capacity = cache.offloaded_bytes, cache.layers[0].keys.shape[2]
    with torch.no_grad():
        for token in range(capacity):
            precise_model(torch.tensor([[1 + token % 100]]), **{CACHE: cache})
    assert cache.layers[0].keys.shape[2] == 2 * capacity
    assert cache.offloaded_bytes == offloaded
    assert context == [
        cache.layers[0].store.factors.data_ptr(),
        cache.layers[0].store.offloaded_values.data_ptr(),
    ]
    assert held(cache, 0)[0][-capacity:] == list(range(61, 61 + capacity))


@pytest.mark.parametrize("rank", [None, 12])
def test_bytes_on_the_device_are_told_from_those_off_it(
    precise_model: LlamaForCausalLM, rank: int | None
) -> None:
    cache = make_cache(replace(SMALL, rank=rank))
    assert cache.offloaded_bytes == cache.nbytes == 0
    generate(precise_model, cache, [distinct_tokens(70, seed=1)] * 3, steps=2)
    # Two layers, three rows, two heads, room for 256 tokens, 16 channels in float64.
    context = 2 * 3 * 2 * 256 * 16 * 8
    assert cache.offloaded_bytes == context * (2 if rank is None else 1)
    layer = cache.layers[0]
    resident = [t for name, t in layer.store.named_tensors().items() if not name.startswith("offl")]
    assert cache.nbytes == 2 * sum(t.nbytes for t in resident)
    assert layer.store.factors.shape == (3, 256, rank or 0)
    assert layer.store.landmarks.shape == (3, 2, 64, 16)
    assert CompressedCache("snapkv").offloaded_bytes == 0


def test_reset_is_as_good_as_new(precise_model: LlamaForCausalLM) -> None:
    used = make_cache(replace(SMALL, rank=12))
    for lengths in ([70], [40], [300], [12]):
        rows = [distinct_tokens(min(n, 150), seed=n) * (1 + n // 150) for n in lengths]
        fresh = make_cache(replace(SMALL, rank=12))
        used.reset()
        found, _ = generate(precise_model, used, rows)
        expected, _ = generate(precise_model, fresh, rows)
        assert torch.equal(found, expected)
        assert held(used, 1) == held(fresh, 1)


@pytest.mark.parametrize("rank", [None, 12])
def test_a_snapshot_and_a_file_go_on_where_they_were(
    precise_model: LlamaForCausalLM, tmp_path: Path, rank: int | None
) -> None:
    prompt = distinct_tokens(80, seed=4)
    cache = make_cache(replace(SMALL, rank=rank))

    def answer(cache: CompressedCache) -> Tensor:
        ids = torch.tensor([prompt])
        return precise_model.generate(ids, **{CACHE: cache}, max_new_tokens=STEPS, do_sample=False)

    with torch.no_grad():
        precise_model(torch.tensor([prompt[:70]]), **{CACHE: cache})
        precise_model(torch.tensor([prompt[70:71]]), **{CACHE: cache})
    moment = cache.snapshot()
    cache.save(tmp_path / "cache.safetensors")
    expected = answer(cache)
    loaded = CompressedCache.load(tmp_path / "cache.safetensors")
    cache.restore(moment)
    for again in (cache, loaded):
        assert torch.equal(answer(again), expected)
        assert again.layers[0].store.context_tokens == 70
        # Enough to use up the slots, whose number is told by how long the prompt was.
        with torch.no_grad():
            for token in range(1, 150):
                precise_model(torch.tensor([[token]]), **{CACHE: again})
    assert held(cache, 1) == held(loaded, 1)


def test_beams_drafts_and_repeated_rows_give_the_text_of_the_full_cache(
    precise_model: LlamaForCausalLM,
) -> None:
    """With room for everything, so that what they move about must arrive."""
    prompt = torch.tensor([distinct_tokens(40, seed=7), distinct_tokens(40, seed=8)])
    row = prompt[:1].repeat(1, 2)
    for ids, mode in (
        (prompt, {"num_beams": 3}),
        (prompt, {"num_return_sequences": 2, "num_beams": 2}),
        (row, {"prompt_lookup_num_tokens": 3}),
    ):
        texts = []
        for name, options in (("full", {}), ("shadowkv", {"rank": None, "budget": 80})):
            torch.manual_seed(0)
            cache = CompressedCache(name, **options)
            settings = {"do_sample": False, "max_new_tokens": STEPS, **mode}
            texts.append(precise_model.generate(ids, **{CACHE: cache}, **settings))
        assert torch.equal(*texts), mode
    cache = make_cache()
    with torch.no_grad():
        precise_model(prompt, **{CACHE: cache})
        cache.batch_select_indices(torch.tensor([1, 1, 0]))
        logits = precise_model(torch.tensor([[3]] * 3), **{CACHE: cache}).logits
    alone = make_cache()
    with torch.no_grad():
        precise_model(prompt[1:], **{CACHE: alone})
        expected = precise_model(torch.tensor([[3]]), **{CACHE: alone}).logits
    torch.testing.assert_close(logits[:2], expected.expand(2, -1, -1))
    assert held(cache, 0, 0) == held(cache, 0, 1) == held(alone, 0)


def test_a_broken_key_is_fetched_last_and_stays_where_it_is(
    precise_model: LlamaForCausalLM,
) -> None:
    ids = torch.tensor([distinct_tokens(80, seed=3)])
    wrong, good = (make_cache(replace(SMALL, rank=12)) for _ in range(2))

    def poison(module: Any, args: Any, output: Tensor) -> Tensor:
        output[:, 10:11] = torch.nan
        return output

    with torch.no_grad():
        handle = precise_model.model.layers[1].self_attn.k_proj.register_forward_hook(poison)
        precise_model(ids, **{CACHE: wrong})
        handle.remove()
        precise_model(ids, **{CACHE: good})
        for token in range(1, 10):
            logits = precise_model(torch.tensor([[token]]), **{CACHE: wrong}).logits
            precise_model(torch.tensor([[token]]), **{CACHE: good})
            assert logits.isfinite().all()
    assert held(wrong, 0) == held(good, 0)
    for head in held(wrong, 1):
        assert not {8, 9, 10, 11} & set(head)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"budget": 100, "chunk_size": 8}, ValueError, "multiple of chunk_size"),
        ({"sinks": 4}, ValueError, "must be left alone"),
        ({"recent": 4}, ValueError, "must be left alone"),
        ({"interval": 2}, ValueError, "must be left alone"),
        ({"protect_prompt": True}, ValueError, "must be left alone"),
        ({"rank": 0}, ValueError, "rank must be >= 1 or None"),
        ({"rank": 1.5}, TypeError, "rank must be an int or None"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be >= 1"),
        ({"outlier_chunks": -1}, ValueError, "outlier_chunks must be >= 0"),
        ({"local_chunks": -1}, ValueError, "local_chunks must be >= 0"),
        ({"local_chunks": True}, TypeError, "local_chunks must be an int"),
    ],
)
def test_bad_numbers_are_refused_in_words(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        CompressedCache("shadowkv", **options)
