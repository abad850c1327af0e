"""Taking back tokens that were read on trial, as assisted decoding does."""

from typing import TYPE_CHECKING

from compressed_cache.layer import CompressedLayer
from compressed_cache.snapshot import Snapshot

if TYPE_CHECKING:
    from compressed_cache.cache import CompressedCache


class Drafts:
    """Remembers the moment before the last call and what it read, while somebody drafts.

    Eviction cannot be undone from the slots alone: what a draft overwrote is gone. So the cache is
    copied before each call, and a call that is taken back in part is read again as far as it stays.
    That costs one more copy of the budget, and no work where a whole draft is accepted.
    """

    def __init__(self) -> None:
        self.stop()

    def start(self) -> None:
        """From the next call on, tokens may be taken back."""
        self.active = self.first = True
        self.before, self.tokens = None, 0

    def stop(self) -> None:
        """Forgets what was remembered."""
        self.active = self.first = False
        self.prompt_length: int | None = None
        self.before: Snapshot | None = None
        self.tokens = 0

    def begin_call(self, cache: "CompressedCache", tokens: int) -> int:
        """Called before a forward pass changes anything.

        Returns:
            How many of its tokens are a prompt; the others are drafts.
        """
        if self.before is not None:
            # Nobody decided on the call before, so the drafting is over.
            self.stop()
        cache.clock.records = self.active
        if not self.active:
            return tokens
        self.before, self.tokens = Snapshot.take(cache), tokens
        if not self.first:
            return 0
        # The first call reads a prompt together with the first draft.
        self.first = False
        if self.prompt_length is None:
            return tokens
        return self.prompt_length - cache.clock.tokens_seen

    def take_back(self, cache: "CompressedCache", tokens: int) -> None:
        """Makes the cache as if the last call had not had its last ``tokens`` tokens.

        Raises:
            ValueError: more tokens than that call had.
        """
        had = self.tokens if self.before is not None else 0
        if tokens > had:
            raise ValueError(
                f"crop can take back at most the {had} tokens of the last call, got {tokens}. Call "
                "cache.activate_past_recording() before the call that may be taken back."
            )
        before, kept = self.before, had - tokens
        self.before, self.tokens = None, 0
        if before is None or tokens == 0:
            return
        prompt_tokens = min(cache.clock.prompt_tokens, kept)
        layers = [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]
        calls = [(layer, layer.last_call) for layer in layers]
        before.put(cache)
        if kept:
            cache.count(prompt_tokens, kept - prompt_tokens)
            for layer, call in calls:
                layer.repeat(call, kept)
