"""How long the decode step takes to compile, measured in processes of their own."""

import os
import tempfile

import torch
from transformers import LlamaConfig

from bench.contenders import ENDLESS, STATIC, Generation, compressed, random_model
from bench.prompts import apart
from compressed_cache import compile_layers_once

PROMPT = 64  # tokens
TOKENS = 8  # decoded, enough for a step with a ranking and one without


def measure(cache: str, layers: int, device: str, *, once: bool) -> dict[str, float]:
    """Compiles the decode step of a model, then once more in a new process.

    Args:
        cache: ``"StaticCache"`` or the name of a policy.
        layers: of the model, which is narrow: widths do not matter to a compiler.
        device: ``"cpu"`` or ``"cuda"``.
        once: whether ``compile_layers_once`` is called before.

    Returns:
        ``cold_s``, with nothing on disk, and ``warm_s``, with what the first process left there:
        seconds that decoding takes beyond the time of as many compiled steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: apart(_measure, cache, layers, device, once, folder)
            for name in ("cold_s", "warm_s")
        }


def _measure(cache: str, layers: int, device: str, once: bool, folder: str) -> float:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    torch.set_num_threads(1)
    model = random_model(_config(layers), device)
    if once:
        compile_layers_once(model)
    contender = STATIC if cache == STATIC.name else compressed(cache)
    seconds = Generation(contender, model, batch=1, prompt=PROMPT).continue_by(TOKENS)
    return sum(seconds) - len(seconds) * min(seconds)


def _config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
        max_position_embeddings=4096,
        **ENDLESS,
    )
