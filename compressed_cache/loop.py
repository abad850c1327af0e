"""A loop for ``generate`` that leaves the host next to nothing to do between two steps."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import logits_process
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GENERATION_MODES_MAPPING

from compressed_cache import hook
from compressed_cache.cache import CompressedCache
from compressed_cache.versions import CACHE

hook.install()

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# A model with one of these of its own may do anything between two steps.
_METHODS = (
    "_sample",
    "_prefill",
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
)
# These need no more than the scores of one step, so they are traced with the model.
_TRACED = (
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.LogitNormalization,
    logits_process.MinPLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TypicalLogitsWarper,
)
_ROOM = 256


@hook.takes_all_arguments
def decode(model: Any, input_ids: Tensor, **arguments: Any) -> Any:
    """Decodes the tokens of plain ``generate`` with less work for the host in each step::

        model.generate(**inputs, past_key_values=CompressedCache(), custom_generate=decode)

    One function runs the model, chooses a token of each row and notes which rows are finished. It
    is compiled where ``generate`` would compile the model, with the same settings, and its inputs
    are prepared once. Logits processors that need more than the scores of one step (a repetition
    penalty, a minimal length, your own) and stopping criteria other than a length and
    end-of-sequence tokens are called eagerly after it.

    This is for greedy decoding and sampling over a :class:`CompressedCache`. Whatever else is asked
    for (beams, drafts, ``return_dict_in_generate``, another cache, a model that prepares its inputs
    in a way of its own) is left to the loop that ``generate`` would have used.

    Args:
        model: the model.
        input_ids: ``[B, L]`` int64 the prompt.
        arguments: what ``generate`` passes to its own loops.

    Returns:
        What ``generate`` returns.
    """
    if not _is_ours(model, input_ids, arguments):
        config: GenerationConfig = arguments["generation_config"]
        mode = config.get_generation_mode(arguments.get("assistant_model"))
        return getattr(type(model), GENERATION_MODES_MAPPING[mode])(model, input_ids, **arguments)
    for unused in ("synced_gpus", "tokenizer", "assistant_tokenizer"):
        arguments.pop(unused, None)
    with model._optimize_model_for_decode():
        return _decode(model, Text(input_ids, arguments.pop("streamer", None)), **arguments)


class Text:
    """What was read and written, in memory that grows now and then."""

    def __init__(self, ids: Tensor, streamer: Any) -> None:
        self.length = ids.shape[1]
        self._ids = ids
        self._streamer = streamer

    @property
    def ids(self) -> Tensor:
        """``[B, L]`` int64."""
        return self._ids[:, : self.length]

    def append(self, tokens: Tensor) -> None:
        """Adds the tokens ``[B, 1]``."""
        if self.length == self._ids.shape[1]:
            room = self._ids.new_empty(self._ids.shape[0], _ROOM)
            self._ids = torch.cat([self._ids, room], dim=1)
        self._ids[:, self.length : self.length + 1] = tokens
        self.length += 1
        if self._streamer is not None:
            self._streamer.put(tokens[:, 0].cpu())

    def end(self) -> Tensor:
        """``[B, L]`` int64, without spare memory."""
        if self._streamer is not None:
            self._streamer.end()
        return self.ids.contiguous()


class Buffers(NamedTuple):
    """What one step leaves for the next, written in place."""

    tokens: Tensor
    """``[B, 1]`` int64, the tokens to read."""
    positions: Tensor
    """``[..., B, 1]`` int64, their positions as the model counts them."""
    unfinished: Tensor
    """``[B]`` bool, rows that did not end."""

    @classmethod
    def of(cls, cache: CompressedCache, positions: Tensor) -> "Buffers":
        """Those of this cache, for tokens at ``positions``.

        They stay with the cache because CUDA graphs are recorded anew at other addresses.
        """
        buffers = _BUFFERS.get(cache)
        kept = None if buffers is None else (buffers.positions.shape, buffers.positions.device)
        if buffers is None or kept != (positions.shape, positions.device):
            buffers = _BUFFERS[cache] = cls._allocate(positions)
        buffers.positions.copy_(positions)
        buffers.unfinished.fill_(True)
        return buffers

    # A tensor born in inference mode could not be written outside of it.
    @classmethod
    @torch.inference_mode(False)
    def _allocate(cls, positions: Tensor) -> "Buffers":
        rows, device = positions.shape[-2], positions.device
        buffers = cls(
            torch.zeros(rows, 1, dtype=torch.int64, device=device),
            torch.empty_like(positions, memory_format=torch.contiguous_format),
            torch.ones(rows, dtype=torch.bool, device=device),
        )
        for tensor in buffers:
            torch._dynamo.mark_static_address(tensor)
        return buffers


_BUFFERS: WeakKeyDictionary[CompressedCache, Buffers] = WeakKeyDictionary()


class Step:
    """Reads a token of each row and chooses the next."""

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Any],
        buffers: Buffers,
        choice: "Choice",
    ) -> None:
        self.model = model
        self.inputs = inputs | {"input_ids": buffers.tokens, "position_ids": buffers.positions}
        self.buffers = buffers
        self.choice = choice

    def advance(self) -> Tensor:
        """One step; returns whether a row is unfinished, a 0-d bool."""
        return self.choose(self.buffers.tokens, self.read())

    def read(self) -> Tensor:
        """The logits ``[B, V]`` after the tokens in the buffers."""
        logits = self.model(**self.inputs, return_dict=True).logits[:, -1]
        self.buffers.positions.add_(1)
        return logits

    def choose(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Puts the next tokens into the buffers.

        Args:
            ids: ``[B, L]`` int64 the text, for processors that look at it.
            logits: ``[B, V]``.

        Returns:
            Whether a row is unfinished, a 0-d bool.
        """
        tokens, _, unfinished = self.buffers
        chosen = self.choice(ids, logits, unfinished)
        tokens.copy_(chosen)
        if self.choice.ends is not None:
            unfinished.logical_and_(~torch.isin(chosen[:, 0], self.choice.ends))
        return unfinished.any()


class Choice(NamedTuple):
    """How ``generate`` was told to choose a token."""

    processors: list[Any]
    samples: bool
    ends: Tensor | None
    """``[E]`` int64, the tokens that end a row."""
    pad: Tensor | None
    """0-d int64, what follows them."""

    @classmethod
    def of(cls, config: Any, processors: list[Any], criteria: list[Any]) -> "Choice":
        """That of the arguments ``generate`` made."""
        ends = [ending.eos_token_id for ending in criteria if type(ending) is EosTokenCriteria]
        pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        return cls(
            list(processors),
            bool(config.do_sample),
            torch.cat(ends) if ends else None,
            config._pad_token_tensor if pads else None,
        )

    @property
    def is_traced(self) -> bool:
        """Whether it needs no more than the logits."""
        return all(type(processor) in _TRACED for processor in self.processors)

    def __call__(self, ids: Tensor, logits: Tensor, unfinished: Tensor) -> Tensor:
        """The next tokens ``[B, 1]`` int64."""
        # Logits of another device are those of a model on several.
        scores = logits.to(copy=True, dtype=torch.float32, device=unfinished.device)
        for processor in self.processors:
            scores = processor(ids, scores)
        if self.samples:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
        else:
            tokens = scores.argmax(dim=-1, keepdim=True)
        return tokens if self.pad is None else torch.where(unfinished[:, None], tokens, self.pad)


def _decode(
    model: Any,
    text: Text,
    *,
    logits_processor: list[Any],
    stopping_criteria: list[Any],
    generation_config: GenerationConfig,
    **kwargs: Any,
) -> Tensor:
    compiled = _compiler(model, kwargs, generation_config)
    outputs = model._prefill(text.ids, generation_config, kwargs)
    kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
    inputs = model.prepare_inputs_for_generation(text.ids, next_sequence_length=1, **kwargs)
    cache = kwargs[CACHE]
    buffers = Buffers.of(cache, inputs["position_ids"])
    choice = Choice.of(generation_config, logits_processor, stopping_criteria)
    step = Step(model, inputs, buffers, choice)
    run = compiled(step.advance if choice.is_traced else step.read)
    limits = [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria]
    others = [c for c in stopping_criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
    may_end = choice.ends is not None or bool(others)
    unfinished = step.choose(text.ids, outputs.logits[:, -1])
    del outputs
    while True:
        text.append(buffers.tokens)
        for criterion in others:
            buffers.unfinished.logical_and_(~criterion(text.ids, None))
            unfinished = buffers.unfinished.any()
        # Without anything that ends a row nobody waits for the device.
        if text.length >= min(limits, default=math.inf) or (may_end and not unfinished):
            return text.end()
        # Ends the step before, as transformers does when it asks for the size of a mask.
        cache.get_mask_sizes(1, 0)
        unfinished = run() if choice.is_traced else step.choose(text.ids, run())


def _compiler(model: Any, kwargs: dict[str, Any], config: Any) -> Callable[..., Any]:
    """``torch.compile`` with the settings of ``generate`` where that compiles the model."""
    if not model._valid_auto_compile_criteria(kwargs, config):
        return lambda function: function
    settings = config.compile_config or model._default_compile_config()
    return functools.partial(torch.compile, **settings.to_dict())


def _is_ours(model: Any, input_ids: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether nothing is asked for that needs a loop of transformers' own."""
    config = arguments["generation_config"]
    cache = arguments.get(CACHE)
    return (
        config.get_generation_mode(arguments.get("assistant_model")) in _MODES
        and isinstance(cache, CompressedCache)
        # Not while it drafts.
        and cache.is_compileable
        and bool(arguments["use_cache"])
        and arguments.get("position_ids") is not None
        and input_ids.device == model.device
        and not arguments.get("synced_gpus")
        and not config.return_dict_in_generate
        and not config.is_assistant
        and not model.is_remote_code()
        and all(_is_inherited(model, method) for method in _METHODS)
    )


def _is_inherited(model: Any, method: str) -> bool:
    return getattr(getattr(model, method), "__func__", None) is getattr(GenerationMixin, method)
