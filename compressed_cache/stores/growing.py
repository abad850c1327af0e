"""A store for policies that evict nothing: it grows with the text."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressed_cache.ops.masks import Mask
from compressed_cache.ops.tokens import Tokens
from compressed_cache.stores.inputs import AttentionInputs
from compressed_cache.stores.slots import SlotStore

_SMALLEST_CAPACITY = 256


class GrowingStore(SlotStore):
    """Keys and values of every token, in the order of their columns.

    Memory doubles when it is full, so that few graphs are compiled. A compiled step attends over
    all of it, because shapes must stay, and so does a further prompt; an eager step over what is
    in use.
    """

    in_use = 0
    """Slots, the same in all rows, after which none holds a token until a call is announced."""

    @property
    def free_slot(self) -> Tensor:
        """0-d int64, the slot of the incoming token."""
        return self.tokens_seen

    def capacities(self, length: int, heads: int) -> tuple[int, int]:
        """Slots of each head for a prompt of this length and a token, and no tokens off the
        device."""
        return power_of_two(length + 1), 0

    def prepare(self, inputs: AttentionInputs) -> None:
        """Makes room for a first prompt; memory that fits is kept."""
        super().prepare(inputs)
        # Drafts may come in the same call.
        self.in_use = self.tokens.positions.shape[2]

    def grow(self, tokens: int) -> None:
        """Doubles the slots until ``tokens`` tokens fit."""
        self.in_use = tokens
        sizes, capacity = self.sizes, power_of_two(tokens)
        if sizes is None or capacity <= sizes.capacity:
            return
        held, tokens_held = self.named_tensors(), self.tokens
        self.allocate(sizes._replace(capacity=capacity))
        tokens_held.copy_into(self.tokens, slice(0, sizes.capacity))
        for name, tensor in self.named_tensors().items():
            if name not in Tokens._fields:
                tensor.copy_(held[name])

    def slots_due(self, ranks: bool, real: Tensor | None) -> Tensor:
        """The free slot ``[B, H, 1]``."""
        return self.free_slot.expand(*self.tokens.positions.shape[:2], 1)

    def keep_chunk(self, tokens: Tokens, new: Tokens, *, is_first_prompt: bool) -> None:
        """Keeps all of a chunk."""
        self.append(new)

    def append(self, tokens: Tokens) -> None:
        """Puts tokens ``[B, H, L, ...]`` into free slots."""
        free = torch.arange(tokens.positions.shape[2], device=tokens.positions.device)
        tokens.copy_into(self.tokens, self.free_slot + free)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of one new token per row, see :meth:`SlotStore.attend`."""
        used = self._used
        output, weights = super().attend(query, keys[:, :, used], values[:, :, used], mask)
        unused = keys.shape[2] - weights.shape[-1]
        return output, pad(weights, (0, unused)) if unused else weights

    def visible(self, mask: Mask | None) -> tuple[Tensor, Tensor | None]:
        """What a new token sees of what :meth:`attend` reads."""
        visible, bias = super().visible(mask)
        return visible[..., self._used], None if bias is None else bias[..., self._used]

    @property
    def _used(self) -> slice:
        return slice(None if torch.compiler.is_compiling() else self.in_use)


def power_of_two(tokens: int) -> int:
    """The smallest power of two, at least 256, that holds ``tokens`` tokens."""
    return max(_SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())
