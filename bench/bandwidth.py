"""How close a decode step comes to reading its memory once, as fast as the device can."""

import time
from functools import cache
from typing import Any

import torch

_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
_ROUNDS = 10


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second that a large copy reads and writes, at best of ten."""
    source = torch.zeros(_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(_ROUNDS):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


def step_bytes(model: Any, cache_bytes: int) -> int:
    """Bytes that must be read to decode one token per row: the weights and what is held.

    Of the input embeddings only some rows are read; tied to the output they are read as that.
    """
    weights = sum(weight.nbytes for weight in model.parameters())
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    return weights - (0 if tied else embedding.nbytes) + cache_bytes


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values that a cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
