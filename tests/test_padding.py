"""Every row of a left-padded batch behaves as it does alone."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache
from compressed_cache.ops.masks import real_tokens
from compressed_cache.policies import SLOT_POLICIES
from compressed_cache.versions import cache_argument
from tests.conftest import distinct_tokens, held
from tests.grids import alternating, slow_but
from tests.kinds import KINDS, QUICK, SMALL

LENGTHS = (9, 30, 17, 41)
NEW = 45


def _padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    return ids, (ids != 0).long()


@pytest.mark.parametrize(
    ("policy", "interval"),
    slow_but(
        ("keydiff", "h2o", "snapkv", "rkv"),
        alternating(SLOT_POLICIES, [1, 4]),
    ),
)
def test_rows_of_a_padded_batch_generate_what_they_generate_alone(
    make_model: Callable[..., LlamaForCausalLM], policy: str, interval: int
) -> None:
    # Rows below and above the budget: some evict at prefill, some in the middle, one late.
    # float64, because a token that is generated twice has the same key norm in the first layer: a
    # tie that float32 noise would break differently in another batch.
    model = make_model().double()
    options = dict(budget=20, interval=interval, sinks=1, recent=8, protect_prompt=False)
    options |= SMALL.get(policy, {})
    rows = [distinct_tokens(1, length, seed=length) for length in LENGTHS]
    ids, mask = _padded(rows)
    batch = CompressedCache(policy, **options)
    generate = dict(max_new_tokens=NEW, do_sample=False)
    together = model.generate(ids, attention_mask=mask, past_key_values=batch, **generate)
    evicted = []
    for number, row in enumerate(rows):
        alone = CompressedCache(policy, **options)
        expected = model.generate(row, past_key_values=alone, **generate)
        assert torch.equal(together[number, -NEW:], expected[0, -NEW:])
        for layer in range(2):
            assert held(batch, layer, number) == held(alone, layer)
        evicted.append(alone.evicted_tokens)
    assert batch.evicted_tokens == max(evicted)


@pytest.mark.parametrize(
    ("policy", "implementation"), slow_but(QUICK, alternating(KINDS, ["sdpa", "eager"]))
)
def test_masks_of_all_implementations_are_understood(
    make_model: Callable[..., LlamaForCausalLM], policy: str, implementation: str
) -> None:
    model = make_model(attn_implementation=implementation)
    rows = [distinct_tokens(1, length + 20, seed=length) for length in LENGTHS]
    ids, mask = _padded([row[:, :-20] for row in rows])
    steps = torch.cat([row[:, -20:] for row in rows])
    batch = CompressedCache(policy, 20, recent=8, protect_prompt=False)
    lengths = torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=batch)
        for step in range(20):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            token = steps[:, step : step + 1]
            logits = model(
                token, attention_mask=mask, position_ids=lengths + step, past_key_values=batch
            ).logits
        for number, row in enumerate(rows):
            alone = CompressedCache(policy, 20, recent=8, protect_prompt=False)
            for part in row.split([LENGTHS[number], *[1] * 20], dim=1):
                expected = model(part, past_key_values=alone).logits
            torch.testing.assert_close(logits[number, -1], expected[0, -1], rtol=1e-4, atol=1e-4)
            for layer in range(2):
                assert held(batch, layer, number) == held(alone, layer)


def test_padding_may_differ_in_amount_for_the_same_rows(model: LlamaForCausalLM) -> None:
    row = distinct_tokens(1, 25)
    kept = []
    for padding in (0, 1, 13):
        ids, mask = _padded([row, distinct_tokens(1, 25 + padding, seed=3)])
        cache = CompressedCache("snapkv", 16, window=4)
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=30)
        kept.append([held(cache, layer) for layer in range(2)])
    assert kept[0] == kept[1] == kept[2]


def test_block_masks_of_flex_attention_and_masks_of_flash_attention_are_understood() -> None:
    keys = torch.zeros(2, 2, 6, 4)
    real = torch.tensor([[False, False, True, True, True, True], [True] * 6])

    def causal_and_real(row: object, head: object, query: object, key: object) -> torch.Tensor:
        return (key <= query) & real[row, key]

    block_mask = create_block_mask(causal_and_real, 2, None, 6, 6, device="cpu")
    for mask in (block_mask, real, torch.cat([torch.ones(2, 3), real.float()], dim=1)):
        assert torch.equal(real_tokens(mask, keys), real)


def test_padding_on_the_right_is_refused(model: LlamaForCausalLM) -> None:
    ids = distinct_tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match="attention_mask must pad on the left"):
        model(ids, attention_mask=mask, past_key_values=CompressedCache("h2o", 8))


@pytest.mark.parametrize("settings", [{}, dict(prefill_chunk_size=4), dict(prefill_chunk_size=7)])
def test_a_text_that_ends_with_padding_is_not_gone_on_with(
    model: LlamaForCausalLM, settings: dict[str, int]
) -> None:
    """Not even where padding and the tokens before it are in chunks of their own, and not in a
    later turn."""
    ids, cache = distinct_tokens(2, 20), CompressedCache("h2o", 30)
    mask = torch.ones_like(ids)
    mask[0, -6:] = 0
    settings = dict(max_new_tokens=3, do_sample=False, **settings)
    for _ in range(2):
        with pytest.raises(ValueError, match="attention_mask must pad on the left"):
            model.generate(ids, attention_mask=mask, **cache_argument(cache), **settings)
    # A row that has ended, and holds nothing new, is another matter.
    ids, mask = ids[:, :14], mask[:, :14]
    text = model.generate(ids, attention_mask=mask, **cache_argument(cache), **settings)
    more = torch.cat([text, distinct_tokens(2, 6, seed=1)], dim=1)
    mask = torch.ones_like(more)
    mask[0, 16:] = 0
    model.generate(more, attention_mask=mask, **cache_argument(cache), **settings)
    more = torch.cat([more, distinct_tokens(2, 6, seed=2)], dim=1)
    mask = torch.cat([mask, torch.ones(2, 6, dtype=torch.int64)], dim=1)
    mask[1, -2:] = 0
    with pytest.raises(ValueError, match="attention_mask must pad on the left"):
        model.generate(more, attention_mask=mask, **cache_argument(cache), **settings)


def test_embeddings_are_not_read_in_chunks(model: LlamaForCausalLM) -> None:
    embeddings = model.get_input_embeddings()(distinct_tokens(1, 6))
    with pytest.raises(NotImplementedError, match="prefill_chunk_size must be left out"):
        model.generate(
            inputs_embeds=embeddings,
            prefill_chunk_size=4,
            **cache_argument(CompressedCache("h2o", 8)),
            max_new_tokens=2,
        )
