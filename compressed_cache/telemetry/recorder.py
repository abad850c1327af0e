"""Watches a cache and keeps what it evicts."""

from typing import Any

import numpy as np
import torch
import transformers

import compressed_cache
from compressed_cache.cache import CompressedCache
from compressed_cache.layer import CompressedLayer
from compressed_cache.observers import Observer, Progress
from compressed_cache.stores.inputs import AttentionInputs
from compressed_cache.telemetry.shadow import Shadow
from compressed_cache.telemetry.token_lifetimes import TokenLifetimes
from compressed_cache.telemetry.trace import FORMAT, LOSSES, TOKENS, Columns, Trace


class Recorder:
    """Notes which token leaves which head of a cache when::

        cache = CompressedCache("h2o", 256)
        recorder = Recorder(cache)
        model.generate(**inputs, cache=cache)
        recorder.trace().write("run.parquet")

    The positions of two consecutive steps are compared between them, so a decode step is the same
    with a recorder as without, compiled or not, but the host waits for the device after each.

    With ``shadow`` every key is kept besides, on the device of its layer, and each step's query is
    put to all of them. What each layer reads is only told by eager steps, so ``generate`` does not
    compile them.

    Layers with a sliding window and of linear attention are left out.

    Args:
        cache: a cache that has read nothing yet.
        shadow: whether to tell what attention was lost.
        model: the name of the model, for the file.

    Raises:
        ValueError: a cache that holds something.
        NotImplementedError: from the cache, as soon as rows are exchanged, tokens are taken back or
            something else is restored.
    """

    def __init__(
        self, cache: CompressedCache, *, shadow: bool = False, model: str | None = None
    ) -> None:
        if cache.get_seq_length():
            raise ValueError(
                f"cache must be empty, got one that has read {cache.get_seq_length()} tokens. Use "
                "a new one or reset it."
            )
        self._cache = cache
        self._model = model
        self._notes = _Notes(reads_layers=shadow)
        cache.add_observer(self._notes)

    def stop(self) -> None:
        """Watches no longer; what was recorded stays."""
        self._notes.settle(self._cache)
        self._cache.remove_observer(self._notes)

    def trace(self) -> Trace:
        """What was recorded so far.

        Raises:
            ValueError: nothing was read.
            NotImplementedError: a model compiled by hand.
        """
        notes = self._notes
        if notes in self._cache.observers:
            notes.progress.check(self._cache)
            notes.settle(self._cache)
        if not notes.lives:
            raise ValueError(
                "trace must be asked for after the prompt, got a cache that has read nothing, or "
                "whose layers all have a sliding window"
            )
        lives = notes.lives.values()
        tokens = [one.tokens() for one in lives]
        losses = [one.losses() for one in lives]
        return Trace(
            _table(tokens, TOKENS, "row", "layer", "head", "position"),
            _table(losses, LOSSES, "row", "step", "layer", "head"),
            self._metadata(),
        )

    def _metadata(self) -> dict[str, Any]:
        policy = self._cache.policy
        named = {} if self._model is None else {"model": self._model}
        packages = [compressed_cache, torch, transformers]
        return {
            "format": FORMAT,
            "policy": policy.label,
            "options": policy.options,
            "rules": self._cache.eviction.described(),
            **named,
            "versions": {package.__name__: str(package.__version__) for package in packages},
            "steps": self._notes.step,
            "prompt_lengths": next(iter(self._notes.lives.values())).prompt_lengths,
        }


class _Notes(Observer):
    """What a cache tells: apart from the recorder, or the cache would refer to itself."""

    def __init__(self, *, reads_layers: bool) -> None:
        self.reads_layers = reads_layers
        self.progress = Progress()
        self.step = 0
        self.lives: dict[int, TokenLifetimes] = {}
        self._is_step: bool | None = None
        """Whether the call that began last is a decode step; None once it is settled."""
        self._shadows: dict[int, Shadow] = {}

    def call_announced(self, cache: CompressedCache, tokens: int) -> None:
        """Settles the call before."""
        if self.progress.begins(cache, tokens):
            self.settle(cache)
        self._is_step = cache.takes_step(tokens)

    def rearranged(self, cache: CompressedCache, what: str) -> None:
        """Refuses what it cannot follow."""
        drafts = what == "activate_past_recording"
        if drafts or self.lives or self._is_step is not None:
            raise NotImplementedError(
                f"{what} cannot be recorded: it changes what is held other than by reading. Take "
                "the trace and call stop() before, then use a new Recorder."
            )

    def layer_read(self, layer: CompressedLayer, inputs: AttentionInputs) -> None:
        """Takes what a layer has just read."""
        if not layer.is_sliding:
            self._shadows.setdefault(layer.index, Shadow()).read(layer, inputs)

    def settle(self, cache: CompressedCache) -> None:
        """Notes what became of the tokens in the call that began last."""
        if self._is_step is None:
            return
        # All chunks of the first prompt are step 0.
        self.step += self._is_step or self.step > 0
        self._is_step = None
        for layer in cache.layers:
            if isinstance(layer, CompressedLayer) and layer.is_filled and not layer.is_sliding:
                if layer.index not in self.lives:
                    self.lives[layer.index] = TokenLifetimes(layer)
                shadow = self._shadows.get(layer.index)
                weights = None if shadow is None else shadow.weights
                self.lives[layer.index].settle(layer, self.step, weights)


def _table(parts: list[Columns], schema: dict[str, str], *order: str) -> Columns:
    columns = {name: np.concatenate([part[name] for part in parts]) for name in schema}
    index = np.lexsort([columns[name] for name in reversed(order)])
    return {name: columns[name][index].astype(dtype) for name, dtype in schema.items()}
