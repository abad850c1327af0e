"""How the slots of a model are shared out among its layers and heads."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from compressed_cache.policies.fields import whole_number
from compressed_cache.wording import shown

Budget = int | tuple[int, ...] | tuple[tuple[int, ...], ...]
"""Slots of every key/value head; or of every head of each layer; or of each head of each layer."""


def to_budget(value: Any) -> Budget:
    """What a user gave as ``budget``, lists as tuples.

    Raises:
        TypeError: neither an int nor a list of ints nor a list of lists of ints.
        ValueError: a number below 1, or an empty list.
    """
    if not isinstance(value, list | tuple):
        return _slots(value, value)
    if not value or any(isinstance(layer, list | tuple) and not layer for layer in value):
        raise ValueError(f"budget must not have an empty list, got {value!r}")
    if all(isinstance(layer, list | tuple) for layer in value):
        return tuple(tuple(_slots(head, value) for head in layer) for layer in value)
    return tuple(_slots(layer, value) for layer in value)


def _slots(given: Any, value: Any) -> int:
    number = whole_number(given)
    if number is None:
        raise TypeError(
            "budget must be an int >= 1, a list with one for each layer, or a list of lists with "
            f"one for each key/value head of each layer, got {shown(value)}"
        )
    if number < 1:
        raise ValueError(f"budget must be an int >= 1, got {number}")
    return number


def all_slots(budget: Budget) -> list[int]:
    """The numbers in a budget."""
    if isinstance(budget, int):
        return [budget]
    return [slots for layer in budget for slots in ([layer] if isinstance(layer, int) else layer)]


def is_per_head(budget: Budget) -> bool:
    """Whether the heads of a layer have budgets of their own."""
    return isinstance(budget, tuple) and isinstance(budget[0], tuple)


def share_out(total: int, weights: Sequence[Fraction]) -> list[int]:
    """Whole numbers in proportion to ``weights`` whose sum is ``total``.

    By the method of the largest remainder, the first of equals first.
    """
    whole = sum(weights)
    exact = [total * weight / whole for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def compressed_layers(config: Any) -> list[int]:
    """Indices of the layers with slots to share out: those of full attention.

    Args:
        config: the model's text config.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    whole = {"full_attention"}
    if getattr(config, "sliding_window", None) is None:
        # Without a window these see the whole text.
        whole.add("sliding_attention")
    return [index for index, kind in enumerate(kinds) if kind in whole]
