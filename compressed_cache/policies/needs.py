"""What a policy asks of a cache: what to be shown, and what to do where the user does not say."""

from typing import NamedTuple


class Needs(NamedTuple):
    """What a policy has to be shown beside keys and positions: kept for it, and for no other."""

    queries: int = 0
    """How many of the last queries."""
    attention: bool = False
    """Whether ``accumulate`` is shown the attention weights of every query."""
    prompt_queries: int | None = None
    """With ``attention``: how many of the last prompt queries are shown; None: all."""
    state_width: int = 1
    """With ``attention``: numbers that ``accumulate`` keeps of each token."""
    all_heads: bool = False
    """With ``attention``: whether ``accumulate`` averages over all heads of the layer,
    so that what tensor parallelism gave to other processes is averaged in."""
    notes: int = 0
    """Numbers written down of each token, see :mod:`compressed_cache.policies.capabilities`."""
    recent: int = 0
    """Tokens before the incoming one that ``scores`` itself always keeps."""
    kept_count: bool = False
    """Whether it must be known how many tokens each head keeps at a ranking."""
    whole_keys: bool | None = None
    """Whether keys must have all their channels; None: if there are constants, which may be about
    them."""
    values: bool = False
    """Whether values are looked at (for readers: they are always there)."""
    hidden_states: bool = False
    """Whether ``Slots.hidden_states`` of new tokens are looked at."""
    model: tuple[str, ...] = ()
    """What the model must have, in words."""

    def merge(self, other: "Needs") -> "Needs":
        """What two parts of one policy need together; notes are kept for each."""
        observer = other if other.attention else self
        return Needs(
            queries=max(self.queries, other.queries),
            attention=observer.attention,
            prompt_queries=observer.prompt_queries,
            state_width=observer.state_width,
            all_heads=observer.all_heads,
            notes=self.notes + other.notes,
            recent=max(self.recent, other.recent),
            values=self.values or other.values,
            hidden_states=self.hidden_states or other.hidden_states,
            model=tuple(dict.fromkeys(self.model + other.model)),
        )


class Defaults(NamedTuple):
    """What ``None`` means for the arguments of ``CompressedCache`` under one policy."""

    interval: int = 1
    sinks: int = 0
    recent: int = 0
    protect_prompt: bool = False


def usual_interval(budget: int, *, longest: int = 64) -> int:
    """Steps between two rankings where one costs more than a step: an eighth of the budget goes
    before the next, and no more than ``longest``."""
    return max(1, min(longest, budget // 8))
