"""How a cache is shown what attention modules are given, where its policy looks at hidden states.

A cache is handed keys and values, from which hidden states cannot be told. So each attention module
gets a forward pre-hook, before the first prompt. The hook belongs to no cache: it shows the input
to the compressed cache among the arguments, if that one asks for it. Hence any number of caches may
share a model, and a graph compiled with one serves the next.
"""

import weakref
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


class ModuleInput(NamedTuple):
    """What an attention module was given."""

    module: Any
    hidden_states: Tensor
    """``[B, L, E]``, without gradients."""


# For each cache the models that show it their inputs.
_MODELS: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()


def show_inputs(model: nn.Module, cache: Any) -> None:
    """From now on, and as long as the cache exists, a model shows what its attention is given."""
    models = _MODELS.setdefault(cache, weakref.WeakSet())
    if model in models:
        return
    models.update(part for part in model.modules() if isinstance(part, PreTrainedModel))
    models.add(model)
    handles = [
        part.register_forward_pre_hook(_show_input, with_kwargs=True)
        for part in model.modules()
        # By it a module tells a cache which layer it is.
        if hasattr(part, "layer_idx")
    ]
    weakref.finalize(cache, _remove, handles).atexit = False


def _show_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    for value in (*args, *kwargs.values()):
        if getattr(value, "needs_hidden_states", False) and isinstance(hidden, Tensor):
            value.shown = ModuleInput(module, hidden.detach())


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
