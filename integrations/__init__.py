"""Everything that knows another library.

Importing it gives ``transformers.pipeline`` the task ``kv-press-text-generation``. torch executes
this module as well whenever it is imported, on the way to ``harness/autoload.py``, and nobody can
execute it a second time later on. So it imports nothing but what Python has loaded anyway, never
raises, and registers the task once somebody imports transformers' pipelines.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

_PIPELINES = "transformers.pipelines"


def when_imported(name: str, act: Callable[[Any], None]) -> None:
    """Calls ``act`` with the module of this name, now or right after it is executed."""
    finder: Any = _Finder(name, act)
    if name in sys.modules:
        act(sys.modules[name])
    elif finder not in sys.meta_path:
        sys.meta_path.insert(0, finder)


class _Finder(NamedTuple):
    """Stands aside as soon as the module was found once."""

    name: str
    act: Callable[[Any], None]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)  # pyright: ignore[reportArgumentType]
        from importlib.util import find_spec

        spec = find_spec(name)
        loader: Any = spec and spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                self.act(module)

            loader.exec_module = exec_module
        return spec


def _watch(base: Any) -> None:
    """Registers the task in every registry that transformers makes.

    transformers' pipelines may be the first to import torch. They are half executed then and
    cannot be waited for any more, but their registry is made later, by a class defined in ``base``.
    """
    try:
        kind = base.PipelineRegistry
    except AttributeError as error:
        _report(error)
        return
    initialize = kind.__init__

    def initialize_and_register(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        _register(self)

    kind.__init__ = initialize_and_register


def _register(registry: Any) -> None:
    try:
        from compressed_cache.integrations.pipeline import register

        register(registry)
    except Exception as error:
        _report(error)


def _report(error: Exception) -> None:
    import logging

    logging.getLogger("compressed_cache").warning(
        "the pipeline is not available with this transformers: %r", error
    )


_registry = getattr(sys.modules.get(_PIPELINES), "PIPELINE_REGISTRY", None)
if _registry is None:
    when_imported(f"{_PIPELINES}.base", _watch)
else:
    _register(_registry)
