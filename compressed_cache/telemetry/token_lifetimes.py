"""From when to when each token of one layer is held."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from compressed_cache.layer import CompressedLayer
from compressed_cache.telemetry.trace import Columns


class TokenLifetimes:
    """What became of the tokens of one layer, kept by position, not by slot.

    So it does not matter where a layout has a token, or that it moves.
    """

    def __init__(self, layer: CompressedLayer) -> None:
        sizes = layer.store.sizes
        self._layer = layer.index
        self._first_head = layer.store.bound.shard.rank * sizes.heads
        self._held = torch.zeros(sizes.batch, sizes.heads, 0, dtype=torch.bool, device=sizes.device)
        self._missed = self._held.float()
        self._knows_missed = False
        self._ends: list[Tensor] = []
        self._steps: list[int] = []
        self._evicted: list[tuple[int, Tensor]] = []
        self._losses: dict[int, tuple[Tensor, Tensor]] = {}

    def settle(self, layer: CompressedLayer, step: int, weights: Tensor | None) -> None:
        """Compares what is held now with what was held before.

        Args:
            layer: the layer after a call.
            step: the number of this call.
            weights: ``[B, H, T]`` the attention of its last query over a full cache; None: not
                known.
        """
        end = layer.store.next_position[:, None, None]
        place = torch.arange(int(end.max()), device=end.device)
        before = pad(self._held, (0, len(place) - self._held.shape[2]))
        first = self._ends[-1].to(end.device)[:, None, None] if self._ends else 0
        known = before | ((place >= first) & (place < end))
        # The first place takes empty slots, of which there are two kinds.
        slots = layer.store.held_positions().clamp(min=-1) + 1
        in_slots = pad(torch.zeros_like(known), (1, 0)).scatter_(2, slots, True)[:, :, 1:]
        # A token that is only off the device has not left.
        self._held = in_slots if layer.store.bound.policy.evicts else known
        gone = known & ~self._held
        self._evicted.append((step, gone.nonzero().cpu()))
        self._ends.append(layer.store.next_position.to("cpu", copy=True))
        self._steps.append(step)
        if weights is None:
            return
        self._knows_missed = True
        missing = (place < end) & ~self._held
        # A prompt may have been read in chunks, each with evictions of its own.
        dropped = missing if step == 0 else gone
        shares = [(weights * part).sum(dim=-1).cpu() for part in (~in_slots, dropped)]
        self._losses[step] = shares[0], shares[1]
        self._missed = pad(self._missed, (0, len(place) - self._missed.shape[2]))
        if step:
            self._missed += weights * missing

    @property
    def prompt_lengths(self) -> list[int]:
        """Tokens of each row's first prompt."""
        chunks = self._steps.count(0)
        return self._ends[chunks - 1].tolist()

    def tokens(self) -> Columns:
        """The columns of ``trace.TOKENS``."""
        ends = torch.stack(self._ends).numpy()
        evicted = np.full(self._held.shape, -1)
        for step, gone in self._evicted:
            evicted[tuple(gone.numpy().T)] = step
        missed = self._missed.cpu().numpy()
        if not self._knows_missed:
            missed = np.full(self._held.shape, np.nan)
        inserted = np.zeros(self._held.shape, dtype=int)
        place = np.arange(self._held.shape[2])
        for row in range(len(inserted)):
            call = np.searchsorted(ends[:, row], place, side="right")
            inserted[row] = np.append(self._steps, -1)[call]
        # A shorter row ends before the others.
        row, head, position = np.nonzero(inserted >= 0)
        where = row, head, position
        return {
            "row": row,
            "layer": np.full(len(row), self._layer),
            "head": head + self._first_head,
            "position": position,
            "inserted": inserted[where],
            "evicted": evicted[where],
            "attention": missed[where],
        }

    def losses(self) -> Columns:
        """The columns of ``trace.LOSSES``."""
        steps = list(self._losses)
        empty = torch.zeros(0, *self._held.shape[:2])
        lost, dropped = (
            torch.stack([self._losses[step][part] for step in steps]) if steps else empty
            for part in (0, 1)
        )
        step, row, head = np.indices(lost.shape).reshape(3, -1)
        return {
            "row": row,
            "step": np.asarray(steps, dtype=int)[step],
            "layer": np.full(len(row), self._layer),
            "head": head + self._first_head,
            "lost": lost.flatten().numpy(),
            "dropped": dropped.flatten().numpy(),
        }
