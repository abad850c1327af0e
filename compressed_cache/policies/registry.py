"""The methods by name."""

import functools
import logging
import re
from collections.abc import Mapping
from typing import Any

from compressed_cache.policies.base import Policy
from compressed_cache.policies.capabilities import ReadsTwice
from compressed_cache.policies.fields import own_options
from compressed_cache.policies.methods.adakv import AdaKV
from compressed_cache.policies.methods.ams import AMS
from compressed_cache.policies.methods.caote import CAOTE
from compressed_cache.policies.methods.chunk import Chunk
from compressed_cache.policies.methods.chunkkv import ChunkKV
from compressed_cache.policies.methods.criticalkv import CriticalKV
from compressed_cache.policies.methods.curdkv import CurDKV
from compressed_cache.policies.methods.duo_attention import DuoAttention
from compressed_cache.policies.methods.expected_attention import ExpectedAttention
from compressed_cache.policies.methods.finch import Finch
from compressed_cache.policies.methods.full import Full
from compressed_cache.policies.methods.gkv import GKV
from compressed_cache.policies.methods.h2o import H2O
from compressed_cache.policies.methods.key_rerotation import KeyRerotation
from compressed_cache.policies.methods.keydiff import KeyDiff
from compressed_cache.policies.methods.knorm import KNorm
from compressed_cache.policies.methods.kvzip import KVzip
from compressed_cache.policies.methods.lagged_attention import LaggedAttention
from compressed_cache.policies.methods.lagkv import LagKV
from compressed_cache.policies.methods.learned_gate import LearnedGate
from compressed_cache.policies.methods.merging import Merging
from compressed_cache.policies.methods.morphkv import MorphKV
from compressed_cache.policies.methods.observed_attention import ObservedAttention
from compressed_cache.policies.methods.pyramidkv import PyramidKV
from compressed_cache.policies.methods.qfilter import QFilter
from compressed_cache.policies.methods.raas import RaaS
from compressed_cache.policies.methods.random import Random
from compressed_cache.policies.methods.random_prompt import RandomPrompt
from compressed_cache.policies.methods.rkv import RKV
from compressed_cache.policies.methods.rkv_lsh import RKVLSH
from compressed_cache.policies.methods.rpc import RPC
from compressed_cache.policies.methods.shadowkv import ShadowKV
from compressed_cache.policies.methods.simlayerkv import SimLayerKV
from compressed_cache.policies.methods.snapkv import SnapKV
from compressed_cache.policies.methods.streaming_llm import StreamingLLM
from compressed_cache.policies.methods.think import ThinK
from compressed_cache.policies.methods.tova import TOVA
from compressed_cache.policies.methods.triattention import TriAttention
from compressed_cache.policies.methods.vase import VaSE
from compressed_cache.policies.methods.vase_dkv import VaSEDKV
from compressed_cache.policies.modifier import Modifier
from compressed_cache.policies.prefill_decode import PrefillDecode
from compressed_cache.wording import listing, nearest, shown

logger = logging.getLogger(__name__)

POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "random": Random,
    "random_prompt": RandomPrompt,
    "streaming_llm": StreamingLLM,
    "knorm": KNorm,
    "h2o": H2O,
    "observed_attention": ObservedAttention,
    "tova": TOVA,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "rkv": RKV,
    "rkv_lsh": RKVLSH,
    "keydiff": KeyDiff,
    "vase": VaSE,
    "vase_dkv": VaSEDKV,
    "curdkv": CurDKV,
    "raas": RaaS,
    "morphkv": MorphKV,
    "lagged_attention": LaggedAttention,
    "lagkv": LagKV,
    "finch": Finch,
    "rpc": RPC,
    "gkv": GKV,
    "qfilter": QFilter,
    "triattention": TriAttention,
    "expected_attention": ExpectedAttention,
    "learned_gate": LearnedGate,
    "shadowkv": ShadowKV,
    "kvzip": KVzip,
}

SLOT_POLICIES = [
    name
    for name, policy in POLICIES.items()
    if policy.store == "slots" and not issubclass(policy, ReadsTwice)
]
"""The names of those that ``generate`` alone can use and that keep all tokens in slots, so that
they differ in which ones only."""

MODIFIERS: dict[str, type[Modifier]] = {
    "caote": CAOTE,
    "key_rerotation": KeyRerotation,
    "think": ThinK,
    "chunkkv": ChunkKV,
    "chunk": Chunk,
    "criticalkv": CriticalKV,
    "ams": AMS,
    "merging": Merging,
    "adakv": AdaKV,
    "duo_attention": DuoAttention,
    "simlayerkv": SimLayerKV,
}


_BY_CLASS = {kind.__name__.lower(): name for name, kind in (POLICIES | MODIFIERS).items()}
_PRESS = "press"


def make_policy(name: str, **options: Any) -> Policy:
    """A policy by name.

    Args:
        name: a key of :data:`POLICIES`, or two with a ``/`` between them, the first for the prompt
            and the second for decode steps; then as many of :data:`MODIFIERS` as wanted, each with
            a ``+`` before it and applied in this order: ``"snapkv/h2o+caote"``. Each in any case,
            or by its class, ``"SnapKV"``, or by the one of kvpress, ``"SnapKVPress"``.
        options: fields of these.

    Raises:
        ValueError: unknown name, or an option out of range.
        TypeError: unknown option, or an option of the wrong type.
    """
    known = option_names(name)
    for option in options:
        if option not in known:
            expected = f"expected one of {listing(known)}" if known else "it has no options"
            raise TypeError(
                f"unknown option {option!r} for policy {name!r}, {expected}{nearest(option, known)}"
            )
    scorers, modifiers = split_name(name)
    _note_presses(name)
    made = [POLICIES[part](**_own(part, options)) for part in scorers]
    policy = made[0] if len(made) == 1 else PrefillDecode(prompt=made[0], decoding=made[1])
    for part in modifiers:
        policy = MODIFIERS[part](base=policy, **_own(part, options))
    return policy


def as_policy(policy: Any, options: dict[str, Any]) -> Policy:
    """A policy given by name, with its options, or as it is.

    Raises:
        TypeError: neither, or options beside a policy object.
    """
    if isinstance(policy, str):
        return make_policy(policy, **options)
    if not isinstance(policy, Policy):
        # A model or its config would fill the screen.
        kind = policy.__name__ if isinstance(policy, type) else type(policy).__name__
        got = shown(policy) if len(repr(policy)) < 80 else kind
        hint = f". Write {kind}()" if isinstance(policy, type) else ""
        raise TypeError(f"policy must be a name or a Policy object, got {got}{hint}")
    if policy.evicts and type(policy).scores is Policy.scores:
        raise TypeError(f"{type(policy).__name__} must define scores(slots)")
    if options:
        raise TypeError(
            "policy options must be given to the policy object itself, got "
            f"{sorted(options)} beside {policy!r}"
        )
    return policy


def option_names(name: str) -> list[str]:
    """The options of a policy written as for :func:`make_policy`.

    Raises:
        ValueError: unknown name.
    """
    scorers, modifiers = split_name(name)
    return list(dict.fromkeys(field for part in scorers + modifiers for field in _fields(part)))


def canonical_name(name: str) -> str:
    """A name written as for :func:`make_policy`, as tables and results have it; unknown parts of it
    and what stands after a colon stay as they are."""
    policy, colon, options = name.partition(":")
    scorers, modifiers = _parts(policy)
    return "+".join(["/".join(scorers), *modifiers]) + colon + options


def split_name(name: str) -> tuple[list[str], list[str]]:
    """The scorers and the modifiers in a name written as for :func:`make_policy`, by their keys.

    Raises:
        ValueError: unknown name.
    """
    scorers, modifiers = _parts(name)
    for part in scorers:
        if part in MODIFIERS:
            raise ValueError(
                f"policy {name!r} is a modifier of another one. Write it after that, e.g. "
                f"'h2o+{part}'."
            )
        if part not in POLICIES:
            raise ValueError(f"unknown policy {part!r}{_expected(part, POLICIES)}")
    if len(scorers) > 2:
        raise ValueError(
            f"policy {name!r} has {len(scorers)} policies with '/' between them, expected one for "
            "the prompt and one for decode steps"
        )
    for part in modifiers:
        if part in POLICIES:
            raise ValueError(
                f"policy {name!r} has a second scorer, {part!r}, after '+'. Write '/' to have one "
                "for the prompt and one for decode steps."
            )
        if part not in MODIFIERS:
            raise ValueError(
                f"unknown modifier {part!r} in policy {name!r}{_expected(part, MODIFIERS)}"
            )
    return scorers, modifiers


def _parts(name: str) -> tuple[list[str], list[str]]:
    first, *others = name.split("+")
    return [_key(one) for one in first.split("/")], [_key(one) for one in others]


def _key(part: str) -> str:
    """The key of a policy or modifier; what is none stays as it is."""
    if part in POLICIES or part in MODIFIERS:
        return part
    lower = part.lower()
    for one in (lower, lower.removesuffix(_PRESS)):
        if one in POLICIES or one in MODIFIERS:
            return one
        if one in _BY_CLASS:
            return _BY_CLASS[one]
    return part


def _expected(part: str, known: Mapping[str, Any]) -> str:
    """What to type in place of an unknown name."""
    if part.lower().endswith(_PRESS):
        return f". `compressed-cache presses {part}` tells what to type for this press"
    return f", expected one of {listing(known)}{nearest(part.lower(), known)}"


@functools.cache
def _note_presses(name: str) -> None:
    """Says once that a press was understood, whose options and defaults may be others here."""
    presses = [one for one in re.split(r"[/+]", name) if one.lower().endswith(_PRESS)]
    if presses:
        logger.warning(
            "policy %r is taken for %r, with the defaults of compressed-cache, not those of the "
            "press: `compressed-cache presses %s` tells which options make it the press",
            *(name, canonical_name(name), presses[0]),
        )


def _fields(part: str) -> list[str]:
    return own_options(POLICIES.get(part) or MODIFIERS[part])


def _own(part: str, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in _fields(part)}
