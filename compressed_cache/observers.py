"""What a cache tells those who watch it, on the host and between two calls of the model."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from compressed_cache.stores.prefill import States

if TYPE_CHECKING:
    from compressed_cache.cache import CompressedCache
    from compressed_cache.layer import CompressedLayer

Listener = Callable[["CompressedLayer", States], None]
"""Told by a layer what it has just read: in eager calls only, so it must not need compiled ones."""


class Watcher:
    """Told of each call of the model. Put one into ``CompressedCache.watchers``.

    It is told where transformers asks for the size of the mask, outside of compiled graphs. What
    was read before is then settled; the last call of all is settled when nobody reads any more.
    """

    def call_begins(self, cache: "CompressedCache", tokens: int) -> None:
        """A call begins that reads so many tokens of each row.

        Of one call, a model with several kinds of masks tells this several times.
        """

    def rearranged(self, cache: "CompressedCache", what: str) -> None:
        """Something other than reading is about to change what is held, the call of this name."""


class Progress:
    """Tells apart the calls that a cache announces.

    Attributes:
        tokens: of each row in the call that began last.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._seen: int | None = None

    def begins(self, cache: "CompressedCache", tokens: int) -> bool:
        """Whether this is a call not told of before."""
        seen = cache.get_seq_length()
        is_new = seen != self._seen
        if is_new and self._seen is not None:
            self.check(cache)
        self._seen, self.tokens = seen, tokens
        return is_new

    def check(self, cache: "CompressedCache") -> None:
        """Raises if more was read than was announced.

        Raises:
            NotImplementedError: a model compiled by hand.
        """
        expected = (self._seen or 0) + (self.tokens if self._seen is not None else 0)
        if cache.get_seq_length() != expected:
            raise NotImplementedError(
                f"the cache was told of {expected} tokens per row and has read "
                f"{cache.get_seq_length()}: a model compiled by hand, or given a mask of its own, "
                "does not announce its steps. Let generate compile it, or run it eagerly."
            )
