"""No compression: the reference every other policy is measured against."""

from dataclasses import dataclass
from typing import ClassVar

from compressed_cache.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Keeps every token. ``budget`` is ignored: slots double whenever they are used up.

    Doubling keeps the shapes static for long stretches, so that a decode step compiles here as it
    does under the other policies (once more per doubling).

    Scores are never asked for.
    """

    name: ClassVar[str] = "full"
    evicts: ClassVar[bool] = False
