"""How many tokens to draft, and what drafting has brought so far."""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

_SUMS = ("tokens", "row_verifications", "drafted", "accepted", "drafting_s", "verifying_s")
_RATES = ("acceptance_rate", "tokens_per_verification")
_RECENT = 7
"""Measurements of a time that count."""
_WEIGHT = 0.05
"""Of the newest round in the running share of drafts that are right."""
_FIRST_ROUNDS = 3
"""With and without drafts, before anything is chosen."""
_PATIENCE = 8
"""Steps without drafts, one after the other, after which there will be no more drafts."""


@dataclass
class DraftStatistics:
    """What drafting has brought, over all texts that were generated with it.

    Attributes:
        tokens: of the texts.
        row_verifications: calls of the model with the full cache, one for each row that was not at
            its end; that of the prompt is not among them.
        drafted: tokens that were proposed to a row.
        accepted: those of them that stayed.
        drafting_s: seconds in which the compressed cache drafted and read what was accepted.
        verifying_s: seconds in which the full cache verified.
        plain_from: tokens of the longest row of the last text when drafting was given up, because
            it cost more than it brought; None: it was not.
        full_bytes: of the full cache at the end of the last text.
    """

    tokens: int = 0
    row_verifications: int = 0
    drafted: int = 0
    accepted: int = 0
    drafting_s: float = 0.0
    verifying_s: float = 0.0
    plain_from: int | None = None
    full_bytes: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Accepted tokens per drafted one; NaN where none was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def tokens_per_verification(self) -> float:
        """Tokens that a row gets from one call with the full cache; NaN before the first."""
        return self.tokens / self.row_verifications if self.row_verifications else float("nan")

    @property
    def seconds(self) -> float:
        """Of drafting and verifying together; the prompts are not among them."""
        return self.drafting_s + self.verifying_s

    def add(self, later: "DraftStatistics") -> None:
        """Adds what drafting brought in further texts."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.plain_from, self.full_bytes = later.plain_from, later.full_bytes

    def to_json(self) -> dict[str, Any]:
        """All of it, null for what is not known."""
        rates = {name: getattr(self, name) for name in _RATES}
        known = {name: None if math.isnan(rate) else rate for name, rate in rates.items()}
        return asdict(self) | known


class DraftLength:
    """Chooses how many tokens to draft by the tokens to be expected per second.

    Args:
        longest: the most tokens to draft.
        adapts: whether there is anything to choose; else it is always ``longest``.

    Attributes:
        has_given_up: whether nothing is drafted any more.
    """

    def __init__(self, longest: int, *, adapts: bool) -> None:
        self.longest, self.adapts = longest, adapts
        self.has_given_up = False
        self._plain_rounds = 0
        self._asked = dict.fromkeys((longest, 0), 0)
        self._accepted = self._tried = 0.0
        self._draft_s = _few()
        self._verify_s: dict[int, deque[float]] = defaultdict(_few)

    def choose(self) -> int:
        """The number for the next round, 0 for a step without drafts."""
        if self.has_given_up:
            return 0
        if not self.adapts:
            return self.longest
        # What lies between the two ends is estimated by these until it is measured.
        for length in (self.longest, 0):
            # Near the end of a text there may be room for fewer.
            if self._asked[length] < _FIRST_ROUNDS:
                self._asked[length] += 1
                return length
        best = max(range(self.longest + 1), key=self._speed)
        if not best:
            # A few rejections may be bad luck, and without drafts nothing would show it.
            best = max(range(self.longest + 1), key=lambda length: self._speed(length, errors=1))
        # A step without drafts was measured long ago, and is measured again before this is final.
        self._plain_rounds = 0 if best else self._plain_rounds + 1
        self.has_given_up = self._plain_rounds > _PATIENCE
        return best

    def add(self, length: int, accepted: Sequence[int], draft_s: float, verify_s: float) -> None:
        """Takes a round into account.

        Args:
            length: tokens that were drafted for each row.
            accepted: how many of them stayed, of each row.
            draft_s: seconds of all drafts, and of reading what was accepted.
            verify_s: seconds of the model with the full cache.
        """
        self._verify_s[length].append(verify_s)
        if length:
            self._draft_s.append(draft_s / length)
            # Behind a draft that was rejected none is tried.
            tried = sum(min(count + 1, length) for count in accepted)
            self._accepted += sum(accepted) - _WEIGHT * self._accepted
            self._tried += tried - _WEIGHT * self._tried

    def _speed(self, length: int, errors: int = 0) -> float:
        """Tokens per second, if drafts are right so many standard errors oftener than it seems."""
        rate = (self._accepted + 1.0) / (self._tried + 2.0)
        rate = min(rate + errors * math.sqrt(rate * (1.0 - rate) / (self._tried + 3.0)), 0.999)
        tokens = (1.0 - rate ** (length + 1)) / (1.0 - rate)
        return tokens / (length * _typical(self._draft_s) + self._verification_s(length))

    def _verification_s(self, length: int) -> float:
        if known := self._verify_s[length]:
            return _typical(known)
        low, high = (_typical(self._verify_s[end]) for end in (0, self.longest))
        return low + (high - low) * length / self.longest


def _few() -> deque[float]:
    return deque(maxlen=_RECENT)


def _typical(seconds: deque[float]) -> float:
    """The median: some are out of all proportion, the first of all, which may include compiling.
    0 where there is none."""
    return median(seconds) if seconds else 0.0
