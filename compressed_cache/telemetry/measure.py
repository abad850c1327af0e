"""What ``generate`` takes, with any cache."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from compressed_cache.cache import CompressedCache
from compressed_cache.hf.draft_length import DraftStatistics
from compressed_cache.hf.lossless import lossless
from compressed_cache.telemetry import peaks
from compressed_cache.telemetry.timer import Timer
from compressed_cache.telemetry.timestamps import Timestamp, seconds_between
from compressed_cache.telemetry.timing import Timing, finished, total
from compressed_cache.versions import CACHE

_NAMES = ("cache", "past_key_values")
_DRAFTING = ("assistant_model", "prompt_lookup_num_tokens")


class Measurement:
    """What was measured so far.

    Attributes:
        runs: one :class:`Timing` for each call of ``generate``.
    """

    def __init__(self) -> None:
        self.runs: list[Timing] = []

    @property
    def timing(self) -> Timing:
        """All runs together.

        Raises:
            ValueError: there was none.
        """
        return total(self.runs)


@contextmanager
def measure(model: Any) -> Iterator[Measurement]:
    """Times ``model.generate`` as long as it is open, whatever cache it is given::

        with measure(model) as m:
            model.generate(**inputs, cache=CompressedCache())
        m.timing.tokens_per_s

    Of ``n`` tokens it sees ``n - 1`` steps, all of them whole. A :class:`CompressedCache` tells
    when the model begins to read a token, so a step ends where the next one begins, and the last
    where ``generate`` returns. No other cache tells, so there a step is from the logits of one
    token to those of the next, noted by a logits processor that changes nothing. On CUDA these
    moments are noted in the stream and compared when ``generate`` is through; no step waits for
    the device.

    Under :func:`~compressed_cache.lossless` there are no steps of one token, and the run has
    :attr:`Timing.drafts` in their place.

    On CUDA, PyTorch's own count of peak memory starts anew with each run.

    Args:
        model: a transformers model; other models, also of the same class, are not affected.

    Raises:
        TypeError: something without ``generate``.
    """
    original = getattr(model, "generate", None)
    if original is None:
        raise TypeError(
            f"model must be a transformers model that can generate, got {type(model).__name__}"
        )
    measurement = Measurement()

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        result, timing = _timed(original, model, args, kwargs)
        measurement.runs.append(timing)
        return result

    before = vars(model).get("generate")
    model.generate = generate
    try:
        yield measurement
    finally:
        if before is None:
            del model.generate
        else:
            model.generate = before


class _Marks(LogitsProcessor):
    """Notes when there are logits, and leaves them as they are."""

    def __init__(self) -> None:
        self.marks: list[Timestamp] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.marks.append(Timestamp())
        return scores


def _timed(
    original: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Timing]:
    config = kwargs.get("generation_config") or model.generation_config
    for name in _DRAFTING:
        if kwargs.get(name) is not None or getattr(config, name, None) is not None:
            raise NotImplementedError(
                f"{name} must be left out while measure is open: drafted tokens are no steps"
            )
    cache = next((kwargs[name] for name in _NAMES if kwargs.get(name) is not None), None)
    before, evicted = _counts(cache)
    peaks.restart()
    start = Timestamp()
    loop = kwargs.get("custom_generate")
    preset = loop.keywords if isinstance(loop, functools.partial) else {}
    is_lossless = lossless in (loop, getattr(loop, "func", None))
    drafts = DraftStatistics() if is_lossless else None
    if drafts is not None:
        result, steps = _drafted(original, drafts, args, preset | kwargs)
    elif isinstance(cache, CompressedCache):
        result, steps = _announced(original, cache, args, kwargs)
    else:
        result, cache, steps = _processed(original, cache, config, args, kwargs)
    prefill_s, *step_s = seconds_between([start, *steps], model.device)
    prefill_s -= drafts.seconds if drafts else 0.0
    sequences: Any = getattr(result, "sequences", result)
    seen, evicted_now = _counts(cache)
    rows, length = sequences.shape
    given = _prompt_length(args, kwargs)
    if drafts is not None:
        # The full cache reads all that it is given.
        tokens_in = given or kwargs["inputs_embeds"].shape[1]
    else:
        # The rest were read as steps.
        tokens_in = given if cache is None else seen - before - len(step_s)
    timing = finished(
        cache,
        device=model.device,
        rows=rows,
        prefill_s=prefill_s,
        step_s=step_s,
        tokens_in=rows * tokens_in,
        tokens_out=rows * (length - given),
        evicted_tokens=evicted_now - evicted,
        drafts=drafts,
    )
    return result, timing


def _announced(
    original: Any, cache: CompressedCache, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, list[Timestamp]]:
    """The result, and where each step began and the last ended."""
    timer = Timer()
    cache.add_observer(timer)
    try:
        result = original(*args, **kwargs)
    finally:
        cache.remove_observer(timer)
    # The first call reads what it is given, be it one token.
    return result, [*(call.mark for call in timer.calls[1:] if call.is_step), Timestamp()]


def _drafted(
    original: Any, drafts: DraftStatistics, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, list[Timestamp]]:
    """The result, and where it was there."""
    theirs = kwargs.get("statistics")
    if not isinstance(theirs, DraftStatistics | None):
        # Refused there.
        return original(*args, **kwargs), []
    result = original(*args, **kwargs | {"statistics": drafts})
    if theirs is not None:
        theirs.add(drafts)
    return result, [Timestamp()]


def _processed(
    original: Any, cache: Any, config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any, list[Timestamp]]:
    """The result, the cache, and when there were the logits of each token."""
    marks = _Marks()
    own = kwargs.get("logits_processor") or []
    kwargs["logits_processor"] = LogitsProcessorList([*own, marks])
    if cache is not None:
        return original(*args, **kwargs), cache, marks.marks
    name = "return_dict_in_generate"
    asked = kwargs.get(name)
    if asked is None:
        asked = getattr(config, name, False)
    # Else nobody but generate sees the cache it makes.
    result = original(*args, **kwargs | {name: True})
    return result if asked else result.sequences, getattr(result, CACHE, None), marks.marks


def _prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens of the prompt that are in the result too."""
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    # Of embeddings alone only what is new is returned.
    return 0 if ids is None else ids.shape[1]


def _counts(cache: Any) -> tuple[int, int]:
    """Tokens seen and evicted so far."""
    if cache is None:
        return 0, 0
    return int(cache.get_seq_length()), getattr(cache, "evicted_tokens", 0)
