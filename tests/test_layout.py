"""Modifiers that change how a layer holds and attends its tokens."""

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from compressed_cache import CompressedCache
from compressed_cache.ops.kernels import operators
from compressed_cache.ops.rerotation import rerotate_to_ranks
from compressed_cache.ops.rotary import rotary_of
from compressed_cache.policies import LayerContext, Policy, PrefillDecode, make_policy
from compressed_cache.policies.methods.h2o import H2O
from compressed_cache.policies.methods.snapkv import SnapKV
from compressed_cache.policies.methods.think import ThinK
from tests.compiling import CountingBackend, compiled
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
        keys, values = (torch.cat(parts, dim=1) for parts in zip(*heads, strict=True))
        full.update(keys, values, index)
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


@pytest.mark.slow
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
        return rerotate_to_ranks(
            rotary.rotate(queries, own_position[:, None]),
            rotary.rotate(keys, positions),
            query_positions=own_position,
            positions=positions,
            constants=rotary.constants(),
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
    full: Any = DynamicCache()
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
    model: Any = GPT2LMHeadModel(config)
    with pytest.raises(NotImplementedError, match="needs rotary position embeddings"):
        model.generate(
            torch.tensor([[1, 2, 3]]),
            past_key_values=CompressedCache("h2o+key_rerotation", 8),
            max_new_tokens=2,
            pad_token_id=0,
        )


# Channels.

SMALL: dict[str, Any] = dict(channel_ratio=0.3, think_recent=5, think_window=4)
BOTH = ("snapkv+key_rerotation", "snapkv+think")


def read(model: Any, cache: CompressedCache, text: Tensor, *ends: int) -> Tensor:
    """Logits of the last tokens, after a prompt up to the first end and further ones."""
    logits = torch.empty(0)
    with torch.no_grad():
        for start, end in pairwise((0, *ends)):
            logits = model(text[:, start:end], past_key_values=cache).logits
    return logits


def steps(start: int, end: int) -> range:
    """Ends of single tokens."""
    return range(start + 1, end + 1)


def without_channels(cache: CompressedCache) -> DynamicCache:
    """A full cache that holds what ``cache`` holds, with zeros where a channel was left out."""
    full = DynamicCache()
    for index, layer in enumerate(cache.layers):
        recent, newest = layer.store.recent_channels.shape[2], int(layer.store.next_position[0]) - 1
        keys = torch.zeros(
            *layer.keys.shape[:3], layer.store.channels.shape[2], dtype=layer.keys.dtype
        )
        for head, positions in enumerate(layer.positions[0].tolist()):
            channels = layer.store.channels[0, head].tolist()
            for slot, position in enumerate(positions):
                held = layer.keys[0, head, slot].tolist()
                if position > newest - recent:
                    held += layer.store.recent_channels[0, head, position % recent].tolist()
                for channel, entry in zip(channels, held, strict=False):
                    keys[0, head, slot, channel] = entry
        full.update(keys, layer.values, index)
    return full


@torch.no_grad()
def test_a_further_prompt_sees_old_keys_without_channels_and_all_of_itself(
    precise_model: LlamaForCausalLM,
) -> None:
    text = torch.tensor([distinct_tokens(60, seed=4)])
    cache = CompressedCache("h2o+think", 12, recent=3, interval=2, **SMALL)
    read(precise_model, cache, text, 30, *steps(30, 40))
    chosen = [layer.store.channels.clone() for layer in cache.layers]
    for start, end in [(40, 43), (43, 55), (55, 60)]:
        expected = precise_model(
            text[:, start:end],
            past_key_values=without_channels(cache),
            position_ids=torch.arange(start, end)[None],
        )
        found = precise_model(text[:, start:end], past_key_values=cache)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-9)
    for layer, channels in zip(cache.layers, chosen, strict=True):
        assert torch.equal(layer.store.channels, channels)


@torch.no_grad()
def test_slots_hold_the_channels_that_stay_of_the_keys(precise_model: LlamaForCausalLM) -> None:
    text = torch.tensor([distinct_tokens(60, seed=2)])
    full: Any = DynamicCache()
    precise_model(text, past_key_values=full)
    keys = full.layers[0].keys[0]
    cache = CompressedCache("streaming_llm+think", 12, sinks=2, **SMALL)
    # A prompt, further ones that are shorter and longer than the ring, and steps.
    ends = 20, 23, 36, *steps(36, 60)
    for start, end in pairwise((0, *ends)):
        precise_model(text[:, start:end], past_key_values=cache)
        layer = cache.layers[0]
        for head in range(2):
            assert sorted(layer.store.channels[0, head].tolist()) == list(range(16))
            kept, left = layer.store.channels[0, head].split([12, 4])
            expected = keys[head, layer.positions[0, head]][:, kept]
            torch.testing.assert_close(layer.keys[0, head], expected, rtol=0, atol=1e-12)
            last = torch.arange(end - 5, end)
            found = layer.store.recent_channels[0, head, last % 5]
            torch.testing.assert_close(found, keys[head, last][:, left], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_cache_takes_as_much_less_memory_as_channels_are_left_out() -> None:
    dim, budget, recent, window = 64, 256, 32, 32
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=dim,
        vocab_size=50,
    )
    model = LlamaForCausalLM(config).eval()
    held = {}
    for name in ("snapkv", "snapkv+think"):
        cache = CompressedCache(name, budget)
        read(model, cache, torch.arange(300)[None] % 50, 300)
        held[name] = cache.nbytes
    left_out = int(dim * 0.4)
    # Of two heads: channels of slots and of recorded queries, less the ring and the order.
    saved = 2 * left_out * 4 * (budget + 2 * window - recent) - 2 * dim * 8
    assert held["snapkv"] - held["snapkv+think"] == saved > 0.15 * held["snapkv"]


@pytest.mark.parametrize("name", ["h2o+think", "snapkv+think", "h2o+key_rerotation"])
@torch.no_grad()
def test_padded_rows_are_what_they_are_alone_over_two_prompts(
    precise_model: LlamaForCausalLM, name: str
) -> None:
    options = SMALL if name.endswith("think") else {}
    lengths, second = [24, 9, 17], [6, 2, 8]
    texts = [distinct_tokens(40, seed=seed) for seed in range(3)]

    def padded(parts: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, parts))
        rows = [[0] * (width - len(part)) + part for part in parts]
        mask = [[0] * (width - len(part)) + [1] * len(part) for part in parts]
        return torch.tensor(rows), torch.tensor(mask)

    def run(rows: list[int]) -> list[Tensor]:
        cache = CompressedCache(name, 12, sinks=1, recent=2, interval=2, **options)
        calls = [
            [texts[row][: lengths[row]] for row in rows],
            *[
                [texts[row][lengths[row] + i : lengths[row] + i + 1] for row in rows]
                for i in (0, 1)
            ],
            [texts[row][lengths[row] + 2 : lengths[row] + 2 + second[row]] for row in rows],
            *[[texts[row][35 + i : 36 + i] for row in rows] for i in range(4)],
        ]
        mask, logits = torch.empty(len(rows), 0, dtype=torch.long), []
        for call in calls:
            ids, here = padded(call)
            own = mask.sum(dim=1, keepdim=True) + here.cumsum(dim=1) - 1
            mask = torch.cat([mask, here], dim=1)
            output = precise_model(
                ids,
                attention_mask=mask,
                position_ids=own.clamp(min=0),
                past_key_values=cache,
            )
            logits.append(output.logits[:, -1])
        return logits

    together = run([0, 1, 2])
    for row in range(3):
        for found, alone in zip(together, run([row]), strict=True):
            torch.testing.assert_close(found[row], alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BOTH)
def test_files_and_rows_hold_all_of_it(
    precise_model: LlamaForCausalLM, tmp_path: Path, name: str
) -> None:
    options = SMALL if name.endswith("think") else {}
    text = torch.tensor([distinct_tokens(50, seed=seed) for seed in (5, 6)])
    cache = CompressedCache(name, 14, window=5, recent=5, interval=1, **options)
    read(precise_model, cache, text, 20, *steps(20, 25))
    cache.save(tmp_path / "cache.safetensors")
    loaded = CompressedCache.load(tmp_path / "cache.safetensors")
    swapped = CompressedCache.load(tmp_path / "cache.safetensors")
    swapped.batch_select_indices(torch.tensor([1]))
    for end in steps(25, 40):
        with torch.no_grad():
            token = text[:, end - 1 : end]
            expected = precise_model(token, past_key_values=cache).logits
            assert torch.equal(precise_model(token, past_key_values=loaded).logits, expected)
            alone = precise_model(token[1:], past_key_values=swapped).logits
        torch.testing.assert_close(alone, expected[1:], rtol=0, atol=1e-6)


@torch.no_grad()
def test_nothing_left_out_changes_nothing(precise_model: LlamaForCausalLM) -> None:
    text = torch.tensor([distinct_tokens(50, seed=7)])
    ends = 20, *steps(20, 40), 50
    plain = read(precise_model, CompressedCache("h2o", 12), text, *ends)
    all_recent = CompressedCache("h2o+think", 12, channel_ratio=0.9, think_recent=50)
    no_channel = CompressedCache("h2o+think", 12, channel_ratio=0.0)
    for cache in (all_recent, no_channel):
        found = read(precise_model, cache, text, *ends)
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-9)


def test_a_broken_token_does_not_choose_the_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 2, 2, 9, 8, generator=generator)
    keys = torch.randn(1, 2, 9, 8, generator=generator)
    policy = ThinK(base=H2O(), think_window=4)
    real, kept = torch.ones(1, 9, dtype=torch.bool), torch.ones(1, 2, 9, dtype=torch.bool)
    broken_queries, broken_keys = queries.clone(), keys.clone()
    broken_queries[:, :, 0, 6, 3] = broken_keys[:, :, 2, 5] = torch.nan
    queries[:, :, 0, 6] = keys[:, :, 2] = 0.0
    expected = policy.channel_scores(queries, real, keys, kept)
    assert expected.min() > 0
    assert torch.equal(policy.channel_scores(broken_queries, real, broken_keys, kept), expected)


class Bound(H2O):
    """Has a tensor for the channels of keys."""

    name = "bound"

    def constants(self, site: LayerContext) -> dict[str, Tensor]:
        return {"direction": torch.ones(site.dim)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_policy("h2o+key_rerotation+think"), "leaves out.*key_rerotation knows"),
        (lambda: make_policy("h2o+think+key_rerotation"), "leaves out.*key_rerotation knows"),
        (lambda: make_policy("h2o+think+caote+key_rerotation"), "key_rerotation knows them all"),
        (lambda: ThinK(base=Bound()), "bound knows them all by their place"),
        (lambda: ThinK(base=PrefillDecode(prompt=Bound(), decoding=SnapKV())), "bound knows them"),
        (lambda: PrefillDecode(prompt=ThinK(base=H2O()), decoding=SnapKV()), "held in both phases"),
        (lambda: make_policy("full+think"), "full evicts none"),
        (lambda: make_policy("h2o+think", channel_ratio=1.0), "channel_ratio must be from 0 to"),
        (lambda: make_policy("h2o+think", channel_ratio=-0.1), "channel_ratio must be from 0 to"),
        (lambda: make_policy("h2o+think", think_recent=0), "think_recent must be >= 1, got 0"),
        (lambda: make_policy("h2o+think", think_window=0), "think_window must be >= 1, got 0"),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], Policy], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_a_step_is_one_graph(precise_model: LlamaForCausalLM, name: str) -> None:
    torch._dynamo.reset()
    backend = CountingBackend()
    model: Any = precise_model
    for length in (30, 9):
        ids = torch.tensor([distinct_tokens(length, seed=seed) for seed in (1, 2)])
        texts = []
        for settings in ({}, {"compile_config": compiled(backend)}):
            cache = CompressedCache(name, 16, interval=1, recent=4)
            texts.append(
                model.generate(
                    ids, past_key_values=cache, max_new_tokens=20, do_sample=False, **settings
                )
            )
        assert torch.equal(*texts)
    assert backend.graphs == 1
    torch._dynamo.reset()


def test_the_kernel_for_whole_keys_at_true_positions_stays_out(
    precise_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "serves", lambda sizes: True)
    text = torch.tensor([distinct_tokens(20, seed=1)])
    for name, fused in [("snapkv", True), *((name, False) for name in BOTH)]:
        cache = CompressedCache(name, 12)
        read(precise_model, cache, text, 20)
        assert [layer.store.is_fused for layer in cache.layers] == [fused, fused]


@pytest.mark.parametrize("chunk", [8, 13])
def test_a_row_whose_first_chunks_are_padding_has_the_channels_that_it_has_alone(
    precise_model: LlamaForCausalLM, chunk: int
) -> None:
    """By its first chunk with a token, which begins where it ends alone."""
    text, length = distinct_tokens(30, seed=4), 14
    ids = torch.tensor([text, [0] * (30 - length) + text[:length]])
    mask = (ids > 0).long()
    options: Any = dict(do_sample=False, max_new_tokens=1)
    together, alone = (CompressedCache("h2o+think", 20, think_recent=3) for _ in range(2))
    precise_model.generate(
        ids, attention_mask=mask, past_key_values=together, prefill_chunk_size=chunk, **options
    )
    own = ids[1:, -length:]
    start = chunk - (30 - length) % chunk
    with torch.no_grad():
        for part in (own[:, :start], own[:, start:]):
            precise_model(part, past_key_values=alone)
    for one, other in zip(together.layers, alone.layers, strict=True):
        assert torch.equal(one.store.channels[1], other.store.channels[0])
