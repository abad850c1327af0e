"""Attention back ends and dtypes: the same cache under each, and float32 inside."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compressed_cache import POLICIES, CompressedCache
from tests.conftest import distinct_tokens, held
from tests.grids import slow_but
from tests.kinds import KINDS

EVICTING = [name for name in KINDS if name != "full"]
# These rank by position alone, so that all dtypes keep the same tokens.
BY_POSITION = ["random", "streaming_llm"]


def stand_in_for_flash(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What flash attention computes, from the 2-D mask it is given."""
    length = query.shape[2]
    assert attention_mask is None or attention_mask.shape == (query.shape[0], key.shape[2])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    visible = torch.ones(length, key.shape[2], dtype=torch.bool).tril(key.shape[2] - length)
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, :].bool()
    logits = (query @ key.mT) * scaling
    weights = logits.masked_fill(~visible, -1e9).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), None


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the stand-in where the real one is, which the CPU has not."""
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", stand_in_for_flash
    )


def _padded(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = distinct_tokens(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        ids[row, : max(lengths) - length] = 0
    return ids, (ids != 0).long()


def _generate(model: Any, cache: Any, **more: Any) -> torch.Tensor:
    ids, mask = _padded((9, 30, 17))
    generate = dict(max_new_tokens=24, do_sample=False, attention_mask=mask)
    return model.generate(ids, past_key_values=cache, **{**generate, **more})


# Raised by transformers' call of torch, and by torch about flex attention that is not compiled.
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("options", [{}, dict(prefill_chunk_size=8)], ids=["whole", "chunks"])
@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("policy", slow_but(("h2o",), ("h2o", "snapkv", "knorm")))
def test_back_ends_keep_and_say_the_same(
    make_model: Callable[..., LlamaForCausalLM],
    flash_attention: None,
    policy: str,
    implementation: str,
    options: dict[str, int],
) -> None:
    model = make_model(head_dim=16)
    results = []
    for chosen in ("sdpa", implementation):
        # Not set_attn_implementation, which looks for the package.
        model.config._attn_implementation = chosen
        cache = CompressedCache(policy, 16, protect_prompt=False)
        # Inductor's C++ for masks of flex attention does not compile on every CPU.
        with torch.compiler.set_stance("force_eager"):
            text = _generate(model, cache, **options)
        results.append((text, [held(cache, layer, row) for layer in (0, 1) for row in range(3)]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_the_mask_of_flash_attention_is_the_one_that_transformers_makes() -> None:
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]
    padding = torch.tensor([[False, True, True], [True, True, True]])
    mask = make_mask(batch_size=2, q_length=3, kv_length=3, attention_mask=padding)
    assert torch.equal(mask, padding)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", ["h2o", "snapkv", "knorm"])
def test_real_flash_attention_says_what_sdpa_says(
    make_model: Callable[..., LlamaForCausalLM], policy: str
) -> None:
    pytest.importorskip("flash_attn")
    model = make_model(head_dim=16).to("cuda", torch.bfloat16)
    texts = []
    for chosen in ("sdpa", "flash_attention_2"):
        model.set_attn_implementation(chosen)
        ids, mask = (tensor.cuda() for tensor in _padded((9, 30, 17)))
        cache = CompressedCache(policy, 64, protect_prompt=False)
        texts.append(
            model.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False
            )
        )
    assert torch.equal(*texts)


def _logits(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    parts = ids.split([24, *[1] * 36], dim=1)
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits[:, -1:] for part in parts], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", BY_POSITION)
def test_no_dtype_loses_more_than_it_does_under_the_full_cache(
    make_model: Callable[..., LlamaForCausalLM], policy: str, dtype: torch.dtype
) -> None:
    """At most twice the error of the same model in the same dtype with a full cache."""
    exact, model = make_model().double(), make_model().to(dtype)
    # Rounded weights, so that only arithmetic differs.
    exact.load_state_dict({name: w.double() for name, w in model.state_dict().items()})
    ids = distinct_tokens(2, 60)
    errors = []
    for make in (DynamicCache, lambda: CompressedCache(policy, 16, protect_prompt=False)):
        wanted, got = _logits(exact, make(), ids), _logits(model, make(), ids)
        errors.append((got.double() - wanted).abs().mean().item())
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_policy_remembers_is_float32(
    make_model: Callable[..., LlamaForCausalLM], dtype: torch.dtype
) -> None:
    """A sum of attention grows by one per query, which bfloat16 could not count beyond 256."""
    model = make_model().to(dtype)
    cache = CompressedCache("h2o", 512)
    ids = distinct_tokens(1, 390)
    with torch.no_grad():
        model(ids[:, :300], past_key_values=cache)
        for token in range(300, 390):
            model(ids[:, token : token + 1], past_key_values=cache)
    for layer in cache.layers:
        assert layer.store.tokens.attention_state.dtype == torch.float32
        assert layer.keys.dtype == layer.values.dtype == dtype
        expected = torch.full((1, 2), 390.0)
        torch.testing.assert_close(
            layer.store.tokens.attention_state.sum(-1), expected, rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("policy", EVICTING)
def test_scores_are_float32_whatever_the_model(
    make_model: Callable[..., LlamaForCausalLM], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    original = POLICIES[policy].scores

    def watched(self: Any, slots: Any) -> torch.Tensor:
        scores = original(self, slots)
        seen.append(scores.dtype)
        return scores

    monkeypatch.setattr(POLICIES[policy], "scores", watched)
    _generate(make_model().to(torch.bfloat16), CompressedCache(policy, 16, protect_prompt=False))
    assert seen and set(seen) == {torch.float32}
