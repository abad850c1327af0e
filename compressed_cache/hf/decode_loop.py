"""A loop for ``generate`` that leaves the host little to do between two steps."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.utils import GENERATION_MODES_MAPPING

from compressed_cache.hf import attention_hook as hook
from compressed_cache.hf.checks import ATTENTION
from compressed_cache.versions import CACHE

hook.install()

_MASK = "attention_mask"
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# A model with one of these of its own may need more than another token in each step.
_METHODS = (
    "_sample",
    "_prefill",
    "_update_model_kwargs_for_generation",
    "prepare_inputs_for_generation",
)


@hook.takes_all_arguments
def decode(model: Any, input_ids: Tensor, **arguments: Any) -> Any:
    """The tokens of plain ``generate`` with less work for the host in each step::

        model.generate(**inputs, cache=CompressedCache(), custom_generate=decode)

    What a model reads in a step over a :class:`CompressedCache` is the same each time but for the
    token and its position, so it is prepared once and then written in place. The compiled step,
    the logits processors, the stopping criteria and the streamer are those of plain ``generate``.
    Nothing waits for the device where only a length ends a greedy text.

    A row that has ended is padded, and here the cache is told so: once it has read the token that
    ended it, a row holds what it held, and a conversation goes on in a batch as it does alone. For
    that, the last of these tokens is read too, in one more step. (Plain ``generate`` does not tell,
    so there padding is read as text, until the mask of a later call shows what it was.)

    This is for greedy decoding and sampling. Whatever else is asked for (beams, drafts,
    ``return_dict_in_generate``, another cache, a model that prepares its inputs in a way of its
    own) is left to the loop ``generate`` would have used.

    Args:
        model: the model.
        input_ids: ``[B, L]`` int64 the prompt.
        arguments: what ``generate`` passes to its own loops.

    Returns:
        What ``generate`` returns.
    """
    config: GenerationConfig = arguments["generation_config"]
    mode = config.get_generation_mode(arguments.get("assistant_model"))
    if mode in MODES and _is_simple(model, config, arguments):
        return _decode(model, input_ids, **arguments)
    return getattr(type(model), GENERATION_MODES_MAPPING[mode])(model, input_ids, **arguments)


def _is_simple(model: Any, config: GenerationConfig, arguments: dict[str, Any]) -> bool:
    cache: Any = arguments.get(CACHE)
    return (
        hook.is_compressed(cache)
        # Not while it drafts.
        and cache.is_compileable
        and bool(arguments["use_cache"])
        and arguments.get("position_ids") is not None
        and not arguments.get("synced_gpus")
        and not config.return_dict_in_generate
        and not config.is_assistant
        and prepares_plainly(model)
    )


def prepares_plainly(model: Any) -> bool:
    """Whether all that a model needs in a step is what transformers prepares for any model."""
    is_own = not model.is_remote_code()
    return is_own and all(_is_inherited(model, method) for method in _METHODS)


def _is_inherited(model: Any, method: str) -> bool:
    return getattr(getattr(model, method), "__func__", None) is getattr(GenerationMixin, method)


def longest_text(criteria: Sequence[Any]) -> float:
    """Tokens that the criteria let a text have, the prompt included."""
    limits = (one.max_length for one in criteria if type(one) is MaxLengthCriteria)
    return min(limits, default=math.inf)


def _decode(
    model: Any,
    ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    synced_gpus: bool = False,
    **kwargs: Any,
) -> Tensor:
    forward = (
        model.get_compiled_call(generation_config.compile_config)
        if model._valid_auto_compile_criteria(kwargs, generation_config)
        else model.__call__
    )
    outputs = model._prefill(ids, generation_config, kwargs)
    kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
    cache: Any = kwargs[CACHE]
    # Not where the prompt was of embeddings, or of what is new alone.
    is_whole = cache.get_seq_length() == ids.shape[1]

    criteria = [c for c in stopping_criteria if type(c) is not MaxLengthCriteria]
    longest = longest_text(stopping_criteria)
    pad = generation_config._pad_token_tensor
    pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    unfinished = torch.ones(len(ids), 1, dtype=torch.bool, device=ids.device)
    told, asks = Told(2, ids.device), bool(criteria) or generation_config.do_sample
    broken = torch.zeros((), dtype=torch.bool, device=ids.device)
    inputs: Any = None
    padding: _Padding | None = None
    with model._optimize_model_for_decode():
        while True:
            # A processor may keep or change what it is given.
            is_shown = bool(logits_processor)
            scores = outputs.logits[:, -1].to(ids.device, torch.float32, copy=is_shown)
            del outputs
            for processor in logits_processor:
                scores = processor(ids, scores)
            if generation_config.do_sample:
                tokens, is_broken = draw(scores.softmax(dim=-1))
                broken |= is_broken
            else:
                tokens = scores.argmax(dim=-1, keepdim=True)
            # Or the logits of a whole prompt would stay in memory.
            del scores
            if pads:
                tokens = torch.where(unfinished, tokens, pad.to(ids.device))
            ids = torch.cat([ids, tokens], dim=-1)
            # What ends a row is still read as text.
            real = unfinished
            for criterion in criteria:
                # One of a user's may say it of the batch.
                ended = torch.as_tensor(criterion(ids, None), device=ids.device)
                unfinished = unfinished & ~ended.view(-1, 1)
            if streamer is not None:
                streamer.put(tokens[:, 0].cpu())
            if ids.shape[1] >= longest:
                break
            if asks:
                told.tell(torch.stack([~unfinished.any(), broken]))
                if criteria and not pads and any(told.read()):
                    break
            # Ends the step before, as transformers does when it asks for the size of a mask.
            cache.get_mask_sizes(1, 0)
            if inputs is None:
                inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
                if pads and len(ids) > 1:
                    padding = _Padding(model, inputs)
            else:
                inputs["input_ids"].copy_(tokens)
                inputs["position_ids"].add_(1)
                if padding is not None:
                    padding.write(real)
            outputs = forward(**inputs, return_dict=True)
            # Asked after the step, so that the device has work while the host waits. And alone or
            # beside longer ones, a row has read the token that ended it.
            if asks and any(told.read()):
                break
    if is_whole:
        cache.columns.hold_text(ids[:, : cache.get_seq_length()])
    if broken:
        raise ValueError("probabilities must be numbers, got NaN. Does the model overflow?")
    if streamer is not None:
        streamer.end()
    return ids


def draw(chances: Tensor) -> tuple[Tensor, Tensor]:
    """The draw of ``torch.multinomial``, which on CUDA would wait twice to see what it is given.

    Args:
        chances: ``[B, V]`` float32.

    Returns:
        A token of each row ``[B, 1]``, and whether there is one of which nothing can be drawn, a
        bool ``[]``.
    """
    tokens = (chances / torch.empty_like(chances).exponential_(1.0)).argmax(dim=-1, keepdim=True)
    return tokens, chances.isnan().any()


class Told:
    """What the device says, which the host reads some work later without waiting for that.

    Args:
        count: of its answers.
        device: which.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._answers = torch.zeros(count, dtype=torch.bool, pin_memory=self._is_cuda)
        self._event = torch.cuda.Event() if self._is_cuda else None

    def tell(self, answers: Tensor) -> None:
        """Takes bools ``[count]``, as they will be once the device is there."""
        self._answers.copy_(answers, non_blocking=self._is_cuda)
        if self._event is not None:
            self._event.record()

    def read(self) -> list[bool]:
        """The answers, once the device has given them."""
        if self._event is not None:
            self._event.synchronize()
        return self._answers.tolist()


class _Padding:
    """Tells a cache, by the mask of each step, in which rows the token is padding.

    Args:
        model: the model.
        inputs: of its first step; what they have of masks is replaced by memory that stays.
    """

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self.inputs, self.masks = inputs, list[Tensor]()
        self.is_flash = "flash" in (model.config._attn_implementation or "")
        mask = inputs.get(_MASK)
        if isinstance(mask, dict):
            inputs[_MASK] = {
                kind: self._own(part) if kind in ATTENTION else part for kind, part in mask.items()
            }
        elif not isinstance(mask, Tensor) or mask.dim() == 4:
            inputs[_MASK] = self._own(mask)

    def write(self, real: Tensor) -> None:
        """Takes rows ``[B, 1]`` bool for text, the others for padding."""
        for mask in self.masks:
            if mask.dtype == torch.bool:
                mask.copy_(real[:, :, None, None])
            else:
                mask.fill_(torch.finfo(mask.dtype).min).masked_fill_(real[:, :, None, None], 0.0)
        mask = self.inputs.get(_MASK)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            # The model makes its masks from the whole one.
            self.inputs[_MASK] = torch.cat([mask, real.to(mask.dtype)], dim=1)

    def _own(self, mask: Any) -> Any:
        if mask is None and not self.is_flash:
            return None
        batch = len(self.inputs["input_ids"])
        kind = mask.dtype if isinstance(mask, Tensor) else torch.bool
        own = torch.zeros(batch, 1, 1, 1, dtype=kind, device=self.inputs["input_ids"].device)
        own = own.logical_not_() if kind == torch.bool else own
        self.masks.append(own)
        return own
