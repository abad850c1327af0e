"""What is measured: models, a prompt, and a way to generate for each kind of cache."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    StaticCache,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from bench.grouped import GROUPED
from compressed_cache import CompressedCache, decode
from compressed_cache.eval.demo.measure import CORE
from compressed_cache.versions import cache_argument

BUDGET = 128
PROMPT = 2048  # tokens
ROOM = 512  # tokens that a static cache has room for beyond the prompt
SHORTEST = 16  # slots of the floor
EVICTING = [name for name in CORE if name != "full"]

ENDLESS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SMALL = LlamaConfig(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=2000,
    max_position_embeddings=1 << 18,
    **ENDLESS,
)
LLAMA = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=1 << 18,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    **ENDLESS,
)
QWEN = Qwen3Config(
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=1 << 18,
    tie_word_embeddings=True,
    **ENDLESS,
)
MODELS: dict[str, PreTrainedConfig] = {
    "4 layers of 512": SMALL,
    "Llama-3.1-8B": LLAMA,
    "Qwen3-4B": QWEN,
}


@dataclass(frozen=True)
class Place:
    """A device and what is measured on it."""

    device: str
    model: str
    batches: tuple[int, ...]
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.device}-{self.model}"


PLACES = [
    Place("cpu", "4 layers of 512", (1, 8), (1024, 8192, 32768)),
    *(
        Place("cuda", model, (1, 8, 32, 64, 128), (1024, 8192, 32768, 131072))
        for model in ("Llama-3.1-8B", "Qwen3-4B")
    ),
]
_MARKS = {
    "cpu": (),
    "cuda": (
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ),
}
EACH_PLACE = pytest.mark.parametrize(
    "place",
    [pytest.param(place, id=str(place), marks=_MARKS[place.device]) for place in PLACES],
)
EACH_DEVICE = pytest.mark.parametrize(
    "device", [pytest.param(device, marks=marks) for device, marks in _MARKS.items()]
)


def make_model(place: Place) -> Any:
    """The model of this place."""
    return random_model(MODELS[place.model], place.device)


def random_model(config: PreTrainedConfig, device: str) -> Any:
    """Random weights: float32 on a CPU, bfloat16 on CUDA."""
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


@dataclass(frozen=True)
class Contender:
    """A cache, and how ``generate`` takes its steps."""

    name: str
    make_cache: Callable[[Any, int], Cache]
    """From the model and the length of the prompt."""
    compiled: bool = False
    attention: str = "sdpa"
    loop: bool = False
    """Whether ``decode`` takes the place of the loop of ``generate``."""
    capacity: int | None = None
    """Tokens after which the text starts anew, for a cache that cannot hold more."""

    def __str__(self) -> str:
        return f"{self.name}-{self.step.replace(', ', '-')}"

    @property
    def step(self) -> str:
        """How a step is taken, for a table."""
        step = "compiled" if self.compiled else "eager"
        return f"{step}, decode" if self.loop else step


def compressed(
    policy: str, *, compiled: bool = True, budget: int = BUDGET, loop: bool = False
) -> Contender:
    """A compressed cache."""
    return Contender(policy, lambda *_: CompressedCache(policy, budget), compiled, loop=loop)


BASELINE = Contender("DynamicCache", lambda model, _: DynamicCache(config=model.config))
STATIC = Contender(
    "StaticCache",
    lambda model, prompt: StaticCache(model.config, max_cache_len=prompt + ROOM),
    compiled=True,
)
GROUPED_STATIC = Contender(
    "StaticCache, keys not repeated", STATIC.make_cache, compiled=True, attention=GROUPED
)
FLOOR = Contender(
    f"StaticCache of {SHORTEST} slots",
    lambda model, _: StaticCache(model.config, max_cache_len=SHORTEST),
    compiled=True,
    capacity=SHORTEST,
)
"""The model with next to no cache: what no cache can beat."""


def compile_options(compiled: bool, device: str) -> dict[str, Any]:
    """What ``generate`` is given, so that it compiles its steps on this device or does not."""
    options: dict[str, Any] = {"disable_compile": not compiled}
    if compiled and device == "cpu":
        config: Any = CompileConfig(fullgraph=True, mode="default")
        config._compile_all_devices = True
        options["compile_config"] = config
    return options


class Generation:
    """A text that ``generate`` continues call by call, timed token by token.

    Each call reads one token eagerly, as generation does after a prompt, and decodes the others;
    only those count. Everything that a user waits for is included: the model, the cache, and what
    ``generate`` itself does between two tokens. A cache that keeps everything is filled with random
    keys and values in place of a prompt, which takes as long to read and less to make.
    """

    def __init__(
        self, contender: Contender, model: Any, *, batch: int, prompt: int = PROMPT
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.capacity, self.attention = contender.capacity, contender.attention
        if self.capacity is not None:
            prompt = 1
        ids = torch.randint(1, model.config.vocab_size, (batch, prompt), generator=generator)
        self.model, self.ids = model, ids.to(model.device)
        self.cache = contender.make_cache(model, prompt)
        if not isinstance(self.cache, CompressedCache):
            _fill(self.cache, model.config, self.ids, model.dtype)
        self.options = compile_options(contender.compiled, model.device.type)
        if contender.loop:
            self.options["custom_generate"] = decode

    def continue_by(self, tokens: int) -> list[float]:
        """Generates ``tokens`` tokens after an untimed first one; seconds of each."""
        self.model.set_attn_implementation(self.attention)
        if self.capacity is None:
            return self._continue_by(tokens)
        seconds: list[float] = []
        while len(seconds) < tokens:
            with torch.inference_mode():
                self.cache.reset()
            self.ids = self.ids[:, :1]
            seconds += self._continue_by(min(self.capacity - 2, tokens - len(seconds)))
        return seconds

    def _continue_by(self, tokens: int) -> list[float]:
        clock = _TokenClock()
        with torch.inference_mode():
            self.ids = self.model.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                **cache_argument(self.cache),
                max_new_tokens=tokens + 1,
                do_sample=False,
                streamer=clock,
                **self.options,
            )
        # The first call to the streamer hands over the prompt, the second the untimed token.
        return [after - before for before, after in zip(clock.at[1:], clock.at[2:], strict=False)]


def _fill(cache: Cache, config: Any, ids: torch.Tensor, dtype: torch.dtype) -> None:
    """Makes a cache hold all but the last of these tokens."""
    shape = len(ids), config.num_key_value_heads, ids.shape[1] - 1, config.head_dim
    if not shape[2]:
        return
    with torch.inference_mode():
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.randn(shape, dtype=dtype, device=ids.device) for _ in range(2))
            cache.update(keys, values, layer)


class _TokenClock(BaseStreamer):
    """Notes when each token reaches the user, which on CUDA includes waiting for it."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass
