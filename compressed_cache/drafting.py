"""Taking back tokens that were read on trial, as assisted decoding does."""

from typing import Any

from compressed_cache.observers import Observer
from compressed_cache.snapshot import Snapshot
from compressed_cache.stores.inputs import AttentionInputs


class Drafting(Observer):
    """Remembers the moment before the last call and what it read, while somebody drafts.

    Eviction cannot be undone from the slots alone: what a draft overwrote is gone. So the cache is
    copied before each call, and a call that is taken back in part is read again as far as it stays.
    That costs one more copy of the budget, and no work where a whole draft is accepted.
    """

    reads_layers = True

    def __init__(self) -> None:
        self.is_first = True
        self.before: Snapshot | None = None
        self.tokens = 0
        self._inputs: dict[int, AttentionInputs] = {}

    def call_begins(self, cache: Any, tokens: int) -> None:
        """Copies the cache, and says how many of the tokens are drafts."""
        if self.before is not None:
            # Nobody decided on the call before, so the drafting is over.
            cache.stop_drafting()
            return
        self.before, self.tokens, self._inputs = cache.snapshot(), tokens, {}
        cache.counter.drafted = tokens
        if self.is_first:
            # The first call reads a prompt together with the first draft.
            self.is_first = False
            prompt = tokens
            if cache.expected_prompt is not None:
                prompt = cache.expected_prompt - cache.counter.tokens_seen
            cache.counter.drafted = tokens - prompt

    def layer_read(self, layer: Any, inputs: AttentionInputs) -> None:
        """Remembers what a layer read."""
        self._inputs[layer.index] = inputs

    def take_back(self, cache: Any, tokens: int) -> None:
        """Makes the cache as if the last call had not had its last ``tokens`` tokens.

        Raises:
            ValueError: more tokens than that call had.
        """
        had = self.tokens if self.before is not None else 0
        check_crop(tokens, had)
        before, kept = self.before, had - tokens
        self.before, self.tokens = None, 0
        inputs, self._inputs = self._inputs, {}
        if before is None or tokens == 0:
            return
        prompt_tokens = min(cache.counter.prompt_tokens, kept)
        cache.hold(before)
        if kept:
            cache.begin_call(prompt_tokens, kept - prompt_tokens)
            for index, read in inputs.items():
                cache.layers[index].replay(read.split(kept)[0])


def check_crop(tokens: int, had: int) -> None:
    """Raises ``ValueError`` for more tokens than the last call had."""
    if tokens > had:
        raise ValueError(
            f"crop can take back at most the {had} tokens of the last call, got {tokens}. Call "
            "cache.activate_past_recording() before the call that may be taken back."
        )
