"""Every message a user can meet, word for word, and that the cache is still good after it."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    DeepseekV3Config,
    Gemma3nTextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
)
from transformers.modeling_utils import AttentionInterface

from compressed_cache import POLICIES, CompressedCache, Policy, Slots
from compressed_cache.policies import SLOT_POLICIES, make_policy
from compressed_cache.policies.capabilities import needs_of
from compressed_cache.policies.methods.rkv import RKV
from compressed_cache.policies.methods.snapkv import SnapKV
from compressed_cache.versions import cache_argument
from tests.conftest import distinct_tokens
from tests.model_types import MODELS, WINDOW, make

BUDGET = (
    "budget must be an int >= 1, a list with one for each layer, or a list of lists with one for "
    "each key/value head of each layer"
)
KNOWN = ", ".join(repr(name) for name in sorted(POLICIES))


@dataclass(frozen=True, kw_only=True)
class Mine(Policy):
    power: float = 2.0

    def scores(self, slots: Slots) -> torch.Tensor:
        return slots.values.norm(p=self.power, dim=-1)[..., :1]


@dataclass(frozen=True, kw_only=True)
class Whole(Policy):
    def scores(self, slots: Slots) -> torch.Tensor:
        return slots.values.float().sum(-1)


class Bare(Policy):
    power: float = 2.0

    def scores(self, slots: Slots) -> torch.Tensor:
        return slots.values.norm(p=self.power, dim=-1)


class Scoreless(Policy):
    pass


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
        f"policy must be a name or a Policy object, got {SnapKV!r} (type). Write SnapKV()",
    ),
    (dict(policy=Scoreless()), TypeError, "Scoreless must define scores(slots)"),
    # A slip that would fill the screen.
    (
        dict(policy=LlamaConfig()),
        TypeError,
        "policy must be a name or a Policy object, got LlamaConfig",
    ),
    (
        dict(policy=SnapKV(), window=4),
        TypeError,
        "policy options must be given to the policy object itself, got ['window'] beside "
        f"{SnapKV()!r}",
    ),
    (dict(budget=0.5), TypeError, f"{BUDGET}, got 0.5 (float)"),
    (dict(budget=256.0), TypeError, f"{BUDGET}, got 256.0 (float)"),
    (dict(budget="256"), TypeError, f"{BUDGET}, got '256' (str)"),
    (dict(budget=True), TypeError, f"{BUDGET}, got True (bool)"),
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
        "unknown option 'windows' for policy 'snapkv', expected one of 'kernel_size', 'pool', "
        "'window'. "
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
        "CompressedCache cannot serve this model: an encoder-decoder model attends to its encoder, "
        "where nothing is decoded.",
    ),
    (
        dict(config=DeepseekV3Config()),
        NotImplementedError,
        "CompressedCache cannot serve this model: multi-head latent attention caches one latent "
        "vector for all heads, not keys.",
    ),
    (
        dict(config=LlamaConfig(num_hidden_layers=1, layer_types=["chunked_attention"])),
        NotImplementedError,
        "CompressedCache cannot serve this model: it has layers of type 'chunked_attention'.",
    ),
    (
        dict(config=Gemma3nTextConfig()),
        NotImplementedError,
        "CompressedCache cannot serve this model: its last layers read the keys of earlier ones.",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), CONSTRUCTOR)
def test_bad_arguments_are_named_before_any_work(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        CompressedCache(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("policy", SLOT_POLICIES)
def test_defaults_leave_room_in_any_budget(policy: str) -> None:
    for budget in range(needs_of(make_policy(policy)).recent + 1, 40):
        eviction = CompressedCache(policy, budget).eviction
        assert eviction.sinks + eviction.recent < budget


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


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("morphkv", {"window": 30}, "(40 + 30 + 1 = 71), got 64. Raise budget, lower window, or"),
        (
            "rkv",
            {"window": 30, "recent": 31},
            "(40 + 31 + 1 = 72), got 64. Raise budget, lower re",
        ),
        ("pyramidkv", {}, "(40 + 1 = 41), got 34 in layer 1 (its share of 64). Raise budget, or"),
        ("h2o", {"budget": [64, 40]}, "(40 + 1 = 41), got 40 in layer 1. Raise budget, or"),
        ("h2o", {"budget": [[64, 40], [64, 64]]}, "got 40 in a head of layer 0. Raise budget, or"),
    ],
)
def test_a_prompt_that_leaves_no_room_is_told_where_and_what_to_lower(
    model: LlamaForCausalLM, policy: str, options: dict[str, Any], message: str
) -> None:
    cache = CompressedCache(policy, **({"budget": 64, "protect_prompt": True} | options))
    with pytest.raises(ValueError, match=re.escape(message)):
        model(distinct_tokens(1, 40), past_key_values=cache)


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
        assert str(caught.value) == (
            "CompressedCache cannot serve this model: the attention of layer 0 never reached the "
            "cache. It must call what transformers' AttentionInterface.get_interface returns, with "
            "the keys that cache.update returned."
        )


def test_families_that_cannot_work_are_refused_by_the_first_forward() -> None:
    ids = torch.arange(1, 9)[None]
    generate = dict(max_new_tokens=4, do_sample=False)
    small = dict(vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64)
    bart = AutoModelForSeq2SeqLM.from_config(BartConfig(**small, **heads, forced_eos_token_id=None))
    with pytest.raises(NotImplementedError, match="an encoder-decoder model attends to its encod"):
        bart.generate(ids, past_key_values=CompressedCache("h2o", 8), **generate)
    config = DeepseekV3Config(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
        first_k_dense_replace=1,
    )
    latent = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(NotImplementedError, match="multi-head latent attention"):
        latent.generate(ids, past_key_values=CompressedCache("h2o", 8), **generate)


REFUSED = {
    "doge": "its attention is biased by what the values say, in every step anew",
    "falcon_h1": "it has layers of type 'hybrid'",
    "diffllama": "differential attention attends twice to the same keys",
    "deepseek_v4": (
        "it has layers of type 'compressed_sparse_attention', 'heavily_compressed_attention'"
    ),
    "inkling_text": "it has layers of type 'hybrid', 'hybrid_sliding'",
    "falcon_mamba": "it keeps no keys and values, so there is nothing to compress",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_config_is_refused_in_the_same_words_wherever_it_is_met(kind: str) -> None:
    model = make(kind, dict(MODELS)[kind])
    ids = torch.arange(3, 27)[None]

    def forward() -> None:
        cache = cache_argument(CompressedCache("h2o", 64))
        for tokens in (ids, ids[:, :1]):
            model(tokens, **cache)

    for ask in (
        lambda: CompressedCache("h2o", 64, config=model.config),
        lambda: model.generate(
            ids, max_new_tokens=4, do_sample=False, **cache_argument(CompressedCache("full"))
        ),
        forward,
    ):
        with pytest.raises(NotImplementedError) as caught:
            ask()
        assert str(caught.value) == f"CompressedCache cannot serve this model: {REFUSED[kind]}."


def test_a_model_that_keeps_states_of_its_own_is_refused_before_it_complains_itself() -> None:
    for kind, reason in (
        ("minimax", "it keeps its states in a way of its own"),
        ("rwkv", "it keeps its states in a way of its own"),
        ("openai-gpt", "it cannot be given a cache"),
    ):
        model = make(kind, dict(MODELS)[kind])
        for ask in (
            lambda model=model: CompressedCache("h2o", 64, config=model.config),
            lambda model=model: model.generate(
                torch.arange(3, 27)[None],
                max_new_tokens=4,
                **cache_argument(CompressedCache("h2o", 64)),
            ),
        ):
            with pytest.raises(NotImplementedError, match=f"serve this model: {reason}"):
                ask()


@pytest.mark.parametrize("held", [False, True], ids=["prompt", "step"])
def test_attention_is_once_over_what_the_layer_handed_out(
    model: LlamaForCausalLM, held: bool
) -> None:
    module: Any = model.model.layers[0].self_attn
    attention = AttentionInterface().get_interface("sdpa", lambda: None)

    def state(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, 12)

    def handed(cache: CompressedCache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = 1 if cache.layers else 8
        return state(4, tokens), *cache.update(state(2, tokens), state(2, tokens), 0)

    def begin() -> CompressedCache:
        cache = CompressedCache("h2o", 16)
        if held:
            attention(module, *handed(cache), None, scaling=0.3)
        return cache

    cache = begin()
    query, keys, values = handed(cache)
    with pytest.raises(NotImplementedError) as caught:
        attention(module, query, keys, values.repeat(1, 1, 1, 1), None, scaling=0.3)
    assert str(caught.value) == (
        "CompressedCache cannot serve this model: layer 0 attends to other values than those "
        "cache.update returned."
    )
    cache = begin()
    query, keys, values = handed(cache)
    attention(module, query, keys, values, None, scaling=0.3)
    with pytest.raises(NotImplementedError) as caught:
        attention(module, query, keys, values, None, scaling=0.3)
    assert str(caught.value) == (
        "CompressedCache cannot serve this model: the keys of layer 0 are attended to more than "
        "once in one call."
    )


def test_a_window_that_only_the_config_tells_of_is_kept() -> None:
    # Its attention is handed a mask with the window, and not the window.
    model, cache = make("phimoe", "PhimoeForCausalLM"), CompressedCache("full")
    model(torch.arange(3, 27)[None], **cache_argument(cache))
    assert [layer.store.bound.window for layer in cache.layers] == [WINDOW, WINDOW]


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


def test_a_policy_that_scores_by_what_it_did_not_ask_for_is_told(model: LlamaForCausalLM) -> None:
    class Forgetful(Policy):
        def scores(self, slots: Any) -> torch.Tensor:
            return slots.queries.mean(dim=-1)

    with pytest.raises(ValueError, match=r"\. What needs does not ask for is empty$"):
        model(distinct_tokens(1, 20), past_key_values=CompressedCache(Forgetful(), 16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda cache: cache.crop(-1),
            "crop can take back at most the 0 tokens of the last call, got 1. Call "
            "cache.activate_past_recording() before the call that may be taken back.",
        ),
        (
            lambda cache: cache.crop(3),
            "tokens_to_remove must be <= 0, the number of tokens to take back as transformers "
            "counts it, got 3",
        ),
        (
            lambda cache: cache.batch_repeat_interleave(2),
            "batch_repeat_interleave needs a cache that holds a prompt, got an empty one",
        ),
        (
            lambda cache: cache.batch_select_indices(torch.tensor([0])),
            "batch_select_indices needs a cache that holds a prompt, got an empty one",
        ),
        (
            lambda cache: cache.restore(CompressedCache("h2o", 9).snapshot()),
            "snapshot must be of a cache like this one (H2O(), EvictionConfig(budget=8, "
            "interval=1, sinks=0, recent=4 by default, protect_prompt=False)), got one with H2O(), "
            "EvictionConfig(budget=9, interval=1, sinks=0, recent=4 by default, "
            "protect_prompt=False)",
        ),
    ],
)
def test_calls_that_make_no_sense_say_so(
    call: Callable[[CompressedCache], object], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        call(CompressedCache("h2o", 8))
    assert str(caught.value) == message


def test_a_cache_that_is_not_to_be_used_is_refused(model: LlamaForCausalLM) -> None:
    cache, ids = CompressedCache("h2o", 16), distinct_tokens(1, 20)
    with pytest.raises(ValueError, match="use_cache must be True where a cache is given"):
        model.generate(ids, **cache_argument(cache), use_cache=False, max_new_tokens=4)
    assert cache.get_seq_length() == 0


def test_another_model_needs_a_reset(make_model: Callable[..., LlamaForCausalLM]) -> None:
    ids, cache = distinct_tokens(1, 20), CompressedCache("h2o", 16)
    first, twin = make_model(), make_model()
    wide = make_model(head_dim=16)
    first(ids, past_key_values=cache)
    for model, message in (
        (twin, "model must be the one that read the prompt, got another. Call cache.reset() "),
        (
            wide,
            "keys must be those of the model that read the prompt (2 heads of 12, float32 on "
            "cpu), got 2 heads of 16, float32 on cpu. Call cache.reset() ",
        ),
    ):
        for tokens in (1, 5):
            with pytest.raises(ValueError) as caught:
                model(ids[:, :tokens], past_key_values=cache)
            assert str(caught.value) == f"{message}or use a new CompressedCache."
            cache.reset()
            first(ids, past_key_values=cache)


def test_files_that_are_not_a_saved_cache_are_refused(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        CompressedCache.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        CompressedCache.load(tmp_path / "text")
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights")
    message = r"must be written by CompressedCache.save in format 9, got format None"
    with pytest.raises(ValueError, match=message):
        CompressedCache.load(tmp_path / "weights")
    cache = CompressedCache(Whole(), 16)
    model(distinct_tokens(1, 20), past_key_values=cache)
    cache.save(tmp_path / "own")
    with pytest.raises(ValueError, match=r"saved with a policy of your own\. Pass it as policy="):
        CompressedCache.load(tmp_path / "own")
    assert CompressedCache.load(tmp_path / "own", policy=Whole()).get_seq_length() == 20
    message = r"policy must be that of '.*own', 'Whole' \{\}, got 'snapkv' \{\"window\": 8, "
    with pytest.raises(ValueError, match=message):
        CompressedCache.load(tmp_path / "own", policy=SnapKV(window=8))


def test_a_file_that_cannot_be_written_is_named_and_the_cache_stays(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    cache = CompressedCache("h2o", 16)
    model(distinct_tokens(1, 20), past_key_values=cache)
    with pytest.raises(FileNotFoundError, match=r"^path must be in a folder that is there, got '/"):
        cache.save(tmp_path / "missing" / "cache.safetensors")
    with pytest.raises(OSError, match=rf"^'{tmp_path}' cannot be written: .*directory"):
        cache.save(tmp_path)
    cache.save(tmp_path / "cache.safetensors")
    assert CompressedCache.load(tmp_path / "cache.safetensors").get_seq_length() == 20


def test_a_model_is_no_config(model: LlamaForCausalLM) -> None:
    message = "config must be a model's config, got a LlamaForCausalLM. Use config=model.config"
    with pytest.raises(TypeError) as error:
        CompressedCache("h2o", 64, config=model)  # type: ignore[arg-type]
    assert str(error.value) == message
    with pytest.raises(TypeError, match=r"^config must be a model's config, got a str$"):
        CompressedCache("h2o", 64, config="some/model")  # type: ignore[arg-type]


def test_a_policy_without_its_decorator_is_refused() -> None:
    with pytest.raises(TypeError) as error:
        Bare()
    assert str(error.value) == (
        "Bare.power is no option yet. Write @dataclass(frozen=True, kw_only=True) above the class"
    )


def test_a_class_is_no_cache(model: LlamaForCausalLM) -> None:
    CompressedCache("h2o", 16)
    ids, message = distinct_tokens(1, 20), r"^cache must be an object, got the class. Write Comp"
    for call in (model, functools.partial(model.generate, max_new_tokens=2)):
        with pytest.raises(TypeError, match=message):
            call(ids, **cache_argument(CompressedCache))  # type: ignore[arg-type]


def test_policy_objects_are_accepted(model: LlamaForCausalLM) -> None:
    cache = CompressedCache(RKV(window=4, mix_lambda=0.5), 16)
    model.generate(distinct_tokens(1, 20), past_key_values=cache, max_new_tokens=8)
    assert cache.evicted_tokens == 11


def test_continuous_batching_is_refused(model: LlamaForCausalLM) -> None:
    argument = cache_argument(CompressedCache("h2o", 64))
    with pytest.raises(NotImplementedError, match="pages of its own, so a CompressedCache would"):
        model.generate_batch(distinct_tokens(2, 20).tolist(), **argument)
    with pytest.raises(NotImplementedError, match="pages of its own, so a CompressedCache would"):
        model.generate(distinct_tokens(1, 20), cache_implementation="paged", **argument)


def test_a_policy_written_for_names_that_are_gone_is_told_the_new_ones() -> None:
    with pytest.raises(TypeError) as error:
        type("Old", (Policy,), {"num_queries": 4})
    assert str(error.value) == (
        "Old.num_queries is written otherwise now: needs = Needs(queries=...). See CHANGELOG.md."
    )
    view = Slots(*range(len(Slots._fields)))  # type: ignore[arg-type]
    assert view.attention is view.attention_state and view.form is view.transform
