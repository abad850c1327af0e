"""What must be true of scores by arithmetic alone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache
from compressed_cache.ops.attention import LogitTransform
from compressed_cache.policies import POLICIES, LayerContext, Slots, make_policy
from tests.reference.comparison import distinct_tokens

B, H, G, S, D = 2, 3, 2, 40, 8


def _slots(keys: Tensor, *, window: int = 1, policy: Any = None, seed: int = 0) -> Slots:
    """All positions held, in slots of no particular order, the same for the heads of a row."""
    generator = torch.Generator().manual_seed(seed)
    length = keys.shape[2]
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(B)])
    positions = order[:, None].expand(B, H, length)
    keys = keys.gather(2, positions.unsqueeze(-1).expand_as(keys))
    dim = keys.shape[3]
    site = LayerContext(None, None, 0, 0, H, G, dim, dim, keys.device, H, 0)
    return Slots(
        keys=keys,
        values=torch.randn(keys.shape, generator=generator),
        positions=positions,
        next_position=torch.full((B,), length),
        layer=0,
        first_head=0,
        transform=LogitTransform(D**-0.5),
        queries=torch.randn(B, H, G, window, dim, generator=generator),
        query_positions=torch.arange(length - window, length).expand(B, window),
        query_state={},
        attention_state=torch.zeros(B, H, 0),
        notes=torch.zeros(B, H, length, 0),
        prompt_length=torch.zeros(B, dtype=torch.int64),
        protected_prefix=torch.zeros(B, dtype=torch.int64),
        recent=0,
        budget=length,
        is_prompt=False,
        constants={} if policy is None else policy.constants(site),
    )


def _by_position(values: Tensor, slots: Slots) -> Tensor:
    return values.gather(-1, slots.positions.argsort(dim=-1))


def _keys(seed: int = 0) -> Tensor:
    return torch.randn(B, H, S, D, generator=torch.Generator().manual_seed(seed))


def test_mean_cosine_to_all_others_is_a_product_with_the_sum_and_ranks_as_keydiff() -> None:
    keys = _keys()
    directions = torch.nn.functional.normalize(keys.double(), dim=-1)
    pairs = directions @ directions.mT
    mean = (pairs - torch.diag_embed(pairs.diagonal(dim1=-2, dim2=-1))).sum(dim=2) / S
    product = ((directions * directions.sum(dim=2, keepdim=True)).sum(dim=-1) - 1) / S
    torch.testing.assert_close(mean, product, rtol=0, atol=1e-12)
    slots = _slots(keys)
    scores = _by_position(make_policy("keydiff").scores(slots), slots)
    assert torch.equal(scores.argsort(dim=-1), product.argsort(dim=-1, descending=True))


def test_rkv_without_importance_and_duplicates_ranks_as_keydiff_but_for_the_oldest() -> None:
    """No cosine is above 1, so every key spares the oldest one."""
    slots = _slots(_keys())
    rkv = make_policy("rkv", window=1, mix_lambda=0.0, similarity_threshold=1.0)
    scores = _by_position(rkv.scores(slots), slots)
    keydiff = _by_position(make_policy("keydiff").scores(slots), slots)
    assert torch.isinf(scores[..., -1]).all()
    assert torch.equal(scores[..., 1:-1].argsort(dim=-1), keydiff[..., 1:-1].argsort(dim=-1))
    assert not torch.equal(scores[..., :-1].argsort(dim=-1), keydiff[..., :-1].argsort(dim=-1))


def test_hashes_tell_equal_and_opposite_keys_exactly() -> None:
    """Then the guessed redundancy is the plain one."""
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (B, H, S, 1), generator=generator) * 2.0 - 1
    lengths = torch.rand(B, H, S, 1, generator=generator) + 0.5
    policy: Any = make_policy("rkv_lsh")
    slots = _slots(signs * lengths * torch.randn(B, H, 1, D, generator=generator), policy=policy)
    signs = signs.squeeze(-1)
    expected = ((signs * signs.sum(dim=-1, keepdim=True) - 1) / S).softmax(dim=-1)
    found = _by_position(policy.redundancy(slots), slots)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["rkv", "gkv"])
def test_copies_of_a_key_lower_the_rank_of_all_but_the_newest(name: str) -> None:
    """Three of them: of two, each is the newest that the other resembles, so both are spared."""
    policy: Any = make_policy(name, window=4, mix_lambda=0.0)

    def ranks(keys: Tensor) -> Tensor:
        slots = _slots(keys, window=4, policy=policy)
        slots = slots._replace(notes=torch.zeros(B, H, S, policy.needs.notes))
        scores = _by_position(policy.scores(slots), slots)
        return scores.argsort(dim=-1, stable=True).argsort(dim=-1)

    # Keys that have nothing in common.
    keys = torch.eye(S).expand(B, H, S, S).clone()
    before = ranks(keys)
    keys[:, :, 9] = keys[:, :, 15] = keys[:, :, 3]
    after = ranks(keys)
    assert torch.equal(before, torch.arange(S).expand(B, H, S))
    assert (after[..., [3, 9]] == torch.tensor([0, 1])).all()
    assert (after[..., 15] == 15).all()


def test_h2o_loses_no_attention(precise_model: LlamaForCausalLM) -> None:
    """What held tokens have received, plus what the evicted had, is one per query."""
    cache = CompressedCache("h2o", 14, recent=3)
    ids = torch.tensor([distinct_tokens(60, seed=seed) for seed in (1, 2)])
    evicted = torch.zeros(2, 2, 2)
    with torch.no_grad():
        precise_model(ids[:, :10], past_key_values=cache)
        for token in range(10, 60):
            layers: Any = cache.layers
            before = [
                (layer.positions.clone(), layer.store.tokens.attention_state.clone())
                for layer in layers
            ]
            precise_model(ids[:, token : token + 1], past_key_values=cache)
            for index, (layer, (positions, attention)) in enumerate(
                zip(layers, before, strict=True)
            ):
                gone = positions != layer.positions
                evicted[index] += (attention * gone).sum(dim=-1)
                held = layer.store.tokens.attention_state.sum(dim=-1)
                expected = torch.full_like(held, token + 1.0)
                torch.testing.assert_close(held + evicted[index], expected, rtol=1e-5, atol=0)
    assert (evicted > 1).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("finch", {"window": 6}),
        ("gkv", {"window": 6}),
        ("lagkv", {"lag": 5, "cross_scoring": True}),
        ("lagkv", {"lag": 5}),
        ("rkv_lsh", {"window": 6}),
        ("rpc", {"window": 6, "kernel_size": 1}),
    ],
)
def test_a_broken_token_is_the_lowest_and_spoils_no_other(
    name: str, options: dict[str, Any]
) -> None:
    policy: Any = POLICIES[name](**options)

    def scored(keys: Tensor) -> Tensor:
        slots = _slots(keys, window=6, policy=policy)
        slots = slots._replace(notes=torch.zeros(B, H, S, policy.needs.notes))
        if hasattr(policy, "revise"):
            slots = slots._replace(notes=policy.revise(slots))
        return _by_position(policy.scores(slots), slots)

    keys = _keys()
    keys[:, :, 11] = torch.nan
    scores = scored(keys).nan_to_num(nan=-torch.inf, posinf=torch.inf)
    others = torch.arange(S) != 11
    assert (scores[..., 11:12] < scores[..., others]).all()
    assert torch.isfinite(scores[..., others][..., : S - 8]).all()
    for number in (10, 12):
        # Others of the broken token's block are still told apart.
        assert len(scores[..., number].unique()) > 1
