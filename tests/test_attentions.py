"""Attention weights that a model returns, and attention functions of a user's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compressed_cache import CompressedCache
from compressed_cache.ops.attention import LogitTransform
from compressed_cache.versions import cache_argument
from tests.conftest import distinct_tokens
from tests.test_masks import LAYOUTS


def _assert_close(got: Tensor, expected: Tensor) -> None:
    # The softmax of transformers' eager attention is in float32.
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("policy", [policy for policy in LAYOUTS if policy != "shadowkv"])
def test_weights_of_a_later_call_are_over_the_slots_and_then_the_new_tokens(
    make_model: Callable[..., LlamaForCausalLM], policy: str
) -> None:
    model = make_model(attn_implementation="eager").double()
    context, question = distinct_tokens(2, 20), distinct_tokens(2, 5, seed=9)
    dynamic, cache = DynamicCache(), CompressedCache(policy, **LAYOUTS[policy])
    with torch.no_grad():
        for other in (dynamic, cache):
            model(context, **cache_argument(other))
        owners = [layer.held().positions.clone() for layer in cache.layers]
        expected, got = (
            model(question, **cache_argument(other), output_attentions=True).attentions
            for other in (dynamic, cache)
        )
        step = model(question[:, :1], **cache_argument(cache), output_attentions=True).attentions
    assert len(got) == len(step) == 2
    for layer, (weights, wanted) in enumerate(zip(got, expected, strict=True)):
        slots = owners[layer].shape[2]
        assert weights.shape == (2, 4, 5, slots + 5)
        _assert_close(weights[..., slots:], wanted[..., 20:].to(weights.dtype))
        for row in range(2):
            for head in range(4):
                positions = owners[layer][row, head // 2]
                held = positions >= 0
                by_position = wanted[row, head][:, positions[held]].to(weights.dtype)
                _assert_close(weights[row, head][:, :slots][:, held], by_position)
                assert (weights[row, head][:, :slots][:, ~held] == 0).all()
        torch.testing.assert_close(step[layer].sum(dim=-1), torch.ones(2, 4, 1))


def _cooler(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **more: Any):
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling / 2, **more)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """Gives an attention function a name, with the masks of sdpa, for one test."""

    def register(name: str, function: Any) -> None:
        monkeypatch.setitem(AttentionInterface._global_mapping, name, function)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, sdpa_mask)

    return register


def test_an_attention_function_of_ones_own_is_refused_by_its_name(
    make_model: Callable[..., LlamaForCausalLM], register: Callable[[str, Any], None]
) -> None:
    register("cooler", _cooler)
    model, ids = make_model(attn_implementation="cooler"), distinct_tokens(1, 20)
    model.generate(ids, max_new_tokens=2, do_sample=False)
    for policy in ("full", "h2o"):
        cache = CompressedCache(policy, 64)
        with pytest.raises(NotImplementedError, match="'cooler' calls '_cooler'"):
            model.generate(ids, **cache_argument(cache), max_new_tokens=2, do_sample=False)
        assert cache.get_seq_length() == 0


def test_another_name_for_a_function_of_transformers_changes_nothing(
    make_model: Callable[..., LlamaForCausalLM], register: Callable[[str, Any], None]
) -> None:
    register("mine", sdpa_attention_forward)
    ids, texts = distinct_tokens(1, 20), []
    for name in ("sdpa", "mine"):
        model: Any = make_model(attn_implementation=name)
        argument = cache_argument(CompressedCache("h2o", 16))
        texts.append(model.generate(ids, **argument, max_new_tokens=9, do_sample=False))
    assert torch.equal(*texts)


@pytest.mark.parametrize("around", ["the prompt", "the steps", "both"])
@pytest.mark.parametrize("policy", LAYOUTS)
def test_autocast_may_begin_and_end_anywhere(
    make_model: Callable[..., LlamaForCausalLM], policy: str, around: str
) -> None:
    model, ids = make_model(), distinct_tokens(2, 20)
    more = distinct_tokens(2, 6, seed=2)
    logits = []
    for cache in (DynamicCache(), CompressedCache(policy, **LAYOUTS[policy])):
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=around != "the steps"):
                model(ids, **cache_argument(cache))
            with torch.autocast("cpu", torch.bfloat16, enabled=around != "the prompt"):
                parts = [
                    model(part, **cache_argument(cache)).logits
                    for part in more.split([1, 1, 3, 1], dim=1)
                ]
        logits.append(torch.cat(parts, dim=1))
    assert logits[0].dtype == logits[1].dtype
    # Steps are rounded less than those of the dynamic cache where both are under autocast.
    torch.testing.assert_close(*(one.float() for one in logits), rtol=0, atol=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_device_that_can_widen_products_copies_no_keys(dtype: torch.dtype) -> None:
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Recorder():
        queries = torch.empty(2, 4, 3, 5, 16, dtype=dtype, device="cuda")
        keys = torch.empty(2, 4, 32, 16, dtype=dtype, device="cuda")
        logits = LogitTransform(0.5).logits(queries, keys)
    assert (logits.shape, logits.dtype) == ((2, 4, 3, 5, 32), torch.float32)
    assert torch.ops.aten.bmm.dtype in seen
    assert torch.ops.aten._to_copy.default not in seen
