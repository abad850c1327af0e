"""Every message a user can meet, word for word, and that the cache is still good after it."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, MistralConfig, T5Config
from transformers.modeling_utils import AttentionInterface

from compressed_cache import CompressedCache, Policy, Slots
from compressed_cache.policies.rkv import RKV
from compressed_cache.policies.snapkv import SnapKV
from tests.conftest import distinct_tokens

KNOWN = "'full', 'h2o', 'keydiff', 'knorm', 'random', 'rkv', 'snapkv', 'streaming_llm', 'tova'"


@dataclass(frozen=True, kw_only=True)
class Mine(Policy):
    power: float = 2.0

    def scores(self, slots: Slots) -> torch.Tensor:
        return slots.values.norm(p=self.power, dim=-1)[..., :1]


CONSTRUCTOR = [
    (
        dict(policy="snapvk"),
        ValueError,
        f"unknown policy 'snapvk', expected one of {KNOWN}. Did you mean 'snapkv'?",
    ),
    (dict(policy="zzz"), ValueError, f"unknown policy 'zzz', expected one of {KNOWN}"),
    (dict(policy=7), TypeError, "policy must be a name or a Policy object, got 7 (int)"),
    (
        dict(policy=SnapKV),
        TypeError,
        f"policy must be a name or a Policy object, got {SnapKV!r} (type)",
    ),
    (
        dict(policy=SnapKV(), window=4),
        TypeError,
        "policy options must be given to the policy object itself, got ['window'] beside "
        f"{SnapKV()!r}",
    ),
    (dict(budget=0.5), TypeError, "budget must be an int >= 1, got 0.5 (float)"),
    (dict(budget=256.0), TypeError, "budget must be an int >= 1, got 256.0 (float)"),
    (dict(budget="256"), TypeError, "budget must be an int >= 1, got '256' (str)"),
    (dict(budget=True), TypeError, "budget must be an int >= 1, got True (bool)"),
    (dict(budget=None), TypeError, "budget must be an int >= 1, got None (NoneType)"),
    (dict(budget=0), ValueError, "budget must be an int >= 1, got 0"),
    (dict(budget=-5), ValueError, "budget must be an int >= 1, got -5"),
    (dict(interval=0), ValueError, "interval must be an int >= 1, got 0"),
    (dict(interval=1.5), TypeError, "interval must be an int >= 1, got 1.5 (float)"),
    (dict(sinks=-1), ValueError, "sinks must be an int >= 0, got -1"),
    (dict(recent=-3), ValueError, "recent must be an int >= 0, got -3"),
    (dict(recent="8"), TypeError, "recent must be an int >= 0, got '8' (str)"),
    (dict(protect_prompt=1), TypeError, "protect_prompt must be a bool, got 1 (int)"),
    (
        dict(policy="h2o", budget=32, sinks=4, recent=64),
        ValueError,
        "budget must be at least sinks + recent + 1 (4 + 64 + 1 = 69), got 32. Raise budget or "
        "lower recent.",
    ),
    (
        dict(policy="knorm", budget=32, sinks=32),
        ValueError,
        "budget must be at least sinks + recent + 1 (32 + 0 + 1 = 33), got 32. Raise budget or "
        "lower sinks.",
    ),
    (
        dict(policy="rkv", budget=8),
        ValueError,
        "budget must be at least sinks + recent + 1 (0 + 8 + 1 = 9), got 8. Raise budget or lower "
        "window.",
    ),
    (
        dict(policy="snapkv", windows=4),
        TypeError,
        "unknown option 'windows' for policy 'snapkv', expected one of 'kernel_size', 'window'. "
        "Did you mean 'window'?",
    ),
    (
        dict(policy="tova", window=4),
        TypeError,
        "unknown option 'window' for policy 'tova', it has no options",
    ),
    (dict(window=4.0), TypeError, "window must be an int, got 4.0 (float)"),
    (dict(window=True), TypeError, "window must be an int, got True (bool)"),
    (dict(window=0), ValueError, "window must be >= 1, got 0"),
    (dict(kernel_size=4), ValueError, "kernel_size must be odd and >= 1, got 4"),
    (dict(policy="rkv", mix_lambda="a"), TypeError, "mix_lambda must be a float, got 'a' (str)"),
    (dict(policy="rkv", mix_lambda=2), ValueError, "mix_lambda must be from 0 to 1, got 2"),
    (
        dict(policy="rkv", similarity_threshold=2.0),
        ValueError,
        "similarity_threshold must be from -1 to 1, got 2.0",
    ),
    (dict(policy="random", seed=-1), ValueError, "seed must be >= 0, got -1"),
    (dict(policy="random", redraw=1), TypeError, "redraw must be a bool, got 1 (int)"),
    (
        dict(config=T5Config()),
        NotImplementedError,
        "CompressedCache does not support encoder-decoder models.",
    ),
    (
        dict(config=LlamaConfig(num_hidden_layers=1, layer_types=["sliding_attention"])),
        NotImplementedError,
        "CompressedCache supports full-attention layers only, the model also has "
        "['sliding_attention'].",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), CONSTRUCTOR)
def test_bad_arguments_are_named_before_any_work(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        CompressedCache(**arguments)
    assert str(caught.value) == message


def test_postponed_annotations_are_checked_too() -> None:
    namespace: dict[str, object] = {}
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from compressed_cache import Policy\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Late(Policy):\n    power: float = 2.0\n"
    )
    exec(source, namespace)
    with pytest.raises(TypeError, match=r"power must be a float, got 'x' \(str\)"):
        namespace["Late"](power="x")


def test_another_batch_size_needs_a_reset(model: LlamaForCausalLM) -> None:
    cache = CompressedCache("h2o", 16)
    generate = dict(max_new_tokens=8, do_sample=False)
    model.generate(distinct_tokens(2, 20), past_key_values=cache, **generate)
    message = (
        "batch size must stay 2 until the cache is reset, got 3. Call cache.reset() or use a new "
        "CompressedCache."
    )
    kept = cache.layers[0].positions.clone()
    with pytest.raises(ValueError) as caught:
        model(distinct_tokens(3, 1), past_key_values=cache)
    assert str(caught.value) == message
    assert torch.equal(cache.layers[0].positions, kept)
    assert cache.get_seq_length() == 27
    cache.reset()
    got = model.generate(distinct_tokens(3, 20), past_key_values=cache, **generate)
    fresh = CompressedCache("h2o", 16)
    expected = model.generate(distinct_tokens(3, 20), past_key_values=fresh, **generate)
    assert torch.equal(got, expected)


def test_a_protected_prompt_that_leaves_no_room_says_what_to_do(model: LlamaForCausalLM) -> None:
    cache = CompressedCache("h2o", 24, recent=4, protect_prompt=True)
    with pytest.raises(ValueError) as caught:
        model.generate(distinct_tokens(2, 20), past_key_values=cache, max_new_tokens=8)
    assert str(caught.value) == (
        "budget must be at least prompt + recent + 1 with protect_prompt=True (20 + 4 + 1 = 25), "
        "got 24. Raise budget, lower recent, or set protect_prompt=False."
    )
    # Nothing is lost: the same cache takes a prompt that fits.
    shorter = distinct_tokens(2, 19)
    got = model.generate(shorter, past_key_values=cache, max_new_tokens=8, do_sample=False)
    fresh = CompressedCache("h2o", 24, recent=4, protect_prompt=True)
    assert torch.equal(
        got, model.generate(shorter, past_key_values=fresh, max_new_tokens=8, do_sample=False)
    )


def test_a_padded_row_does_not_count_its_padding_as_prompt(model: LlamaForCausalLM) -> None:
    ids = distinct_tokens(1, 30)
    ids[:, :12] = 0
    cache = CompressedCache("h2o", 24, recent=4, protect_prompt=True)
    model(ids, attention_mask=(ids != 0).long(), past_key_values=cache)
    assert cache.get_seq_length() == 30


def test_attention_that_never_reaches_the_cache_is_an_error(
    make_model: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    for layers in (1, 2):
        model = make_model(num_hidden_layers=layers)
        cache = CompressedCache("knorm", 16)
        original = AttentionInterface.get_interface.__wrapped__
        with monkeypatch.context() as patch, pytest.raises(NotImplementedError) as caught:
            patch.setattr(AttentionInterface, "get_interface", original)
            model.generate(distinct_tokens(1, 8), past_key_values=cache, max_new_tokens=4)
        assert str(caught.value).startswith(
            "layer 0: the model's attention never reached the cache."
        )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_sliding_windows_are_refused(implementation: str) -> None:
    from transformers import MistralForCausalLM

    config = MistralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
        sliding_window=8,
        attn_implementation=implementation,
    )
    model = MistralForCausalLM(config)
    message = r"layer 0 \(MistralAttention\) uses sliding-window attention, which CompressedCache"
    with pytest.raises(NotImplementedError, match=message):
        model(torch.arange(1, 9)[None], past_key_values=CompressedCache("h2o", 8))


def test_an_attention_implementation_that_cannot_work_is_refused(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    model = make_model()
    model.config._attn_implementation = "paged|eager"
    message = r"attn_implementation 'paged\|eager' keeps keys and values in pages of its own"
    with pytest.raises(NotImplementedError, match=message):
        model(distinct_tokens(1, 8), past_key_values=CompressedCache("h2o", 8))


def test_models_without_grouped_queries_work() -> None:
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=60, initializer_range=0.3)
    model, ids = GPT2LMHeadModel(config).eval(), torch.randperm(59)[None, :20] + 1
    generate = dict(max_new_tokens=10, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **generate)
    got = model.generate(ids, past_key_values=CompressedCache("h2o", 40), **generate)
    assert torch.equal(got, expected)


def test_a_policy_must_return_one_score_per_slot(model: LlamaForCausalLM) -> None:
    message = r"Mine.scores must return float32 of shape \[B, H, S\] = \[1, 2, 20\], got "
    with pytest.raises(ValueError, match=message):
        model(distinct_tokens(1, 20), past_key_values=CompressedCache(Mine(), 16))


def test_a_policy_without_scores_says_so(model: LlamaForCausalLM) -> None:
    with pytest.raises(NotImplementedError, match=r"Policy must define scores\(slots\)"):
        model(distinct_tokens(1, 20), past_key_values=CompressedCache(Policy(), 16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: cache.crop(-1), "CompressedCache cannot crop"),
        (lambda cache: cache.batch_repeat_interleave(2), "cannot change its batch size"),
        (lambda cache: cache.batch_select_indices(torch.tensor([0])), "cannot change its batch"),
        (lambda cache: cache.update_conv_state(None, 0), "models with linear-attention layers"),
        (lambda cache: cache.update_recurrent_state(None, 0), "models with linear-attention"),
    ],
)
def test_documented_gaps_say_so(call: Callable[[CompressedCache], object], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        call(CompressedCache("h2o", 8))


def test_a_padded_further_prompt_is_refused(model: LlamaForCausalLM) -> None:
    cache, ids = CompressedCache("h2o", 16), distinct_tokens(2, 20)
    model(ids, past_key_values=cache)
    mask = torch.ones(2, 26, dtype=torch.long)
    mask[0, 20:22] = 0
    with pytest.raises(NotImplementedError, match="a further prompt must have no padding"):
        model(distinct_tokens(2, 6), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 20
    model(distinct_tokens(2, 6), past_key_values=cache)
    assert cache.get_seq_length() == 26


def test_policy_objects_are_accepted(model: LlamaForCausalLM) -> None:
    cache = CompressedCache(RKV(window=4, mix_lambda=0.5), 16)
    model.generate(distinct_tokens(1, 20), past_key_values=cache, max_new_tokens=8)
    assert cache.evicted_tokens == 11
