"""A full cache beside the compressed one, to know what it misses."""

import torch
from torch import Tensor

from compressed_cache.layer import CompressedLayer
from compressed_cache.ops import attention
from compressed_cache.stores.growing import power_of_two
from compressed_cache.stores.inputs import AttentionInputs


class Shadow:
    """Every key one layer was given, and how the last query attends to all of them.

    Keys and queries are those of this run: the model sees what the compressed cache gives it, and
    what a run with a full cache would have thought instead is not known here.

    Attributes:
        weights: ``[B, H, T]`` float32 attention of the last query to each position, the mean of the
            query heads of the group.
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self.weights = torch.empty(0)

    def read(self, layer: CompressedLayer, inputs: AttentionInputs) -> None:
        """Takes what a layer has just read."""
        query, key, real = inputs.query, inputs.key, inputs.real
        count = real.sum(dim=1)
        rows = inputs.positions((layer.store.next_position - count)[:, None])
        total = int(layer.store.next_position.max())
        keys = self._room(key, total)
        # The first place takes padding.
        place = (rows + 1)[:, None, :, None].expand_as(key)
        keys.scatter_(2, place, key)
        last = rows.argmax(dim=1)[:, None, None, None]
        query = query.gather(2, last.expand(-1, query.shape[1], -1, query.shape[3]))
        positions = torch.arange(total, device=key.device)
        for weights, _ in attention.attention_rows(
            query,
            keys[:, :, 1 : total + 1],
            query_positions=rows.amax(dim=1, keepdim=True),
            positions=positions[None, None].expand(*key.shape[:2], -1),
            transform=layer.store.bound.transform,
        ):
            self.weights = weights[:, :, :, 0].mean(dim=2)

    def _room(self, key: Tensor, tokens: int) -> Tensor:
        held = self._keys
        if held is None or held.shape[2] <= tokens:
            batch, heads, _, dim = key.shape
            grown = key.new_zeros(batch, heads, power_of_two(tokens + 1), dim)
            if held is not None:
                grown[:, :, : held.shape[2]] = held
            self._keys = held = grown
        return held
