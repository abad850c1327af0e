"""What a policy is shown: the tokens of a layer, rows of attention, and the layer itself."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compressed_cache.ops.attention import LogitTransform


class Slots(NamedTuple):
    """What a policy sees of one layer (legend in :mod:`compressed_cache.ops.eviction`).

    While decoding these are the slots of the cache. At prefill the same fields describe the prompt,
    with ``S`` its length. Policies must not change the tensors.
    """

    keys: Tensor
    """``[B, H, S, D]``, after RoPE, in the dtype of the model; where channels are pruned those that
    stay, as of queries."""
    values: Tensor
    """``[B, H, S, D]``."""
    positions: Tensor
    """``[B, H, S]`` int64, ``-1`` where the slot is empty or padding."""
    attention_state: Tensor
    """``[B, H, S]`` float32, or ``[B, H, S, R]`` with a ``state_width`` ``R > 1``: what
    ``Policy.accumulate`` made of the attention seen so far; without slots unless the policy
    needs ``attention``."""
    notes: Tensor
    """``[B, H, S, N]`` float32, what was written down of each token; ``N`` the policy's
    ``needs.notes``."""
    next_position: Tensor
    """``[B]`` int64, position of the incoming token (the prompt's length at prefill)."""
    layer: int
    """Index of the layer."""
    first_head: int
    """Index in the layer of the first key/value head: not 0 where tensor parallelism shares the
    heads of a layer between processes."""
    transform: LogitTransform
    """How the model turns products of queries and keys into attention weights."""
    queries: Tensor
    """``[B, H, G, W, D]`` last queries seen, in any order, ``W`` the policy's
    ``needs.queries``."""
    query_positions: Tensor
    """``[B, W]`` int64, ``-1`` where no query was seen yet."""
    query_state: Mapping[str, Tensor]
    """``[B, H, G, ...]`` float32 by name, what the policy made of the queries of the first prompt;
    empty unless it observes them."""
    prompt_length: Tensor
    """``[B]`` int64, positions below it are of the first prompt; at prefill as far as it was read.
    """
    protected_prefix: Tensor
    """``[B]`` int64, the cache keeps positions below it whatever their score."""
    recent: int
    """How many tokens before the incoming one the cache keeps whatever their score."""
    budget: int
    """How many tokens are kept: ``S`` while decoding. Where heads have different numbers, that of
    the head with the fewest; see :attr:`budgets`."""
    is_prompt: bool
    """Whether these are the tokens of a prompt that is cut to the budget."""
    constants: Mapping[str, Tensor]
    """What ``Policy.constants`` gave for this layer."""
    hidden_states: Tensor | None = None
    """``[B, S, E]``, what the attention module was given, in the dtype of the model: of new tokens
    in ``WritesNotes.note``, if the policy ``needs.hidden_states``; else None."""
    head_budgets: tuple[int, ...] = ()
    """How many tokens each head keeps where they are given one number each, else empty; ``budget``
    is the least of them."""
    floor: int | None = None
    """Where the heads share ``H * budget`` slots, how many tokens each keeps at least; else
    None."""
    interval: int = 1
    """Steps from one ranking of a decode step to the next, in each of which one token goes."""
    prompt_end: Tensor | None = None
    """``[B]`` int64, the prompt's length where these are a block of it that is ranked on its own,
    and ``next_position`` the end of the block; else None."""

    @property
    def oldest_recent(self) -> Tensor:
        """``[B]`` int64, the cache keeps positions from it on whatever their score."""
        return self.text_end - self.recent

    @property
    def text_end(self) -> Tensor:
        """``[B]`` int64, the ``next_position`` of the text, also in a block of it."""
        return self.next_position if self.prompt_end is None else self.prompt_end

    @property
    def budgets(self) -> tuple[int, ...]:
        """How many tokens each head keeps, one number where that is the same for all."""
        return self.head_budgets or (self.budget,)

    # Names up to 0.1, see CHANGELOG.md.

    @property
    def attention(self) -> Tensor:
        """Deprecated name of :attr:`attention_state`."""
        return self.attention_state

    @property
    def form(self) -> LogitTransform:
        """Deprecated name of :attr:`transform`."""
        return self.transform


class AttentionRows(NamedTuple):
    """Attention of ``Q`` consecutive queries, oldest first."""

    weights: Tensor
    """``[B, H, G, Q, S]`` float32; zeros where the query is padding."""
    query_positions: Tensor
    """``[B, Q]`` int64, ``-1`` at padding."""
    positions: Tensor
    """``[B, H, S]`` int64 of the tokens attended to, ``-1`` where there is none."""


class LayerContext(NamedTuple):
    """Where in a model a layer of the cache works."""

    config: Any
    """The model's text config."""
    module: Any
    """The attention module."""
    layer: int
    """Index of the layer."""
    first_head: int
    """As in :class:`Slots`."""
    heads: int
    """``H``, key/value heads at hand."""
    groups: int
    """``G``."""
    dim: int
    """``D`` of keys."""
    value_dim: int
    """``D`` of values."""
    device: torch.device
    total_heads: int
    """Key/value heads of the whole layer: more than ``H`` where tensor parallelism shares them."""
    hidden_size: int
    """``E``, numbers of a hidden state; 0 unless the policy ``needs.hidden_states``."""
