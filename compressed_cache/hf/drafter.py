"""A compressed cache that drafts: what it read on trial is replaced by what was accepted."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from compressed_cache.hf.full_cache import FullCache
from compressed_cache.snapshot import Snapshot
from compressed_cache.stores.decode_step import decode_step
from compressed_cache.stores.inputs import AttentionInputs, NewToken
from compressed_cache.stores.refresh import refresh
from compressed_cache.stores.slots import SlotStore


class Drafter:
    """Decode steps over a compressed cache, which can be taken back in each row as far as need be.

    Eviction cannot be undone from the slots alone, so the cache is copied before it drafts. Then it
    is put back and reads the accepted tokens: not with the model, but what the attention of the
    full cache was given of them, which costs no more than attention over the slots. So what it
    holds is as exact as what the full cache holds, and a row that accepted less reads padding.

    Args:
        model: the model.
        cache: holds a prompt.
        forward: the model, maybe compiled.
        compile: compiles a function as the model is; None: nothing is compiled.
        ids: ``[B, L + 1]`` int64, the prompt and the first token after it.
        kwargs: what ``generate`` goes on with after the prompt.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        forward: Callable[..., Any],
        compile: Callable[..., Any] | None,
        ids: Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        self.cache, self.forward = cache, forward
        self._read_token = None if compile is None else compile(_read_token)
        self._columns = cache.get_seq_length()
        known = cache.columns.known
        # Ends the step before, as transformers does when it asks for the size of a mask.
        cache.get_mask_sizes(1, 0)
        self.inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
        # No row has read this token yet, and some never will.
        cache.columns.known = known
        self.first_position: Tensor = self.inputs["position_ids"].clone()
        """``[..., B, 1]`` int64, of the first token after the prompt."""
        self._before: Snapshot | None = None
        self._reads = [0] * len(ids)
        self._level: int | None = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The text is written in it. However that ends, the cache holds no draft after it."""
        try:
            yield
        finally:
            self._take_back()
            self._end()

    def begin(self) -> None:
        """What is read from now on is on trial."""
        self._before = self.cache.snapshot()

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits ``[B, 1, V]`` after tokens ``[B, 1]`` at positions ``[..., B, 1]``."""
        self.cache.get_mask_sizes(1, 0)
        self.inputs["input_ids"].copy_(tokens)
        self.inputs["position_ids"].copy_(positions)
        return self.forward(**self.inputs, return_dict=True).logits[:, -1:]

    @property
    def drafts(self) -> bool:
        """Whether there may be more drafts."""
        return self._level is None

    def level(self) -> None:
        """There will be no more drafts. Rows read on until they are as far as the one that is
        ahead, since a cache has the same columns in all rows."""
        self._level = max(self._reads)

    def wanted(self, kept: Sequence[int]) -> list[int]:
        """How many of the tokens that each row keeps are to be read."""
        if self._level is None:
            return list(kept)
        rows = zip(kept, self._reads, strict=True)
        return [min(count, self._level - read) for count, read in rows]

    def read(self, inputs: Mapping[int, AttentionInputs], kept: Sequence[int]) -> None:
        """Takes back what was on trial, and reads what another cache was given with this model.

        Args:
            inputs: of each layer of attention.
            kept: how many of these tokens each row reads.
        """
        self._take_back()
        cache = self.cache
        count = max(kept)
        columns = torch.arange(count, device=self.first_position.device)
        real = columns < torch.tensor(kept, device=columns.device)[:, None]
        cache.begin_call(0, count)
        layers = [cache.layers[index] for index in inputs]
        reads = [read.part(slice(count))._replace(real=real) for read in inputs.values()]
        if self._read_token is None:
            for layer, read in zip(layers, reads, strict=True):
                layer.replay(read)
        else:
            stores = [layer.store for layer in layers]
            reads = [read.laid_out_by_token() for read in reads]
            for token in range(count):
                ranks = cache.counter.ranks_at(token)
                self._read_token(stores, [read.token(token, ranks) for read in reads])
        self._reads = [read + more for read, more in zip(self._reads, kept, strict=True)]
        self._before = None

    def refresh(self, full: FullCache) -> None:
        """Holds the best of all tokens, also of those that were evicted."""
        for layer, own in zip(full.layers, self.cache.layers, strict=True):
            keys, values = layer.keys, layer.values
            if keys is not None and values is not None:
                refresh(own.store, keys, values, full.real)
        self.cache.counter.rank_anew()

    def _take_back(self) -> None:
        if self._before is not None:
            self.cache.hold(self._before)

    def _end(self) -> None:
        """Leaves the cache as other loops do: the columns of a row that ended before others are
        padding after it."""
        cache = self.cache
        surplus = cache.get_seq_length() - self._columns - max(self._reads)
        if surplus:
            cache.counter.end_step()
            cache.counter.steps -= surplus
            # Victims were chosen for steps that are not counted any more.
            cache.counter.rank_anew()
            for store in cache.stores():
                store.counts[:, 1] -= surplus


def _read_token(stores: Sequence[SlotStore], tokens: Sequence[NewToken]) -> None:
    """One token of each layer: apart from the layers, so that one graph has them all."""
    for store, token in zip(stores, tokens, strict=True):
        decode_step(store, token)
