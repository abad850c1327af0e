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
            ``BlockMask`` (flex attention). Only the last ``L`` columns are read.
        keys: ``[B, H, L, D]`` the new keys.

    Returns:
        ``[B, L]`` bool.

    Raises:
        ValueError: padding that is not on the left.
    """
    batch, _, length, _ = keys.shape
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=keys.device)
    if isinstance(attention_mask, BlockMask):
        row = torch.arange(batch, device=keys.device)[:, None]
        column = torch.arange(length, device=keys.device)[None]
        last, head = torch.full_like(column, length - 1), torch.zeros_like(column)
        real = attention_mask.mask_mod(row, head, last, column)
    elif attention_mask.dim() == 2:
        real = attention_mask[:, -length:].bool()
    else:
        last_query = attention_mask[:, 0, -1, -length:]
        real = last_query if last_query.dtype == torch.bool else last_query == 0
    real = real.expand(batch, length)
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError(
            "attention_mask must pad on the left, got padding after a real token. Set "
            "tokenizer.padding_side = 'left'."
        )
    return real
