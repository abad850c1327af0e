"""The methods by name."""

from dataclasses import fields
from typing import Any

from compressed_cache.names import listing, nearest
from compressed_cache.policies.base import Defaults, Policy, Rows, Site, Slots
from compressed_cache.policies.caote import CAOTE
from compressed_cache.policies.full import Full
from compressed_cache.policies.h2o import H2O
from compressed_cache.policies.keydiff import KeyDiff
from compressed_cache.policies.knorm import KNorm
from compressed_cache.policies.modifier import Modifier
from compressed_cache.policies.random import Random
from compressed_cache.policies.rkv import RKV
from compressed_cache.policies.snapkv import SnapKV
from compressed_cache.policies.streaming_llm import StreamingLLM
from compressed_cache.policies.tova import TOVA

__all__ = [
    "MODIFIERS",
    "POLICIES",
    "Defaults",
    "Modifier",
    "Policy",
    "Rows",
    "Site",
    "Slots",
    "make_policy",
    "option_names",
]

POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "random": Random,
    "streaming_llm": StreamingLLM,
    "knorm": KNorm,
    "h2o": H2O,
    "tova": TOVA,
    "snapkv": SnapKV,
    "rkv": RKV,
    "keydiff": KeyDiff,
}


MODIFIERS: dict[str, type[Modifier]] = {"caote": CAOTE}


def make_policy(name: str, **options: Any) -> Policy:
    """A policy by name.

    Args:
        name: a key of :data:`POLICIES`, followed by as many of :data:`MODIFIERS` as wanted, each
            with a ``+`` before it and applied in this order: ``"snapkv+chunkkv"``.
        options: fields of these.

    Raises:
        ValueError: unknown name, or an option out of range.
        TypeError: unknown option, or an option of the wrong type.
    """
    names = name.split("+")
    _check_names(name, names)
    given = [_own(part, options) for part in names]
    known = option_names(name)
    for option in options:
        if option not in known:
            expected = f"expected one of {listing(known)}" if known else "it has no options"
            raise TypeError(
                f"unknown option {option!r} for policy {name!r}, {expected}{nearest(option, known)}"
            )
    policy = POLICIES[names[0]](**given[0])
    for part, own in zip(names[1:], given[1:], strict=True):
        policy = MODIFIERS[part](base=policy, **own)
    return policy


def option_names(name: str) -> list[str]:
    """The options of a policy written as for :func:`make_policy`.

    Raises:
        ValueError: unknown name.
    """
    names = name.split("+")
    _check_names(name, names)
    return [field for part in names for field in _fields(part)]


def _fields(part: str) -> list[str]:
    kind = POLICIES.get(part) or MODIFIERS[part]
    return [field.name for field in fields(kind) if field.name != "base"]


def _own(part: str, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in _fields(part)}


def _check_names(name: str, names: list[str]) -> None:
    first, *modifiers = names
    if first in MODIFIERS:
        raise ValueError(
            f"policy {first!r} works on another one. Write it behind that, e.g. 'snapkv+{first}'."
        )
    if first not in POLICIES:
        raise ValueError(
            f"unknown policy {first!r}, expected one of {listing(POLICIES)}"
            f"{nearest(first, POLICIES)}"
        )
    for part in modifiers:
        if part in POLICIES:
            raise ValueError(
                f"policy {name!r} has two scorers, {first!r} and {part!r}, and can have one. "
                f"Behind it goes any of {listing(MODIFIERS)}."
            )
        if part not in MODIFIERS:
            raise ValueError(
                f"unknown modifier {part!r} in policy {name!r}, expected one of "
                f"{listing(MODIFIERS)}{nearest(part, MODIFIERS)}"
            )
