"""Shorter keys."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.policies.modifier import Modifier


@dataclass(frozen=True, kw_only=True)
class ThinK(Modifier):
    """Keeps of each key only the channels in which queries and keys of the prompt are largest.

    ThinK, section 3.2 (https://arxiv.org/abs/2407.21018): of each key/value head the channels with
    the least ``|q|^2 * |k|^2`` are left out, ``q`` over the last ``think_window`` queries of the
    prompt and ``k`` over the keys that the other policy keeps of it, which it ranks by whole keys,
    as in the authors' code (SalesforceAIResearch/ThinK@d200577). Slots hold the channels that stay
    and nothing else, and a ring holds the others of the last ``think_recent`` tokens, which are
    attended in full.

    Differs in four points: query heads that share a key are averaged, so that they leave out the
    same channels; tokens that are decoded lose theirs as they leave the recent ones (the authors
    prune the prompt only); a prompt that is read in parts, and all later ones, go by the channels
    of the first part (of a row that begins later in the batch, by all keys of the first part with a
    token of it); and after it the scores of the other policy are taken from the channels that
    stay.
    """

    name: ClassVar[str] = "think"
    channel_ratio: float = 0.4
    """Share of the channels that is left out, from 0 to below 1 (the authors' choice)."""
    think_recent: int = 32
    """Last tokens whose keys keep all channels, at least 1 (the authors' choice)."""
    think_window: int = 32
    """Last queries of the prompt that the channels are chosen by (the authors' choice)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.channel_ratio < 1:
            raise ValueError(
                f"channel_ratio must be from 0 to below 1, the share of channels to leave out, got "
                f"{self.channel_ratio}"
            )
        for name in ("think_recent", "think_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    def key_channels(self, dim: int) -> int:
        return dim - int(dim * self.channel_ratio)

    @property
    def recent_whole_keys(self) -> int:
        return self.think_recent

    def channel_scores(self, queries: Tensor, real: Tensor, keys: Tensor, kept: Tensor) -> Tensor:
        last = slice(-self.think_window, None)
        # As many terms for each channel, so that sums rank as means do.
        query = _squares(queries[..., last, :], real[:, None, None, last]).sum(dim=2)
        return query * _squares(keys, kept)


def _squares(x: Tensor, real: Tensor) -> Tensor:
    """``[..., D]`` sum of the squares of ``x`` ``[..., L, D]``, without what is not finite."""
    counted = real & x.isfinite().all(dim=-1)
    return torch.where(counted.unsqueeze(-1), x, 0.0).float().square().sum(dim=-2)
