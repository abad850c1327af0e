"""What differs between the supported releases of transformers."""

import inspect
from typing import Any

from transformers import GenerationMixin

_generation: Any = GenerationMixin
_FORWARDED = inspect.signature(_generation.prepare_inputs_for_generation).parameters
_NAME = "cache" if "cache" in _FORWARDED else "past_key_values"


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument by which ``generate`` and a model take a cache: renamed in 5.24."""
    return {_NAME: cache}
