"""The policies: what one is (:mod:`~compressed_cache.policies.base`), and all there are."""

from compressed_cache.policies.base import Defaults, Needs, Policy
from compressed_cache.policies.modifier import Modifier
from compressed_cache.policies.prefill_decode import PrefillDecode
from compressed_cache.policies.registry import (
    MODIFIERS,
    POLICIES,
    SLOT_POLICIES,
    canonical_name,
    make_policy,
    option_names,
    split_name,
)
from compressed_cache.policies.view import AttentionRows, LayerContext, Slots

__all__ = [
    "MODIFIERS",
    "POLICIES",
    "SLOT_POLICIES",
    "AttentionRows",
    "Defaults",
    "LayerContext",
    "Modifier",
    "Needs",
    "Policy",
    "PrefillDecode",
    "Slots",
    "canonical_name",
    "make_policy",
    "option_names",
    "split_name",
]

# Every method by the name of its class, too: ``from compressed_cache.policies import H2O``.
globals().update({kind.__name__: kind for kind in (*POLICIES.values(), *MODIFIERS.values())})
