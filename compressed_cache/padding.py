"""Which tokens are real, read from whatever mask the attention function was given."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


def real_tokens(attention_mask: Any, keys: Tensor) -> Tensor:
    """``True`` where a new token is real, ``False`` at left padding.

    Args:
        attention_mask: what transformers passes to an attention function: None, a bool or additive
            mask ``[B, 1, L, S]`` (sdpa, eager), a 2-D mask ``[B, S]`` (flash attention) or a
            ``BlockMask`` (flex attention). A token is real if its own query sees it, under a
            sliding window too. Only the last ``L`` columns are read.
        keys: ``[B, H, L, D]`` the new keys.

    Returns:
        ``[B, L]`` bool.
    """
    batch, _, length, _ = keys.shape
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=keys.device)
    if isinstance(attention_mask, BlockMask):
        row = torch.arange(batch, device=keys.device)[:, None]
        own = torch.arange(length, device=keys.device)[None]
        real = attention_mask.mask_mod(row, torch.zeros_like(own), own, own)
    elif attention_mask.dim() == 2:
        real = attention_mask[:, -length:].bool()
    else:
        own = attention_mask[:, 0, -length:, -length:].diagonal(dim1=1, dim2=2)
        real = own if own.dtype == torch.bool else own == 0
    return real.expand(batch, length)


def check_left(real: Tensor) -> None:
    """Raises ``ValueError`` if a row of ``[B, L]`` has padding after a real token."""
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError(
            "attention_mask must pad on the left, got padding after a real token. Set "
            "tokenizer.padding_side = 'left'."
        )


def first_tokens(attention_mask: Any, count: int, *, of: int) -> Any:
    """The mask of the first ``count`` of ``of`` new tokens, in the kind that was given.

    Raises:
        NotImplementedError: a part of a ``BlockMask``.
    """
    if attention_mask is None or count == of:
        return attention_mask
    if isinstance(attention_mask, BlockMask):
        raise NotImplementedError(
            "assisted decoding with attn_implementation='flex_attention' is not supported. Use "
            "'sdpa' or 'eager'."
        )
    if attention_mask.dim() == 2:
        return attention_mask[:, : attention_mask.shape[1] - of + count]
    held = attention_mask.shape[-1] - of
    return attention_mask[:, :, :count, : held + count]
