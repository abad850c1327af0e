"""Attention under a mask, without a copy of the keys for each query head of a group."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend_shared(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None
) -> Tensor:
    """Attends with the queries of a group one after the other.

    Args:
        query: ``[B, H * G, L, D]``.
        key: ``[B, H, T, D]``.
        value: ``[B, H, T, D]``.
        mask: ``[B, 1, L, T]`` bool, or what is added to the scores.
        scale: of the scores; None: ``D ** -0.5``.

    Returns:
        ``[B, L, H * G, D]``.
    """
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    output = scaled_dot_product_attention(
        query.reshape(batch, key.shape[1], groups * length, dim),
        key,
        value,
        attn_mask=mask.repeat(1, 1, groups, 1),
        scale=scale,
    )
    return output.reshape(batch, heads, length, -1).transpose(1, 2).contiguous()


@torch.library.custom_op("compressed_cache::attend_used", mutates_args=())
def attend_used(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    columns: Tensor,
    scale: float | None,
) -> Tensor:
    """:func:`attend_shared` over the columns up to the last of ``columns`` ``[L]`` int64.

    So a compiled step on a CPU, where a number can be looked at for nothing, costs no attention to
    memory that is not in use, though its shapes stay.
    """
    used = slice(int(columns[-1]) + 1)
    return attend_shared(query, key[:, :, used], value[:, :, used], mask[..., used], scale)


@attend_used.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, columns: Tensor, scale: float | None
) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1])
