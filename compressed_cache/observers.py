"""Those who are told what a cache does, on the host and between two compiled steps."""

from typing import Any, Protocol

from torch import Tensor

from compressed_cache.stores.inputs import AttentionInputs


class ObservedCache(Protocol):
    """What an observer may ask of a cache."""

    layers: list[Any]

    @property
    def compressed_layer(self) -> Any:
        """See :attr:`CompressedCache.compressed_layer`."""
        ...

    @property
    def evicted_tokens(self) -> int:
        """See :attr:`CompressedCache.evicted_tokens`."""
        ...

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Tokens seen so far."""
        ...

    def takes_step(self, tokens: int) -> bool:
        """Whether a call with ``tokens`` tokens is a decode step."""
        ...


class Observer:
    """Told of each call of the model: see :meth:`CompressedCache.add_observer`.

    What was read before a call is settled when it begins; the last call of all is settled when
    nobody reads any more.
    """

    reads_layers = False
    """Whether :meth:`layer_read` is called. Compiled code does not do that, so ``generate`` does
    not compile steps then."""

    def call_announced(self, cache: Any, tokens: int) -> None:
        """A call is about to begin that reads ``tokens`` tokens of each row.

        It is told where transformers asks for the size of the mask, outside of compiled graphs. Of
        one call, a model with several kinds of masks tells this several times.
        """

    def call_begins(self, cache: Any, tokens: int) -> None:
        """A call begins, and nothing has changed yet; told in eager calls only."""

    def layer_read(self, layer: Any, inputs: AttentionInputs) -> None:
        """A layer has just read these tokens; told where :attr:`reads_layers`."""

    def rearranged(self, cache: Any, what: str) -> None:
        """Something other than reading is about to change what is held, the call of this name."""


class Observed:
    """The part of a cache that tells others what happens."""

    observers: list[Observer]
    readers: list[Observer]
    """Those of them who are told what each layer reads."""

    def add_observer(self, observer: Observer) -> None:
        """From now on tells somebody what happens."""
        self.observers.append(observer)
        if observer.reads_layers:
            self.readers.append(observer)

    def remove_observer(self, observer: Observer) -> None:
        """Tells somebody no longer."""
        self.observers.remove(observer)
        if observer.reads_layers:
            self.readers.remove(observer)

    def notify(self, what: str) -> None:
        """Tells observers that something other than reading is about to change what is held."""
        for observer in self.observers:
            observer.rearranged(self, what)


class Progress:
    """Tells apart the calls that a cache announces.

    Attributes:
        tokens: of each row in the call that began last.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._seen: int | None = None

    def begins(self, cache: ObservedCache, tokens: int) -> bool:
        """Whether this is a call not told of before."""
        seen = int(cache.get_seq_length())
        is_new = seen != self._seen
        if is_new and self._seen is not None:
            self.check(cache)
        self._seen, self.tokens = seen, tokens
        return is_new

    def check(self, cache: ObservedCache) -> None:
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
