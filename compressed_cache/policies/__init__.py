"""The methods by name."""

from dataclasses import fields
from typing import Any

from compressed_cache.names import listing, nearest
from compressed_cache.policies.base import Defaults, Policy, Rows, Site, Slots
from compressed_cache.policies.expected_attention import ExpectedAttention
from compressed_cache.policies.full import Full
from compressed_cache.policies.h2o import H2O
from compressed_cache.policies.keydiff import KeyDiff
from compressed_cache.policies.knorm import KNorm
from compressed_cache.policies.qfilter import QFilter
from compressed_cache.policies.random import Random
from compressed_cache.policies.rkv import RKV
from compressed_cache.policies.snapkv import SnapKV
from compressed_cache.policies.streaming_llm import StreamingLLM
from compressed_cache.policies.tova import TOVA
from compressed_cache.policies.triattention import TriAttention

__all__ = ["POLICIES", "Defaults", "Policy", "Rows", "Site", "Slots", "make_policy"]

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
    "qfilter": QFilter,
    "triattention": TriAttention,
    "expected_attention": ExpectedAttention,
}


def make_policy(name: str, **options: Any) -> Policy:
    """A policy by name.

    Args:
        name: a key of :data:`POLICIES`.
        options: fields of that policy.

    Raises:
        ValueError: unknown name, or an option out of range.
        TypeError: unknown option, or an option of the wrong type.
    """
    if name not in POLICIES:
        raise ValueError(
            f"unknown policy {name!r}, expected one of {listing(POLICIES)}{nearest(name, POLICIES)}"
        )
    known = [field.name for field in fields(POLICIES[name])]
    for option in options:
        if option not in known:
            expected = f"expected one of {listing(known)}" if known else "it has no options"
            raise TypeError(
                f"unknown option {option!r} for policy {name!r}, {expected}{nearest(option, known)}"
            )
    return POLICIES[name](**options)
