"""How a cache is shown what attention modules are given, where its policy looks at hidden states.

A cache is handed keys and values, from which hidden states cannot be told. So each attention module
gets a forward pre-hook, before the first prompt. The hook belongs to no cache: it shows the input
to the compressed cache among the arguments, if that one asks for it. Hence any number of caches may
share a model, and a graph compiled with one serves the next.
"""

import weakref
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel


class ModuleInput(NamedTuple):
    """What an attention module was given."""

    module: Any
    hidden_states: Tensor
    """``[B, L, E]``, without gradients."""


class _Hook:
    """That of one module: a second would be another graph."""

    def __init__(self, module: nn.Module) -> None:
        self.handle = module.register_forward_pre_hook(_show_input, with_kwargs=True)
        self.readers = 0


# For each cache the models that show it their inputs, and for each module its hook.
_MODELS: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()
_HOOKS: weakref.WeakKeyDictionary[nn.Module, _Hook] = weakref.WeakKeyDictionary()


def show_inputs(model: nn.Module, cache: Any) -> None:
    """From now on, and as long as the cache exists, a model shows what its attention is given."""
    models = _MODELS.setdefault(cache, weakref.WeakSet())
    if model in models:
        return
    models.update(part for part in model.modules() if isinstance(part, PreTrainedModel))
    models.add(model)
    # By its index a module tells a cache which layer it is.
    modules = [part for part in model.modules() if hasattr(part, "layer_idx")]
    for module in modules:
        if module not in _HOOKS:
            _HOOKS[module] = _Hook(module)
        _HOOKS[module].readers += 1
    weakref.finalize(cache, _leave, list(map(weakref.ref, modules))).atexit = False


def _show_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    for value in (*args, *kwargs.values()):
        if getattr(value, "needs_hidden_states", False) and isinstance(hidden, Tensor):
            value.shown = ModuleInput(module, hidden.detach())


def _leave(modules: list[weakref.ref[nn.Module]]) -> None:
    """One cache less reads these; the last one takes the hook along."""
    for reference in modules:
        module = reference()
        if module is None:
            continue
        hook = _HOOKS[module]
        hook.readers -= 1
        if not hook.readers:
            hook.handle.remove()
            del _HOOKS[module]
