"""Each segment of the text has a quota of the slots."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressed_cache.ops.attention import masked_softmax
from compressed_cache.ops.eviction import per_head, places, pool_by_position
from compressed_cache.policies.base import Needs
from compressed_cache.policies.methods.window_votes import causal, check_window, window_logits
from compressed_cache.policies.modifier import Modifier
from compressed_cache.policies.view import Slots

_LEAST = 1e-12
"""Mass of a token that nothing attends to, so that all of them have a share."""


class Segments(NamedTuple):
    """Parts of the text that follow one another, ``N`` at most; the last ones may be empty."""

    segment: Tensor
    """``[B, H, S]`` int64, of each token in text order, ``-1`` where there is none."""
    ends: Tensor
    """``[B, H, N]`` int64, the place in that order after the last token."""
    lengths: Tensor
    """``[B, H, N]`` int64, tokens."""
    mass: Tensor
    """``[B, H, N]`` float64, of all its tokens."""


@dataclass(frozen=True, kw_only=True)
class AMS(Modifier):
    """Cuts the text where attention adds up, and keeps a quota of the best tokens of each segment.

    Adaptive Mass-Segmented KV compression (https://arxiv.org/abs/2605.23200), in the form of the
    authors' code (https://github.com/EIT-NLP/AdaptiveMassSegment,
    ``kvpress/presses/adaptive_segment_head_press.py``). The attention of the last ``mass_window``
    queries, averaged over the group and pooled over neighbours, is the mass of a token; those of
    the window have the largest of any head. It is mixed with its average over all rankings so far,
    new ones weighing most. A segment ends where the mass of the text reaches the next multiple of
    ``segment_mass``, as counted from the start of the text; then long ones are split, and short
    ones take in the next. Each has a quota of the tokens that are left when ``interval`` more came
    in: ``min_keep_per_segment``, and a share of the rest in proportion to its mass. In its quota
    are the tokens with the highest scores of the policy before ``+``. They go last; scores decide
    among them, and among the others.

    Quotas are shared out as if nothing was protected. What the cache protects then stays, and where
    no quota had chosen it the lowest of the chosen go, as with their ``n_sink`` and
    ``always_keep_last``: their scripts are ``sinks=4, recent=32``. It cannot be written after
    ``tova``, which decides for all heads at once. Of the paper only the abstract could be read; of
    the two ways to cut in the code this is the one that runs (the other counts from the last cut).

    Differs from the authors' code in seven points: prompts are ranked too; slots are overwritten
    one by one in the order of the ranking (they let the cache grow by 512 tokens and cut it back);
    each row is cut by its own mass (theirs share the mean, and the largest mass); queries are
    rotated at their own positions (there all at the newest); the window is the positions of its
    queries, some of which may be gone (theirs is as many last tokens of the cache: the same with
    ``recent`` of no less); where there are more segments than tokens that stay, scores decide among
    the best of each (their loop does not end); and under tensor parallelism the largest mass is
    that of the heads in the same process.
    """

    name: ClassVar[str] = "ams"
    scores_attention: ClassVar = False
    mass_window: int = 32
    """Queries whose attention is mass, no more than tokens that stay (the ``window_size`` of the
    authors)."""
    mass_kernel_size: int = 5
    """Odd width of the mean pooling of mass, in held tokens (theirs); 1 switches it off."""
    segment_mass: float = 0.02
    """Part of all mass, above 0 and up to 1, at each multiple of which a segment ends (theirs)."""
    min_segment_length: int = 32
    """Tokens of every segment but the last, at least 1 (the ``min_seg_len`` of their scripts; the
    default of their code is 64)."""
    max_segment_length: int = 1024
    """Tokens above which a segment is split, before short ones are merged (the ``max_seg_len`` of
    their scripts; the default of their code is 2048)."""
    min_keep_per_segment: int = 8
    """Slots that every segment has, if there are as many, at least 0 (theirs)."""
    credit_decay: float = 0.8
    """What the average mass keeps of itself from one ranking to the next, 0 to below 1 (theirs)."""
    mix_beta: float = 0.7
    """Weight of the mass of now against its average, 0 to 1: 1 is their ``use_credit=False``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.mass_window, self.mass_kernel_size, prefix="mass_")
        if not 0 < self.segment_mass <= 1:
            raise ValueError(f"segment_mass must be above 0 and up to 1, got {self.segment_mass}")
        if not 1 <= self.min_segment_length <= self.max_segment_length:
            raise ValueError(
                "min_segment_length must be from 1 to max_segment_length "
                f"({self.max_segment_length}), got {self.min_segment_length}"
            )
        if self.min_keep_per_segment < 0:
            raise ValueError(f"min_keep_per_segment must be >= 0, got {self.min_keep_per_segment}")
        if not 0 <= self.credit_decay < 1:
            raise ValueError(f"credit_decay must be from 0 to below 1, got {self.credit_decay}")
        if not 0 <= self.mix_beta <= 1:
            raise ValueError(f"mix_beta must be from 0 to 1, got {self.mix_beta}")

    @property
    def needs(self) -> Needs:
        # The average, and the mass that the quotas of this ranking go by.
        return Needs(queries=self.mass_window, notes=2, kept_count=True)

    def revise(self, slots: Slots) -> Tensor:
        held = slots.positions >= 0
        mass = _shares(self._attended(slots), held)
        credit = self.credit_decay * slots.notes[..., -2] + (1 - self.credit_decay) * mass
        mixed = self.mix_beta * mass + (1 - self.mix_beta) * _shares(credit, held)
        return torch.stack([credit, mixed], dim=-1)

    def scores(self, slots: Slots) -> Tensor:
        base = super().scores(slots)
        always = base == torch.inf
        usable = (slots.positions >= 0) & ~base.isnan() & (base != -torch.inf)
        place = places(base.masked_fill(~usable, -torch.inf), slots.positions)
        scores = (place + place.shape[-1] * self._is_chosen(slots, place)).float()
        return scores.masked_fill(~usable, -torch.inf).masked_fill(always, torch.inf)

    def _attended(self, slots: Slots) -> Tensor:
        """What the window attends to, and the most of it for the window itself, ``[B, H, S]``."""
        window = _kept(slots).clamp(max=self.mass_window)
        first = slots.next_position[:, None, None] - window
        seen = slots.query_positions[:, None] >= first
        visible = (causal(slots) & seen.unsqueeze(-1))[:, :, None]
        logits = window_logits(slots)
        rows = masked_softmax(logits, visible, slots.transform.sink_logits(logits))
        votes = rows.sum(dim=3).mean(dim=2) / window
        before = slots.positions < first
        prefix = slots.positions.masked_fill(~before, -1)
        votes = pool_by_position(votes, prefix, kernel_size=self.mass_kernel_size, reduce="mean")
        return torch.where(before, votes, votes.amax(dim=(1, 2), keepdim=True))

    def _is_chosen(self, slots: Slots, place: Tensor) -> Tensor:
        """Which tokens are in the quota of their segment, by places of their scores
        ``[B, H, S]``."""
        by_age = slots.positions.argsort(dim=-1, stable=True)
        held = slots.positions >= 0
        # Doubles, so that where a segment ends is not decided by the order of a sum.
        mass = _shares(slots.notes[..., -1].double(), held)
        segments = self._segments(mass.gather(-1, by_age), held.gather(-1, by_age))
        quotas = self._quotas(segments, _kept(slots))
        keys = segments.segment * place.shape[-1] + place.gather(-1, by_age)
        by_place = keys.argsort(dim=-1)
        segment = segments.segment.gather(-1, by_place).clamp(min=0)
        # The best are the last of a segment.
        first = (segments.ends - quotas).gather(-1, segment)
        is_chosen = torch.arange(first.shape[-1], device=first.device) >= first
        slot = by_age.gather(-1, by_place)
        return torch.zeros_like(held).scatter(-1, slot, is_chosen) & held

    def _segments(self, mass: Tensor, held: Tensor) -> Segments:
        """The segments of tokens in text order.

        Args:
            mass: ``[B, H, S]`` float64 of sum 1.
            held: ``[B, H, S]`` bool, the last ones.
        """
        length, shortest = mass.shape[-1], self.min_segment_length
        index = torch.arange(length, device=mass.device)
        empty = length - held.sum(dim=-1, keepdim=True)
        place = index - empty
        total = mass.cumsum(dim=-1)
        # The end of the text is no multiple.
        reached = (
            (total / self.segment_mass).floor().clamp(max=math.ceil(1 / self.segment_mass) - 1)
        )
        # The token that reaches one begins a segment, unless it is the first: then the next one.
        before = pad(reached[..., :-1], (1, 0)).masked_fill(place <= 1, 0.0)
        begins = (place == 0) | ((reached > before) & (place > 0))
        since = index - torch.where(begins, index, 0).cummax(dim=-1).values
        begins = begins | (held & (since % self.max_segment_length == 0))
        # From each place to the next beginning that is far enough, at the end to the end.
        after = torch.where(begins, index, length).flip(-1).cummin(dim=-1).values.flip(-1)
        jump = pad(after, (0, shortest + 1), value=length)[..., shortest:]
        stays = pad((place == 0).long(), (0, 1))
        # Of those that the first one leads to, twice as many jumps away in each round.
        for _ in range((length // shortest).bit_length()):
            stays = stays.scatter_reduce(-1, jump, stays, "amax")
            jump = jump.gather(-1, jump)
        segment = stays[..., :-1].cumsum(dim=-1) - 1
        lengths = torch.zeros_like(segment[..., : length // shortest + 1])
        lengths = lengths.scatter_add(-1, segment.clamp(min=0), held.long())
        ends = empty + lengths.cumsum(dim=-1)
        total = pad(total, (1, 0))
        return Segments(
            segment, ends, lengths, total.gather(-1, ends) - total.gather(-1, ends - lengths)
        )

    def _quotas(self, segments: Segments, kept: Tensor) -> Tensor:
        """Slots of each segment ``[B, H, N]`` int64, ``kept`` ``[H, 1]`` in all."""
        least = segments.lengths.clamp(max=self.min_keep_per_segment)
        rest = kept - least.sum(dim=-1, keepdim=True)
        # Theirs, so that a half is rounded as there.
        part = segments.mass / (segments.mass.sum(dim=-1, keepdim=True) + _LEAST)
        quotas = least + (rest.clamp(min=0) * part).round().long()
        quotas = quotas.minimum(segments.lengths)
        missing = kept - quotas.sum(dim=-1, keepdim=True)
        floor = torch.where(rest < 0, least.clamp(max=1), least)
        room = torch.where(missing < 0, quotas - floor, segments.lengths - quotas)
        given = _hand_out(missing.abs(), room, most=segments.segment.shape[-1])
        return quotas + missing.sign() * given


def _kept(slots: Slots) -> Tensor:
    """How many tokens of each head are left before the next ranking, ``[H | 1, 1]`` int64."""
    kept = per_head(slots.budgets, slots.positions)
    return kept if slots.is_prompt else (kept - slots.interval).clamp(min=1)


def _shares(values: Tensor, held: Tensor) -> Tensor:
    """Values ``[B, H, S]`` from 0 as parts of their sum; zero where there is no token."""
    values = torch.where(held, values + _LEAST, 0.0)
    return values / values.sum(dim=-1, keepdim=True).clamp(min=_LEAST)


def _hand_out(count: Tensor, room: Tensor, *, most: int) -> Tensor:
    """One each from the first on, round after round, as long as there is room.

    Args:
        count: ``[B, H, 1]`` int64, how many in all.
        room: ``[B, H, N]`` int64, how many each can take.
        most: none can take more.

    Returns:
        ``[B, H, N]`` int64, how many each is given.
    """
    rounds = torch.zeros_like(count)
    # Full rounds, bit by bit.
    for bit in reversed(range(most.bit_length())):
        more = rounds + (1 << bit)
        is_enough = room.minimum(more).sum(dim=-1, keepdim=True) <= count
        rounds = torch.where(is_enough, more, rounds)
    given = room.minimum(rounds)
    last = room > rounds
    left = count - given.sum(dim=-1, keepdim=True)
    return given + (last & (last.cumsum(dim=-1) <= left)).long()
