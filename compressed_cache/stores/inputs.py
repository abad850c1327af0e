"""What attention is given: the tokens of one call, or the one token of a decode step."""

from typing import NamedTuple

import torch
from torch import Tensor

from compressed_cache.ops.masks import Mask


class AttentionInputs(NamedTuple):
    """The tokens of one call."""

    query: Tensor
    """``[B, H * G, L, D]``."""
    key: Tensor
    """``[B, H, L, D]``."""
    value: Tensor
    """``[B, H, L, D]``."""
    real: Tensor
    """``[B, L]`` bool, ``False`` at padding."""
    mask: Mask | None = None
    """What these tokens see; None: those before them."""
    hidden_states: Tensor | None = None
    """``[B, L, E]``, what the attention module was given; None: the policy does not need it."""

    def split(self, count: int) -> tuple["AttentionInputs", "AttentionInputs"]:
        """The first ``count`` tokens, and the others, without what a mask says of these."""
        first, rest = self.part(slice(None, count)), self.part(slice(count, None))
        return first._replace(mask=self.mask and self.mask.first(count)), rest

    def part(self, tokens: slice) -> "AttentionInputs":
        """Some of the tokens, without what a mask says of these."""
        query, key, value = (tensor[:, :, tokens] for tensor in (self.query, self.key, self.value))
        hidden = None if self.hidden_states is None else self.hidden_states[:, tokens]
        return AttentionInputs(query, key, value, self.real[:, tokens], hidden_states=hidden)

    def token(self, index: int, ranks: bool) -> "NewToken":
        """One of the tokens, which is of a decode step that ranks or does not."""
        query, key, value, real, _, hidden = self.part(slice(index, index + 1))
        return NewToken(query, key, value, ranks, real=real[:, 0], hidden_states=hidden)

    def laid_out_by_token(self) -> "AttentionInputs":
        """The same in memory where each token lies as if there were no other, so that a compiled
        step takes all of them, however many."""
        query, key, value = (_apart(tensor, 2) for tensor in (self.query, self.key, self.value))
        hidden = None if self.hidden_states is None else _apart(self.hidden_states, 1)
        return AttentionInputs(query, key, value, _apart(self.real, 1), hidden_states=hidden)

    def detach(self) -> "AttentionInputs":
        """The same without gradients."""
        query, key, value = (x.detach() for x in (self.query, self.key, self.value))
        return self._replace(query=query, key=key, value=value)

    def positions(self, first: Tensor | int) -> Tensor:
        """Positions ``[B, L]`` int64 from ``first`` (``[B, 1]``) on, ``-1`` at padding."""
        return torch.where(self.real, first + self.real.cumsum(dim=1) - 1, -1)


class NewToken(NamedTuple):
    """One token per row, and what is asked of the step."""

    query: Tensor
    """``[B, H * G, 1, D]``."""
    key: Tensor
    """``[B, H, 1, D]``."""
    value: Tensor
    """``[B, H, 1, D]``."""
    ranks: bool
    """Whether the slots are ranked before, for this step and the next ``interval - 1``."""
    wants_weights: bool = False
    """Whether the weights are wanted even where they must be made for it."""
    real: Tensor | None = None
    """``[B]`` bool, ``False`` in rows whose token is padding: they hold on to what they have. None:
    no row is padded."""
    mask: Mask | None = None
    """What the tokens see; None: all that is held."""
    hidden_states: Tensor | None = None
    """``[B, 1, E]``, as in :class:`AttentionInputs`."""


def _apart(tensor: Tensor, dim: int) -> Tensor:
    """A copy in which what is at one place of ``dim`` lies together."""
    # Strides of what is contiguous already need not be those of others.
    return tensor.movedim(dim, 0).clone(memory_format=torch.contiguous_format).movedim(0, dim)
