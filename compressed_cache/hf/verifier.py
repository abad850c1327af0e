"""The model's word on tokens that were drafted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compressed_cache.hf.full_cache import FullCache
from compressed_cache.versions import cache_argument

# Others make no mask of all columns, or attend by it to as many as there is memory for.
_MASKED = ("sdpa", "eager")


class Verifier:
    """Reads tokens with all keys and values, in calls that are compiled where drafts are.

    Of these there are two: one with a single token, and one with as many as are ever drafted, in
    which fewer are padded, since a number of tokens that changes would be a graph each time.

    Args:
        model: the model.
        full: holds the prompt.
        compile: compiles a function as the model is; None: nothing is compiled.
        drafts: the most tokens that are drafted.
    """

    def __init__(
        self, model: Any, full: FullCache, compile: Callable[..., Any] | None, drafts: int
    ) -> None:
        self.model, self.full, self.drafts = model, full, drafts
        if model.config.get_text_config()._attn_implementation not in _MASKED:
            compile = None
        self._call = None if compile is None else compile(_call, dynamic=False)

    def width(self, tokens: int) -> int:
        """How many tokens are read where ``tokens`` are wanted."""
        return tokens if self._call is None or tokens == 1 else self.drafts + 1

    def read(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits ``[B, L, V]`` after each of the tokens.

        Args:
            tokens: ``[B, L]`` int64.
            positions: ``[..., B, W]`` int64 of as many as are read, see :meth:`width`.
        """
        length, width = tokens.shape[1], positions.shape[-1]
        arguments = {"position_ids": positions, "use_cache": True, **cache_argument(self.full)}
        if self._call is None:
            mask = self.full.mask(length)
            return _call(self.model, {"input_ids": tokens, "attention_mask": mask, **arguments})
        if width > length:
            tokens = torch.cat([tokens, tokens[:, -1:].expand(-1, width - length)], dim=1)
        mask = self.full.begin(width)
        inputs = self.model.prepare_inputs_for_generation(
            tokens, next_sequence_length=width, attention_mask=mask, **arguments
        )
        logits = self._call(self.model, inputs)
        self.full.end(width)
        return logits[:, :length]


def _call(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=True).logits
