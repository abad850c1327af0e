"""What ``generate`` takes, with any cache."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from compressed_cache.telemetry import peaks
from compressed_cache.telemetry.marks import Mark, seconds_between
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
            model.generate(**inputs, past_key_values=CompressedCache())
        m.timing.tokens_per_s

    The moments are those at which the logits of a token are ready to be chosen from. So the first
    is the end of the prompt, each step is choosing a token and reading it, and of ``n`` tokens
    ``n - 1`` steps are seen, all of them whole. On CUDA they are noted in the stream and compared
    when ``generate`` is through; no step waits for the device.

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
        self.marks = [Mark()]
        self.prompt_length = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(self.marks) == 1:
            self.prompt_length = input_ids.shape[1]
        self.marks.append(Mark())
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
    given = [kwargs[name] for name in _NAMES if kwargs.get(name) is not None]
    asked = kwargs.get("return_dict_in_generate")
    if asked is None:
        asked = bool(getattr(config, "return_dict_in_generate", False))
    if not given:
        # Else nobody but generate sees the cache it makes.
        kwargs["return_dict_in_generate"] = True
    before = int(given[0].get_seq_length()) if given else 0
    peaks.restart()
    marks = _Marks()
    own = kwargs.pop("logits_processor", None) or []
    result = original(*args, logits_processor=LogitsProcessorList([*own, marks]), **kwargs)
    cache = given[0] if given else getattr(result, CACHE, None)
    sequences = result if isinstance(result, Tensor) else result.sequences
    prefill_s, *step_s = seconds_between(marks.marks, model.device)
    rows, prompt = len(sequences), marks.prompt_length
    read = prompt if cache is None else int(cache.get_seq_length()) - before - len(step_s)
    timing = finished(
        cache,
        device=model.device,
        rows=rows,
        prefill_s=prefill_s,
        step_s=step_s,
        tokens_in=rows * read,
        tokens_out=rows * (sequences.shape[1] - prompt),
    )
    if not given and not asked:
        result = result.sequences
    return result, timing
