"""What reading a prompt takes, measured in a process of its own."""

import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import DynamicCache, LlamaConfig

from bench.contenders import ENDLESS, Place, make_model, random_model
from compressed_cache import CompressedCache
from compressed_cache.versions import cache_argument

Result = TypeVar("Result")
CHUNK = 1024  # tokens
BUDGET = 256
_SHORT = 256  # tokens, to warm up
SMALL = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=500,
    max_position_embeddings=1 << 20,
    **ENDLESS,
)


def measure_chunks(cache: str, tokens: int, device: str) -> dict[str, float]:
    """Peak memory and time of reading a prompt in chunks, with a model of 4 layers of 128.

    Args:
        cache: ``"DynamicCache"`` or the name of a policy.
        tokens: length of the prompt.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        ``peak_mib``, memory beyond what a prompt of one chunk took (on a CPU the peak of resident
        memory, as Linux tells it), and ``seconds``.
    """
    return apart(_measure_chunks, cache, tokens, device)


def measure_prefill(cache: str, tokens: int, place: Place) -> dict[str, float]:
    """Peak memory and time of reading a prompt at once, with the model of this place.

    Returns:
        ``peak_mib``, memory beyond the model and a short prompt, and ``seconds``.
    """
    return apart(_measure_prefill, cache, tokens, place)


def apart(function: Callable[..., Result], *args: object) -> Result:
    """What a function returns in a process of its own, that begins with nothing in memory."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def _measure_chunks(cache: str, tokens: int, device: str) -> dict[str, float]:
    return _measure(
        random_model(SMALL, device), cache, tokens, short=CHUNK, prefill_chunk_size=CHUNK
    )


def _measure_prefill(cache: str, tokens: int, place: Place) -> dict[str, float]:
    return _measure(make_model(place), cache, tokens, short=_SHORT)


def _measure(
    model: Any, cache: str, tokens: int, *, short: int, **options: object
) -> dict[str, float]:
    torch.set_num_threads(1)
    device = model.device.type
    _read(model, cache, short, options)
    before = _peak_bytes(device)
    started = time.perf_counter()
    _read(model, cache, tokens, options)
    seconds = time.perf_counter() - started
    return {"peak_mib": (_peak_bytes(device) - before) / 2**20, "seconds": seconds}


def _read(model: Any, name: str, tokens: int, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 500, (1, tokens), generator=generator).to(model.device)
    full = name == "DynamicCache"
    cache: Any = DynamicCache(config=model.config) if full else CompressedCache(name, BUDGET)
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(cache),
            max_new_tokens=1,
            do_sample=False,
            disable_compile=True,
            **options,
        )
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage, whose maximum a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kib) * 1024
