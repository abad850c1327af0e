"""Attended by the last queries, and not said before."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.ops.attention import masked_softmax
from compressed_cache.ops.eviction import pool_by_position
from compressed_cache.policies.base import Defaults, Needs
from compressed_cache.policies.methods.window_votes import WindowVotes, window_logits
from compressed_cache.policies.needs import usual_interval
from compressed_cache.policies.view import Slots

_BLOCK = 1 << 22
"""Similarities held at once, so that they stay in the processor's cache."""
_FEWEST_ROWS = 64
"""Of them, in any case, so that a long prompt needs memory linear in it."""


@dataclass(frozen=True, kw_only=True)
class ImportanceAndRedundancy(WindowVotes):
    """What R-KV and its relatives share: a window that votes, and a redundancy to be subtracted."""

    window: int = 8
    """Queries that vote, and tokens always kept."""
    kernel_size: int = 7
    """Odd width of the max pooling, in held tokens; 1 switches it off."""
    mix_lambda: float = 0.1
    """Weight of importance against redundancy, 0 to 1 (the paper's; later studies used 0.5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mix(self.mix_lambda)

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.window, recent=self.window)

    def defaults(self, budget: int) -> Defaults:
        return Defaults(interval=usual_interval(budget, longest=128), recent=self.window)

    def scores(self, slots: Slots) -> Tensor:
        before = slots.positions < (slots.next_position - self.window)[:, None, None]
        before = before & (slots.positions >= 0)
        importance = self.importance(slots, before)
        redundancy = self.redundancy(slots)
        scores = self.mix_lambda * importance - (1 - self.mix_lambda) * redundancy
        return scores.masked_fill(~before, torch.inf)

    def importance(self, slots: Slots, before: Tensor) -> Tensor:
        """What the window attends to among the tokens ``before`` it, ``[B, H, S]``."""
        logits = window_logits(slots).amax(dim=2)
        votes = masked_softmax(logits, before[:, :, None])
        seen = slots.query_positions >= 0
        votes = (votes * seen[:, None, :, None]).sum(dim=2) / seen.sum(dim=1)[:, None, None]
        # The window takes no part in the pooling, so it is passed as if empty.
        prefix = slots.positions.masked_fill(~before, -1)
        return pool_by_position(votes, prefix, kernel_size=self.kernel_size, reduce="max")

    def redundancy(self, slots: Slots) -> Tensor:
        """How much each key resembles the others, ``[B, H, S]``."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RKV(ImportanceAndRedundancy):
    """Trades the attention of the last queries against redundancy among the keys.

    R-KV (https://arxiv.org/abs/2505.24133), in the form of the authors' code
    (Zefan-Cai/R-KV@d15c976): ``mix_lambda * importance - (1 - mix_lambda) * redundancy``.
    Importance is the attention of the last ``window`` queries to the tokens before the window
    (group maximum of the logits, softmax without the window, mean, max-pooled). Redundancy is a
    softmax over the mean cosine of each key to all others, where each key spares its newest
    near-duplicate, or the oldest held token when it has none, as the authors' code does. The window
    is always kept; ``recent`` can only extend it.

    Differs in two points: slots are overwritten one by one in the order of the ranking, where the
    authors let the cache grow by 128 tokens and cut it back, so the budget here includes that
    buffer; and neighbours, newest and oldest are meant in the order of the text, where the authors
    cut to the order of the scores, so that from their second cut on they pool, and spare, in that.
    """

    name: ClassVar[str] = "rkv"
    similarity_threshold: float = 0.5
    """Cosine above which two keys count as near-duplicates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_similarity(self.similarity_threshold)

    def redundancy(self, slots: Slots) -> Tensor:
        return spared_redundancy(slots, self.similarity_threshold)


def check_mix(mix_lambda: float) -> None:
    """Raises ``ValueError`` for what is no share."""
    if not 0 <= mix_lambda <= 1:
        raise ValueError(f"mix_lambda must be from 0 to 1, got {mix_lambda}")


def check_similarity(similarity_threshold: float) -> None:
    """Raises ``ValueError`` for what no cosine can be."""
    if not -1 <= similarity_threshold <= 1:
        raise ValueError(f"similarity_threshold must be from -1 to 1, got {similarity_threshold}")


def directions(slots: Slots) -> tuple[Tensor, Tensor]:
    """Held keys divided by their length, zero where there is none, and which of them count.

    Returns:
        ``[B, H, S, D]`` float32 and ``[B, H, S]`` bool: held, and all numbers.
    """
    keys = slots.keys.float()
    keys = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    counted = (slots.positions >= 0) & ~keys.isnan().any(dim=-1)
    return keys.masked_fill(~counted.unsqueeze(-1), 0.0), counted


def as_shares(similarity: Tensor, slots: Slots, counted: Tensor) -> Tensor:
    """Summed similarities to all others as a softmax over held keys; ``inf`` at broken ones."""
    held = slots.positions >= 0
    shares = masked_softmax(similarity / held.sum(dim=-1, keepdim=True), held)
    # Not NaN, which differs from itself: the compiler would take all layers for different ones.
    return shares.masked_fill(held & ~counted, torch.inf)


def spared_redundancy(slots: Slots, similarity_threshold: float) -> Tensor:
    """Mean cosine to all other keys but a spared one, as shares: see :class:`RKV`."""
    positions = slots.positions
    keys, counted = directions(slots)
    # Of all cosines at once there is no need: only the spared ones are looked at by themselves.
    total = (keys * keys.sum(dim=2, keepdim=True)).sum(dim=-1) - keys.square().sum(dim=-1)
    spared = _spared(keys, positions, similarity_threshold)
    resembled = keys.gather(2, spared.unsqueeze(-1).expand_as(keys))
    own = torch.arange(keys.shape[2], device=keys.device)
    cosine = (keys * resembled).sum(dim=-1).masked_fill(spared == own, 0.0)
    # Added up in any order, which float64 leaves no trace of.
    less = torch.zeros_like(cosine, dtype=torch.float64).scatter_add(-1, spared, cosine.double())
    return as_shares(total - less.float(), slots, counted)


def _spared(keys: Tensor, positions: Tensor, similarity_threshold: float) -> Tensor:
    """The slot of each key's newest near-duplicate, or of the oldest held token where there is
    none, ``[B, H, S]`` int64."""
    batch, heads, size, _ = keys.shape
    newest = torch.full_like(positions, -1, dtype=torch.int32)
    rank, column = positions.int(), torch.arange(size, device=keys.device)
    rows = max(_FEWEST_ROWS, min(size, _BLOCK // (batch * heads * size)))
    # Each pair once: what one key resembles resembles it.
    for start in range(0, size, rows):
        block = slice(start, start + rows)
        similar = keys[:, :, block] @ keys[:, :, start:].mT > similarity_threshold
        similar &= column[block, None] != column[start:]
        others = torch.where(similar, rank[:, :, None, start:], -1).amax(dim=-1)
        newest[:, :, block] = newest[:, :, block].maximum(others)
        others = torch.where(similar, rank[:, :, block, None], -1).amax(dim=-2)
        newest[:, :, start:] = newest[:, :, start:].maximum(others)
    ordered, slot = positions.sort(dim=-1)
    oldest = (ordered < 0).sum(dim=-1, keepdim=True).clamp(max=size - 1)
    place = torch.searchsorted(ordered, newest.long())
    return slot.gather(-1, torch.where(newest >= 0, place, oldest))
