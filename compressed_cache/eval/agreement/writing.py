"""What the full cache writes."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from compressed_cache.eval.agreement.reader import Reader
from compressed_cache.ops.masks import left_padded


@torch.inference_mode()
def write(
    model: Any, prompts: Sequence[list[int]], *, limit: int, ends: set[int]
) -> list[list[int]]:
    """The most likely next token again and again, with transformers' own full cache.

    Nothing of the model's generation_config changes that: no penalty, no sampling.

    Args:
        model: a causal language model of transformers.
        prompts: the token ids of each row.
        limit: tokens written to each row at most.
        ends: the ids that end a text, and belong to it.

    Returns:
        The token ids after each prompt.
    """
    ids, mask = (tensor.to(model.device) for tensor in left_padded(prompts))
    reader = Reader(model, DynamicCache(config=model.config), mask, steps=limit)
    last = torch.tensor(sorted(ends), device=model.device)
    tokens = reader.prompt(ids).argmax(dim=-1)
    written, ended = [tokens], torch.isin(tokens, last)
    while len(written) < limit and not ended.all():
        tokens = reader.step(tokens).argmax(dim=-1)
        written.append(tokens)
        ended |= torch.isin(tokens, last)
    rows = torch.stack(written, dim=1).tolist()
    return [_until(row, ends) for row in rows]


def _until(row: list[int], ends: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[: end + 1]
