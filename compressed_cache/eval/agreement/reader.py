"""A model that reads a left-padded batch with one cache, token by token."""

import inspect
from typing import Any

import torch
from torch import Tensor

from compressed_cache.versions import cache_argument


class Reader:
    """Reads the prompts first, then one token of each row in each step."""

    def __init__(self, model: Any, cache: Any, mask: Tensor, *, steps: int) -> None:
        """
        Args:
            model: a causal language model of transformers.
            cache: any cache of it, empty.
            mask: ``[B, L]`` int64 of the prompts, 0 where padded.
            steps: how many there are at most.
        """
        self._model = model
        self._cache = cache_argument(cache)
        rows, self._seen = mask.shape
        self._mask = torch.cat([mask, mask.new_ones(rows, steps)], dim=1)
        self._position = mask.sum(dim=1, keepdim=True)
        names = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in names
        # Else the logits of all tokens of a prompt would be made.
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in names else {}

    def prompt(self, ids: Tensor) -> Tensor:
        """The logits ``[B, V]`` after the prompts ``[B, L]``."""
        mask = self._mask[:, : self._seen]
        return self._logits(ids, (mask.cumsum(dim=1) - 1).clamp(min=0))

    def step(self, tokens: Tensor) -> Tensor:
        """The logits ``[B, V]`` after one more token of each row ``[B]``."""
        self._seen += 1
        logits = self._logits(tokens[:, None], self._position)
        self._position = self._position + 1
        return logits

    def _logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        where = {"position_ids": positions} if self._takes_positions else {}
        mask = self._mask[:, : self._seen]
        output = self._model(
            input_ids=ids, attention_mask=mask, use_cache=True, **where, **self._last, **self._cache
        )
        return output.logits[:, -1]
