"""What differs between the supported releases of transformers."""

import inspect
from typing import Any

from transformers import GenerationMixin

_generation: Any = GenerationMixin
_FORWARDED = inspect.signature(_generation.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _FORWARDED else "past_key_values"
"""The name of the argument by which ``generate`` and a model take a cache: renamed in 5.24."""


def cache_argument(cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument of ``generate`` or of a model.

    Args:
        cache: any cache of transformers, or a compressed one.
    """
    return {CACHE: cache}


def cache_parameter(module: Any) -> str | None:
    """What a model or attention module calls its cache; None where it takes none."""
    names = inspect.signature(module.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)
