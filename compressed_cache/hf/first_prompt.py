"""The attention of a first prompt: by the model's own function, or together with what a policy
makes of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compressed_cache.hf.checks import implementation_of
from compressed_cache.ops import gradients, masks
from compressed_cache.stores import prompt_attention
from compressed_cache.stores.inputs import AttentionInputs
from compressed_cache.stores.slots import SlotStore


def attend_first_prompt(
    function: Callable[..., Any],
    module: Any,
    store: SlotStore,
    inputs: AttentionInputs,
    attention_mask: Any,
    count: int,
    **arguments: Any,
) -> tuple[tuple[Tensor, Tensor | None], Tensor | None]:
    """Attention of the first ``count`` tokens of a call.

    On a CPU a policy that adds up attention would have to make the weights a second time, which
    takes as long as half of what the model does with them. There one pass does both, and its output
    is that of the model's function up to rounding.

    Args:
        function: the model's own.
        module: of attention.
        store: bound to the module.
        inputs: all tokens of the call.
        attention_mask: what ``function`` is given.
        count: tokens of the prompt.
        arguments: further ones of ``function``.

    Returns:
        What ``function`` returns, and what the policy makes of the attention, see
        :func:`compressed_cache.stores.prompt_attention.observed`, where that is known by now.
    """
    tensors = inputs.query, inputs.key, inputs.value
    length = inputs.real.shape[1]
    if (
        count == length
        and asks_only_for_a_mask(function, arguments)
        and not gradients.wants_gradient(*tensors)
    ):
        both = prompt_attention.attend(store, inputs)
        if both is not None:
            return (both[0], None), both[1]
    prompt = (tensor[:, :, :count] for tensor in tensors)
    own = masks.first_tokens(attention_mask, count, of=length)
    if isinstance(own, Tensor) and own.dtype == torch.bool and implementation_of(module) == "eager":
        # It would take a bool mask for numbers to be added.
        own = masks.additive(own, inputs.query.dtype)
    return function(module, *prompt, own, **arguments), None


def implied_mask(module: Any, key: Tensor, attention_mask: Any, arguments: dict[str, Any]) -> Any:
    """The mask of a call, also where there is none because every token sees all of the call, as in
    a prefix that is read in both directions.

    Args:
        module: of attention.
        key: ``[B, H, L, D]`` the new keys.
        attention_mask: what the attention function was given.
        arguments: further ones of it.
    """
    given = arguments.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if given is None else given
    if attention_mask is not None or is_causal:
        return attention_mask
    ones = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=key.device)
    return ones.expand(-1, -1, key.shape[2], key.shape[2])


def asks_only_for_a_mask(function: Any, arguments: dict[str, Any]) -> bool:
    """Whether it is transformers' function for sdpa, without dropout or what is added to logits."""
    return (
        function is sdpa_attention_forward
        and not arguments.get("dropout")
        and all(arguments.get(name) is None for name in ("position_bias", "softcap", "s_aux"))
    )
