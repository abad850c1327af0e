"""Which attention module read the text that a layer holds."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SAMPLES = 8  # of each weight
_TOLERANCE = 0.01  # the same model may be loaded in another dtype


class _Mark(NamedTuple):
    """What tells a module from that of another model, in any process."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    samples: dict[str, Tensor]

    @classmethod
    def of(cls, module: Any) -> "_Mark":
        parameters = dict(module.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        samples = {name: _sample(parameter) for name, parameter in parameters.items()}
        return cls(type(module).__qualname__, shapes, samples)

    def fits(self, other: "_Mark") -> bool:
        if (self.name, self.shapes) != (other.name, other.shapes):
            return False
        return all(
            one.shape != other.samples[name].shape
            or torch.allclose(one, other.samples[name], rtol=_TOLERANCE, atol=1e-6)
            for name, one in self.samples.items()
        )


class ModuleIdentity:
    """The module that reads the text of a layer, which does not keep it in memory.

    In another process, or of a copy, it is known by its class and by some of its weights.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Any module may come next."""
        self._module: weakref.ref[Any] | None = None
        self._mark: _Mark | None = None

    def bind(self, module: Any) -> None:
        """From now on only this one."""
        if not self._is(module):
            self._module, self._mark = weakref.ref(module), None

    @property
    def module(self) -> Any:
        """This one; None where there is none, or none in this process."""
        return None if self._module is None else self._module()

    def knows(self, module: Any) -> bool:
        """Whether this one may go on."""
        if self._module is None and self._mark is None:
            return True
        return self._is(module) or (self._mark is not None and self._mark.fits(_Mark.of(module)))

    def _is(self, module: Any) -> bool:
        return self._module is not None and self._module() is module

    def __getstate__(self) -> dict[str, Any]:
        module = None if self._module is None else self._module()
        mark = self._mark if module is None else _Mark.of(module)
        # Of a module that is gone nothing is known, and no other one is it.
        gone = _Mark("", {}, {}) if self._module is not None and mark is None else mark
        return {"_module": None, "_mark": gone}


def _sample(parameter: Tensor) -> Tensor:
    """Some numbers of a weight, of the part that this process has; none where it has none."""
    local: Any = parameter
    local = local.to_local() if hasattr(local, "to_local") else local
    if local.is_meta or not local.numel():
        return torch.empty(0)
    flat = local.detach().flatten()
    return flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].float().cpu()
