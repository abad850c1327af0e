"""What a cache itself can tell of the time a run takes."""

from typing import NamedTuple

from compressed_cache.observers import ObservedCache, Observer, Progress
from compressed_cache.telemetry import peaks
from compressed_cache.telemetry.timestamps import Timestamp, seconds_between
from compressed_cache.telemetry.timing import Timing, finished


class BegunCall(NamedTuple):
    """A call of the model that began."""

    mark: Timestamp
    tokens: int
    is_step: bool


class Timer(Observer):
    """Notes when each call begins.

    A call is over when the next begins. So nothing is known of how long the last one took, nor of
    the last step before a further prompt, which somebody may have waited to write.

    Attributes:
        calls: all so far.
    """

    def __init__(self) -> None:
        self._forget()

    def call_announced(self, cache: ObservedCache, tokens: int) -> None:
        """Notes the moment."""
        if not self.calls:
            peaks.restart()
        is_new = self._progress.begins(cache, tokens)
        if not is_new and self.calls[-1].tokens != tokens:
            # The call announced before failed, and nothing of it was read.
            del self.calls[-1]
            is_new = True
        if is_new:
            self.calls.append(BegunCall(Timestamp(), tokens, cache.takes_step(tokens)))

    def rearranged(self, cache: ObservedCache, what: str) -> None:
        """Begins anew with another text."""
        if what == "activate_past_recording":
            raise NotImplementedError(
                "telemetry cannot tell drafted tokens from steps. Generate without assisted "
                "decoding or prompt lookup, or with telemetry=False."
            )
        if what in ("reset", "restore"):
            self._forget()

    def add_prompt(self, began: Timestamp, tokens: int) -> None:
        """Notes a prompt that was read in another cache before this one was restored from it."""
        self.calls.append(BegunCall(began, tokens, is_step=False))

    def timing(self, cache: ObservedCache) -> Timing:
        """See :meth:`CompressedCache.timing`."""
        first = cache.compressed_layer
        if first is None or not any(call.is_step for call in self.calls):
            raise ValueError(
                "timing must be asked for after a decode step, got a cache that has read "
                f"{cache.get_seq_length()} tokens and taken none. Where only a prompt is read, use "
                "compressed_cache.telemetry.measure."
            )
        self._progress.check(cache)
        device, rows = first.keys.device, first.keys.shape[0]
        prefill_s, step_s = 0.0, []
        seconds = seconds_between([call.mark for call in self.calls], device)
        for call, after, passed in zip(self.calls, self.calls[1:], seconds, strict=False):
            if not call.is_step:
                prefill_s += passed
            elif after.is_step:
                step_s.append(passed)
        return finished(
            cache,
            prefill_s=prefill_s,
            step_s=step_s,
            rows=rows,
            tokens_in=rows * sum(call.tokens for call in self.calls if not call.is_step),
            tokens_out=rows * sum(call.is_step for call in self.calls),
            evicted_tokens=cache.evicted_tokens,
            device=device,
        )

    def _forget(self) -> None:
        self._progress = Progress()
        self.calls: list[BegunCall] = []
