"""What differs between the supported releases of transformers."""

import inspect
from typing import Any

from transformers import GenerationMixin

_generation: Any = GenerationMixin
_FORWARDED = inspect.signature(_generation.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _FORWARDED else "past_key_values"
"""The name of the argument by which ``generate`` and a model take a cache: renamed in 5.24."""


def cache_argument(cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument of ``generate`` or of a model."""
    return {CACHE: cache}
