"""What methods share that ask the last queries."""

from dataclasses import dataclass

from torch import Tensor

from compressed_cache.policies.base import Defaults, Needs, Policy
from compressed_cache.policies.needs import usual_interval
from compressed_cache.policies.view import Slots


@dataclass(frozen=True, kw_only=True)
class WindowVotes(Policy):
    """Keeps tokens by the votes of the last ``window`` queries, and the window itself by default.

    Raises:
        ValueError: a window below 1, or a ``kernel_size`` that is not odd.
    """

    window: int = 32
    """Queries that vote."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window, getattr(self, "kernel_size", 1))

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.window)

    def defaults(self, budget: int) -> Defaults:
        return Defaults(interval=usual_interval(budget), recent=min(self.window, budget // 2))


def check_window(window: int, kernel_size: int, *, prefix: str = "") -> None:
    """Raises ``ValueError`` for a window or a pooling width that cannot work; options may have
    names that begin otherwise."""
    if window < 1:
        raise ValueError(f"{prefix}window must be >= 1, got {window}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"{prefix}kernel_size must be odd and >= 1, got {kernel_size}")


def check_choice(name: str, value: str, *choices: str) -> None:
    """Raises ``ValueError`` for an option that is none of these."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def window_logits(slots: Slots) -> Tensor:
    """Logits of the last ``W`` queries: ``[B, H, G, W, S]`` float32, nothing masked."""
    return slots.transform.logits(slots.queries, slots.keys).float()


def causal(slots: Slots) -> Tensor:
    """Which held tokens each of the last ``W`` queries may see: ``[B, H, W, S]`` bool."""
    held = slots.positions[:, :, None, :]
    return (held >= 0) & (held <= slots.query_positions[:, None, :, None])
