"""Tests of linear layers that several readers of a model compute together."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from compressed_cache.eval.agreement import joined


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4, bias=False))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many readers met in each layer that was computed."""
    met: list[int] = []
    compute = joined._compute
    monkeypatch.setattr(
        joined, "_compute", lambda places: (met.append(len(places)), compute(places))
    )
    return met


def together(*readers: Callable[[], Tensor]) -> list[Tensor | Exception]:
    with ThreadPoolExecutor(len(readers)) as pool:
        return joined.together(readers, pool)


def test_each_layer_is_computed_once_for_all_readers(model: nn.Module, computed: list[int]) -> None:
    inputs = [torch.randn(2, length, 6) for length in (3, 1, 5)]
    found = together(*(lambda own=own: model(own) for own in inputs))
    assert computed == [3, 3]
    for own, alone in zip(found, inputs, strict=True):
        assert isinstance(own, Tensor)
        torch.testing.assert_close(own, model(alone))


def test_readers_that_compute_something_of_their_own_are_waited_for(
    model: nn.Module, computed: list[int]
) -> None:
    extra = nn.Linear(6, 6)
    one, two = torch.randn(2, 1, 6), torch.randn(2, 1, 6)
    found = together(lambda: model(one), lambda: model(extra(two)))
    # The first layer of one stands beside the layer of two alone, and is left behind.
    assert sum(computed) == 5
    for own, expected in zip(found, (model(one), model(extra(two))), strict=True):
        assert isinstance(own, Tensor)
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("before", [True, False])
def test_an_error_of_one_reader_is_its_own(model: nn.Module, before: bool) -> None:
    inputs = torch.randn(2, 1, 6)

    def broken() -> Tensor:
        found = inputs if before else model(inputs)
        raise ValueError(f"no {found.shape[-1]}")

    one, other = together(broken, lambda: model(inputs))
    assert isinstance(one, ValueError) and str(one) == f"no {6 if before else 4}"
    assert isinstance(other, Tensor)
    torch.testing.assert_close(other, model(inputs))


def test_an_error_of_a_layer_reaches_all_that_wait_for_it(model: nn.Module) -> None:
    right, wrong = torch.randn(2, 1, 6), torch.randn(2, 1, 7)
    for found in together(lambda: model(right), lambda: model(wrong)):
        assert isinstance(found, RuntimeError)


def test_apart_calls_one_after_the_other(model: nn.Module, computed: list[int]) -> None:
    inputs = torch.randn(2, 1, 6)

    def broken() -> Tensor:
        raise ValueError("no")

    one, other = joined.apart([broken, lambda: model(inputs)])
    assert isinstance(one, ValueError) and isinstance(other, Tensor)
    assert computed == []
    assert torch.equal(other, model(inputs))
