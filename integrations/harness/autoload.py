"""Makes the stock ``lm_eval`` accept ``kv_`` arguments and know the tasks of this package.

torch calls :func:`install` whenever it is imported (entry-point group ``torch.backends``), because
lm_eval 0.4.13 loads no plugins itself. So this module imports nothing but what Python has loaded
anyway, and never raises: an exception here would break ``import torch``.

It waits for ``lm_eval.api.registry`` and watches what is registered there. Not for the module of
the model class: that one imports torch before it defines the class, so that it may be half executed
when torch calls.

Tasks are known without ``--include_path`` wherever torch is imported before lm_eval looks for
them: from Python, and in releases with an entry-point group ``lm_eval.tasks``, which need no hook.
The command ``lm_eval`` of 0.4.13 looks before anybody has imported torch.

Off with ``COMPRESSED_CACHE_AUTOLOAD=0``, or with torch's own ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.
"""

import os
import sys
from pathlib import Path
from typing import Any

from compressed_cache.integrations import when_imported

_REGISTRY = "lm_eval.api.registry"
_MODELS = "lm_eval.models.huggingface"
_INDEX = "lm_eval.tasks._index"


def install() -> None:
    """Patches lm_eval's Hugging Face model class and its index of tasks, now or as soon as they are
    defined."""
    if os.environ.get("COMPRESSED_CACHE_AUTOLOAD") == "0":
        return
    try:
        model_class = getattr(sys.modules.get(_MODELS), "HFLM", None)
        if model_class is not None:
            _patch(model_class)
        else:
            when_imported(_REGISTRY, _watch)
        when_imported(_INDEX, _add_tasks)
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


def _add_tasks(module: Any) -> None:
    """Puts this package's tasks between lm_eval's own and those of ``--include_path``."""
    try:
        build = module.TaskIndex.build
    except AttributeError as error:
        _report(error, "tasks are known by --include_path only")
        return
    if getattr(build, "has_ours", False):
        return
    own = Path(module.__file__).parent

    def build_with_ours(paths: Any, *args: Any, **kwargs: Any) -> Any:
        from compressed_cache.tasks import PATH

        paths = list(paths)
        if own in paths and PATH not in [Path(path).resolve() for path in paths]:
            paths.insert(paths.index(own) + 1, PATH)
        return build(paths, *args, **kwargs)

    build_with_ours.has_ours = True  # pyright: ignore[reportFunctionMemberAccess]
    module.TaskIndex.build = staticmethod(build_with_ours)


def _patch(model_class: Any) -> None:
    try:
        from compressed_cache.integrations.harness.adapter import patch

        patch(model_class)
    except Exception as error:
        _report(error)


def _report(error: Exception, what: str = "kv_ arguments are not available") -> None:
    import logging

    logging.getLogger("lm_eval.compressed_cache").warning(
        "%s with this lm_eval: %r", *(what, error)
    )
