"""Taking back tokens that were read on trial, as assisted decoding does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compressed_cache.observers import Observer
from compressed_cache.snapshot import Snapshot, Snapshots
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
            # Without drafts a single token would be read as a step.
            prompt = 0 if cache.takes_step(prompt) else prompt
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
        _check_crop(tokens, had)
        before, kept = self.before, had - tokens
        self.before, self.tokens = None, 0
        inputs, self._inputs = self._inputs, {}
        if before is None or tokens == 0:
            return
        prompt_tokens = min(cache.counter.prompt_tokens, kept)
        cache.hold(before)
        if not kept:
            # Of an empty cache the next call reads a prompt again.
            self.is_first = cache.first_filled() is None
            return
        cache.begin_call(prompt_tokens, kept - prompt_tokens)
        for index, read in inputs.items():
            cache.layers[index].replay(read.split(kept)[0])


class Drafts(Snapshots):
    """The part of a cache that takes tokens back, while somebody drafts."""

    expected_prompt: int | None = None
    """Tokens of the text that the next call begins with."""
    _drafting: Drafting | None = None

    @contextmanager
    def assisted(self, prompt: int) -> Iterator[None]:
        """Assisted decoding of a text of so many tokens, what is held included.

        It reads the prompt and the first drafted tokens in one call, and only what the user wrote
        is a prompt. However it ends, no draft stays that nobody decided on.
        """
        self.expected_prompt = prompt
        try:
            yield
        except BaseException:
            if self._drafting is not None:
                self._drafting.take_back(self, self._drafting.tokens)
            raise
        finally:
            self.stop_drafting()

    def new_of_prompt(self, tokens: int) -> int | None:
        """How many of ``tokens`` tokens, the expected prompt and drafts, are not held yet; None
        where no prompt is expected or all are new."""
        seen = 0 if self.expected_prompt is None else self.get_seq_length()
        return tokens - seen if seen else None

    def activate_past_recording(self) -> None:
        """From the next call on :meth:`crop` can take tokens back; assisted decoding calls it."""
        self.notify("activate_past_recording")
        if self._drafting is not None:
            self.remove_observer(self._drafting)
        self._drafting = Drafting()
        self.add_observer(self._drafting)
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last ``-tokens_to_remove`` tokens of the last call, evictions included.

        What is left of a call that was read as a prompt stays read as one, also a single token.

        Raises:
            ValueError: a positive number, or more tokens than that call had.
            NotImplementedError: a model with linear-attention layers.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                "tokens_to_remove must be <= 0, the number of tokens to take back as transformers "
                f"counts it, got {tokens_to_remove}"
            )
        if self.is_recurrent:
            raise NotImplementedError(
                "CompressedCache cannot take tokens back from linear-attention layers. Generate "
                "without assisted decoding or prompt lookup."
            )
        # Some releases count on the device.
        tokens = -int(tokens_to_remove)
        if self._drafting is None:
            _check_crop(tokens, 0)
        else:
            self._drafting.take_back(self, tokens)

    def restore(self, snapshot: Snapshot) -> None:
        """Holds again what it held at :meth:`snapshot`, in place where the batch is as large.

        Raises:
            ValueError: a snapshot of a cache with another policy or other arguments.
        """
        super().restore(snapshot)
        self.stop_drafting()

    def stop_drafting(self) -> None:
        """Forgets what could be taken back."""
        self.expected_prompt = None
        if self._drafting is not None:
            self.remove_observer(self._drafting)
            self._drafting = None


def _check_crop(tokens: int, had: int) -> None:
    """Raises ``ValueError`` for more tokens than the last call had."""
    if tokens > had:
        raise ValueError(
            f"crop can take back at most the {had} tokens of the last call, got {tokens}. Call "
            "cache.activate_past_recording() before the call that may be taken back."
        )
