"""Linear layers that several readers of one model meet in, each computed once for all of them.

A layer is bound by the reading of its weights where there are few rows, so eight caches that each
read a batch take far less time together than one after the other.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Result = TypeVar("Result")


def together(
    readers: Sequence[Callable[[], Result]], pool: ThreadPoolExecutor
) -> list[Result | Exception]:
    """Calls all readers at once, each in a thread, and returns what they return or raise.

    The pool must have a thread for each of them, since they wait for one another. It is given
    because memory that threads hold is not given back when they end.

    Their linear layers are computed together. So the sums of a row are rounded otherwise than if it
    were read alone.
    """
    table = _Table(len(readers))

    def read(reader: Callable[[], Result]) -> Result | Exception:
        try:
            with torch.inference_mode(), _Meeting(table):
                return _tried(reader)
        finally:
            table.leave()

    return list(pool.map(read, readers))


def apart(readers: Sequence[Callable[[], Result]]) -> list[Result | Exception]:
    """Calls all readers, one after the other, and returns what they return or raise."""
    return [_tried(reader) for reader in readers]


def _tried(reader: Callable[[], Result]) -> Result | Exception:
    try:
        return reader()
    except Exception as error:
        return error


class _Place:
    """One reader's call of a linear layer."""

    def __init__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.inputs, self.weight, self.bias = inputs, weight, bias
        self.output: Tensor | Exception | None = None


class _Table:
    """Where readers wait for one another."""

    def __init__(self, readers: int) -> None:
        self._readers = readers
        self._waiting: list[_Place] = []
        self._changed = Condition()

    def linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What ``torch.nn.functional.linear`` returns, once every reader waits or has left."""
        place = _Place(inputs, weight, bias)
        with self._changed:
            self._waiting.append(place)
            self._serve()
            self._changed.wait_for(lambda: place.output is not None)
        if isinstance(place.output, Exception):
            raise place.output
        assert place.output is not None
        return place.output

    def leave(self) -> None:
        """One reader less."""
        with self._changed:
            self._readers -= 1
            self._serve()

    def _serve(self) -> None:
        """Computes what is waited for, if no one else may come."""
        if not self._waiting or len(self._waiting) < self._readers:
            return
        # Readers may be at different layers, where one has computed something of its own.
        layers: dict[tuple[int, int], list[_Place]] = {}
        for place in self._waiting:
            layers.setdefault((id(place.weight), id(place.bias)), []).append(place)
        for places in layers.values():
            _compute(places)
        self._waiting.clear()
        self._changed.notify_all()


class _Meeting(TorchFunctionMode):
    """Sends the linear layers of a thread to a table."""

    def __init__(self, table: _Table) -> None:
        super().__init__()
        self._table = table

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        call = self._table.linear if func is functional.linear else func
        return call(*args, **(kwargs or {}))


def _compute(places: Sequence[_Place]) -> None:
    """Computes one layer for all that wait for it."""
    flat = [place.inputs.flatten(0, -2) for place in places]
    try:
        outputs = functional.linear(torch.cat(flat), places[0].weight, places[0].bias)
        parts = outputs.split([len(part) for part in flat])
        for place, part in zip(places, parts, strict=True):
            place.output = part.unflatten(0, place.inputs.shape[:-1])
    except Exception as error:
        for place in places:
            place.output = error
