"""Runs a model over a text and sums up what a policy wants to know of its queries."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressed_cache.cache import CompressedCache
from compressed_cache.calibration.statistics import STATISTICS, Sample, Statistics, Sums
from compressed_cache.layer import CompressedLayer
from compressed_cache.ops.rotary import Rotary, rotary_of
from compressed_cache.policies.base import Needs, Policy
from compressed_cache.policies.view import LayerContext
from compressed_cache.versions import cache_parameter

CHUNK = 1024
"""Tokens read at once: as many queries of every layer are in memory."""


@dataclass(frozen=True, kw_only=True)
class QueryRecorder(Policy):
    """Keeps every token and every query of a text."""

    evicts: ClassVar[bool] = False
    length: int
    """Tokens of the text."""
    contexts: dict[int, LayerContext] = field(default_factory=dict, compare=False)
    """The layers met, by index; not those with a sliding window, where no policy works."""

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.length)

    def constants(self, context: LayerContext) -> dict[str, Tensor]:
        self.contexts[context.layer] = context
        return {}


def chunks(texts: Iterable[Sequence[int]], *, limit: int) -> list[list[int]]:
    """Texts of token ids in pieces of :data:`CHUNK` tokens at most, ``limit`` tokens in all."""
    pieces: list[list[int]] = []
    for text in texts:
        for start in range(0, len(text), CHUNK):
            piece = list(text[start : start + min(CHUNK, limit)])
            limit -= len(piece)
            if piece:
                pieces.append(piece)
    return pieces


@torch.no_grad()
def collect(
    model: Any, pieces: Iterable[Sequence[int]], policy: str
) -> dict[int, tuple[Any, dict[str, Tensor]]]:
    """Statistics of a model, for each layer that a policy would work on.

    Args:
        model: a causal language model.
        pieces: texts of token ids.
        policy: whose statistics.

    Returns:
        For each layer its attention module and its tensors by name.

    Raises:
        NotImplementedError: a model that the policy cannot work with.
        ValueError: a text without a token, or a model without a layer to compress.
    """
    statistics = STATISTICS[policy]
    totals: dict[int, Sums] = {}
    modules: dict[int, Any] = {}
    for piece in pieces:
        record = QueryRecorder(length=len(piece))
        cache = CompressedCache(record)
        named = {cache_parameter(model) or "past_key_values": cache}
        model(torch.tensor([piece], device=model.device), use_cache=True, **named)
        for layer, context in record.contexts.items():
            modules[layer] = context.module
            _add(totals.setdefault(layer, {}), statistics, cache.layers[layer], context)
    found = {layer: statistics.finish(sums) for layer, sums in sorted(totals.items())}
    parts = [part for statistics in found.values() for part in statistics.values()]
    if not parts or not all(part.isfinite().all() for part in parts):
        raise ValueError(
            f"nothing to learn for {policy!r}: too little text, no layer without a sliding window, "
            "or a model that computes what is not a number"
        )
    return {layer: (modules[layer], statistics) for layer, statistics in found.items()}


def _add(
    totals: Sums, statistics: Statistics, layer: CompressedLayer, context: LayerContext
) -> None:
    positions, order = layer.store.query_positions[0].sort()
    held = layer.store.tokens.positions[0, 0].argsort()[-len(positions) :]
    sample = Sample(
        queries=layer.store.queries[0][:, :, order],
        keys=layer.store.tokens.keys[0][:, held],
        positions=positions,
        transform=layer.store.bound.transform,
        rotary=functools.cache(lambda: _rotary(context)),
    )
    for name, value in statistics.sums(sample).items():
        totals[name] = totals[name] + value if name in totals else value


def _rotary(context: LayerContext) -> Rotary:
    return rotary_of(context.config, context.module, context.layer, context.dim)
