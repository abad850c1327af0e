"""Modifiers that change how a layer holds and attends its tokens."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from compressed_cache import CompressedCache
from compressed_cache.contiguous import closed_up, rotary_constants
from compressed_cache.rotary import rotary_of
from tests.families import VOCABULARY, Family
from tests.reference.comparison import (
    assert_same_kept,
    assert_same_logits,
    distinct_tokens,
    run_library,
)
from tests.reference.llama import ReferenceLlama
from tests.reference.policies import POLICIES, Rules

ROTATIONS = (
    Family("halves", "LlamaConfig"),
    Family("a part, in halves", "Phi3Config", dict(sliding_window=None, partial_rotary_factor=0.5)),
    Family("a part, in neighbours", "Glm4Config", dict(partial_rotary_factor=0.5)),
    Family("neighbours", "CohereConfig"),
    Family("none in one layer", "SmolLM3Config", dict(no_rope_layers=[1, 0])),
    Family(
        "scaled",
        "LlamaConfig",
        dict(
            rope_parameters=dict(
                rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=64
            )
        ),
    ),
)
FAR = 50_000_000


def turned(model: Any, attention: Any, keys: Tensor, by: Tensor) -> Tensor:
    """Keys ``[1, 1, L, D]`` turned on by ``by`` ``[L]`` tokens, with the model's own function."""
    if not getattr(attention, "use_rope", True):
        return keys
    cos, sin = model.model.rotary_emb(keys, by[None])
    # The keys carry the scaling of the angles already.
    scaling = getattr(model.model.rotary_emb, "attention_scaling", 1.0)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate(keys, keys, cos / scaling, sin / scaling)[1]


def without_gaps(model: Any, cache: CompressedCache) -> DynamicCache:
    """A full cache that holds what ``cache`` holds, at the positions 0, 1, 2 and so on."""
    full = DynamicCache()
    for index, layer in enumerate(cache.layers):
        attention = model.model.layers[index].self_attn
        heads = []
        for head in range(layer.positions.shape[1]):
            positions, order = layer.positions[0, head].sort()
            order, positions = order[positions >= 0], positions[positions >= 0]
            places = torch.arange(len(order))
            keys = layer.keys[:, head : head + 1, order]
            keys = turned(model, attention, keys, places - positions)
            heads.append((keys, layer.values[:, head : head + 1, order]))
        full.update(*(torch.cat(parts, dim=1) for parts in zip(*heads, strict=True)), index)
    return full


@pytest.mark.parametrize("family", ROTATIONS, ids=lambda family: family.name)
@torch.no_grad()
def test_a_further_prompt_sees_what_the_model_sees_of_keys_without_gaps(family: Family) -> None:
    model = family.make()
    text = torch.tensor([distinct_tokens(45, seed=3)]) % VOCABULARY
    cache = CompressedCache("h2o+key_rerotation", 12, sinks=1, interval=2)
    for start, end in [(0, 30), *((token, token + 1) for token in range(30, 40))]:
        model(text[:, start:end], past_key_values=cache)
    assert cache.evicted_tokens == 28
    expected = model(
        text[:, 40:],
        past_key_values=without_gaps(model, cache),
        position_ids=torch.arange(12, 17)[None],
    )
    found = model(text[:, 40:], past_key_values=cache)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=2e-5)
    assert not torch.allclose(
        found.logits, model(text[:, 40:], past_key_values=CompressedCache()).logits, atol=1e-3
    )


def test_a_thousand_steps_do_not_drift(
    precise_model: LlamaForCausalLM, reference: ReferenceLlama, tolerance: float
) -> None:
    prompt, steps = distinct_tokens(12, seed=1), 1000
    forced = [distinct_tokens(1, seed=seed)[0] for seed in range(steps)]
    rules = Rules(10, sinks=2)
    name = "streaming_llm+key_rerotation"
    _, watch = run_library(precise_model, [prompt], steps, name=name, rules=rules, forced=[forced])
    trace = reference.generate(prompt, steps, score=POLICIES[name], rules=rules, forced=forced)
    assert_same_kept(trace, watch, 0)
    assert_same_logits(trace, watch, 0, tolerance)


@torch.no_grad()
def test_the_same_tokens_far_into_a_text_are_attended_alike(
    precise_model: LlamaForCausalLM,
) -> None:
    """The angles that the model computes there are off by whole turns, and so must be undone."""
    attention = precise_model.model.layers[0].self_attn
    rotary = rotary_of(precise_model.config, attention, 0, 16)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 6, 16, generator=generator)
    queries = torch.randn(1, 4, 1, 16, generator=generator)
    near = torch.tensor([[[5, 0, -1, 3, 1, 2], [4, 5, 1, 0, 2, -1]]])
    far = torch.where(near > 1, near + FAR, near)

    def seen(positions: Tensor, own: int) -> tuple[Tensor, Tensor]:
        own_position = torch.tensor([[own]])
        return closed_up(
            rotary.rotate(queries, own_position[:, None]),
            rotary.rotate(keys, positions),
            query_positions=own_position,
            positions=positions,
            constants=rotary_constants(rotary),
        )

    held = (near >= 0)[..., None]
    (near_queries, near_keys), (far_queries, far_keys) = seen(near, 5), seen(far, 5 + FAR)
    torch.testing.assert_close(far_queries, near_queries, rtol=0, atol=1e-5)
    torch.testing.assert_close(far_keys * held, near_keys * held, rtol=0, atol=1e-5)
    places = torch.tensor([[[4, 0, 0, 3, 1, 2], [3, 4, 1, 0, 2, 0]]])
    expected = rotary.rotate(keys, places)
    torch.testing.assert_close(far_keys * held, expected * held, rtol=0, atol=1e-5)


@torch.no_grad()
def test_stored_keys_stay_as_the_model_rotated_them(precise_model: LlamaForCausalLM) -> None:
    text = torch.tensor([distinct_tokens(60, seed=2)])
    full = DynamicCache()
    precise_model(text, past_key_values=full)
    cache = CompressedCache("streaming_llm+key_rerotation", 12, sinks=2)
    for start, end in [(0, 20), *((token, token + 1) for token in range(20, 60))]:
        precise_model(text[:, start:end], past_key_values=cache)
    positions = cache.layers[0].positions
    index = positions[..., None].expand_as(cache.layers[0].keys)
    expected = full.layers[0].keys.gather(2, index)
    torch.testing.assert_close(cache.layers[0].keys, expected, rtol=0, atol=1e-12)


def test_a_model_without_rotary_positions_is_refused() -> None:
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    with pytest.raises(NotImplementedError, match="needs rotary position embeddings"):
        GPT2LMHeadModel(config).generate(
            torch.tensor([[1, 2, 3]]),
            past_key_values=CompressedCache("h2o+key_rerotation", 8),
            max_new_tokens=2,
            pad_token_id=0,
        )
