"""What one reply cost, carried from the model to the metrics of a task."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """Counts of one generated reply. Tokens are counted per key/value head of the first layer."""

    tokens: int
    """Generated, the end-of-text token included."""
    truncated: bool
    """Whether the reply was cut off at the token limit."""
    seen_tokens: int
    """Tokens of prompt and reply that went through the cache, padding excluded."""
    held_tokens: int
    """Those still held when the reply ended."""
    cache_bytes: int
    """This row's share of the cache, the policy's state included."""

    @property
    def evicted_tokens(self) -> int:
        """Tokens seen minus tokens held."""
        return self.seen_tokens - self.held_tokens

    @property
    def evicted_share(self) -> float:
        """Evicted tokens as a share of those seen, 0 to 1."""
        return self.evicted_tokens / self.seen_tokens


class Reply(str):
    """A generated text that remembers what it cost.

    The harness hands tasks nothing but text; a string that carries its record passes through its
    filters, its gathering across processes and its response cache. Some of its tasks turn the right
    answer into the type of the reply, hence replies without a record.
    """

    record: Record | None

    def __new__(cls, text: object = "", record: Record | None = None) -> "Reply":
        """A string equal to ``str(text)``."""
        reply = super().__new__(cls, text)
        reply.record = record
        return reply

    def __getnewargs__(self) -> tuple[Any, ...]:
        # What pickle calls __new__ with.
        return str(self), self.record
