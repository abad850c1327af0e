"""All tokens of one call: some read as a prompt, the others one by one."""

import torch
from torch import Tensor

from compressed_cache.step_counter import StepCounter
from compressed_cache.stores.decode_step import decode_step
from compressed_cache.stores.inputs import AttentionInputs
from compressed_cache.stores.prefill import prefill, prefill_chunk
from compressed_cache.stores.slots import SlotStore


def read_call(
    store: SlotStore,
    inputs: AttentionInputs,
    counter: StepCounter,
    observed: Tensor | None = None,
    *,
    is_filled: bool,
    wants_weights: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Reads the tokens of one call, as many of them as a prompt as ``counter`` says.

    Args:
        store: where to.
        inputs: the tokens.
        counter: counts the call.
        observed: what the policy makes of the attention of a first prompt, where it is known.
        is_filled: whether the store holds a prompt already.
        wants_weights: whether the weights are returned.

    Returns:
        The output ``[B, L, H * G, D]``, but of a first prompt only that of the tokens after it,
        None if there are none: the model itself computes that of the prompt. And the weights
        ``[B, H * G, L, S + L]`` over what was held before and then the new tokens; None unless all
        of them were read together.
    """
    count, length = counter.prompt_tokens, inputs.real.shape[1]
    is_first = counter.is_first_prompt
    if is_filled and count >= length:
        return prefill_chunk(store, inputs, is_first_prompt=is_first, wants_weights=wants_weights)
    if is_filled and not count:
        return _read_steps(store, inputs, counter, wants_weights=wants_weights)
    prompt, steps = inputs.split(count)
    outputs: list[Tensor] = []
    if is_filled:
        outputs.append(prefill_chunk(store, prompt, is_first_prompt=is_first)[0])
    else:
        prefill(store, prompt.detach(), observed)
    if steps.real.shape[1]:
        outputs.append(_read_steps(store, steps, counter)[0])
    return torch.cat(outputs, dim=1) if outputs else None, None


def _read_steps(
    store: SlotStore, inputs: AttentionInputs, counter: StepCounter, *, wants_weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Drafted tokens one by one: exactly what decoding them would give."""
    outputs, kept = [], []
    for token in range(inputs.real.shape[1]):
        # What a mask says of drafted tokens is that they follow one another.
        mask = inputs.mask if inputs.real.shape[1] == 1 else None
        new = inputs.token(token, counter.ranks_at(token))
        new = new._replace(wants_weights=wants_weights, mask=mask)
        output, weights = decode_step(store, new)
        outputs.append(output)
        if weights is not None:
            kept.append(weights.flatten(1, 2))
    weights = torch.cat(kept, dim=2) if len(kept) == len(outputs) else None
    return torch.cat(outputs, dim=2).transpose(1, 2), weights
