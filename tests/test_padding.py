"""Every row of a left-padded batch behaves as it does alone."""

import pytest
import torch
from tests.conftest import distinct_tokens, held
from transformers import LlamaForCausalLM

from compressed_cache import POLICIES, CompressedCache

LENGTHS = (9, 30, 17, 41)
NEW = 45


def _padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    return ids, (ids != 0).long()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_a_padded_batch_equal_solo_rows(
    model: LlamaForCausalLM, policy: str, interval: int, implementation: str
) -> None:
    # Rows below and above the budget: some evict at prefill, some in the middle, one late.
    model.set_attn_implementation(implementation)
    options = dict(budget=20, interval=interval, sinks=1, recent=8)
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
    model.set_attn_implementation("sdpa")


def test_padding_may_differ_in_amount_for_the_same_rows(model: LlamaForCausalLM) -> None:
    row = distinct_tokens(1, 25)
    kept = []
    for padding in (0, 1, 13):
        ids, mask = _padded([row, distinct_tokens(1, 25 + padding, seed=3)])
        cache = CompressedCache("snapkv", 16, window=4)
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=30)
        kept.append([held(cache, layer) for layer in range(2)])
    assert kept[0] == kept[1] == kept[2]


def test_padding_on_the_right_is_refused(model: LlamaForCausalLM) -> None:
    ids = distinct_tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match="attention_mask must pad on the left"):
        model(ids, attention_mask=mask, past_key_values=CompressedCache("h2o", 8))
