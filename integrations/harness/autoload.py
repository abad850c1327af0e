"""Makes the stock ``lm_eval`` accept ``kv_`` arguments.

torch calls :func:`install` whenever it is imported (entry-point group ``torch.backends``), because
lm_eval 0.4.13 loads no plugins itself. So this module imports nothing but what Python has loaded
anyway, and never raises: an exception here would break ``import torch``.

It waits for ``lm_eval.api.registry`` and watches what is registered there. Not for the module of
the model class: that one imports torch before it defines the class, so that it may be half executed
when torch calls.

Off with ``COMPRESSED_CACHE_AUTOLOAD=0``, or with torch's own ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.
"""

import os
import sys
from typing import Any

from compressed_cache.integrations import when_imported

_REGISTRY = "lm_eval.api.registry"
_MODELS = "lm_eval.models.huggingface"


def install() -> None:
    """Patches lm_eval's Hugging Face model class, now or as soon as it is defined."""
    if os.environ.get("COMPRESSED_CACHE_AUTOLOAD") == "0":
        return
    try:
        model_class = getattr(sys.modules.get(_MODELS), "HFLM", None)
        if model_class is not None:
            _patch(model_class)
        else:
            when_imported(_REGISTRY, _watch)
    except Exception as error:
        _report(error)


def _watch(registry: Any) -> None:
    try:
        register_model = registry.register_model
    except AttributeError as error:
        _report(error)
        return

    def watching(*names: str) -> Any:
        decorate = register_model(*names)

        def decorated(model_class: Any) -> Any:
            registered = decorate(model_class)
            if (model_class.__module__, model_class.__name__) == (_MODELS, "HFLM"):
                _patch(model_class)
            return registered

        return decorated

    registry.register_model = watching


def _patch(model_class: Any) -> None:
    try:
        from compressed_cache.integrations.harness.adapter import patch

        patch(model_class)
    except Exception as error:
        _report(error)


def _report(error: Exception) -> None:
    import logging

    logging.getLogger("lm_eval.compressed_cache").warning(
        "kv_ arguments are not available with this lm_eval: %r", error
    )
