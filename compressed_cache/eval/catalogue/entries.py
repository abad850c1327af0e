"""Every policy and modifier with what a reader has to know, taken from its class."""

from dataclasses import fields
from functools import cache
from typing import Any

import torch

from compressed_cache.eval.catalogue.docstrings import fields_of, text_of
from compressed_cache.eval.catalogue.entry import BUDGET, HEAD_DIM, Entry, Option
from compressed_cache.ops.attention import LogitTransform
from compressed_cache.policies import MODIFIERS, POLICIES, Modifier, Policy
from compressed_cache.policies.base import Defaults
from compressed_cache.policies.capabilities import (
    ObservesQueries,
    ReadsTwice,
    find,
    find_store,
    needs_of,
)
from compressed_cache.policies.eviction_config import EvictionConfig
from compressed_cache.stores import store_for
from compressed_cache.stores.bound_policy import BoundPolicy
from compressed_cache.stores.slots import SlotStore


def every() -> list[Entry]:
    """All policies, then all modifiers."""
    return [*policies(), *modifiers()]


@cache
def policies() -> tuple[Entry, ...]:
    """All policies."""
    return tuple(
        _entry(name, kind, needs=_needs(kind()), state=_state(kind()), defaults=_defaults(kind()))
        for name, kind in POLICIES.items()
    )


@cache
def modifiers() -> tuple[Entry, ...]:
    """All modifiers."""
    return tuple(_modifier(name, kind) for name, kind in MODIFIERS.items())


def _modifier(name: str, kind: type[Modifier]) -> Entry:
    made = {base: policy for base in POLICIES if (policy := _behind(kind, base))}
    modified = next(iter(made.values()))
    base = modified.base
    state = [ours - theirs for ours, theirs in zip(_state(modified), _state(base), strict=True)]
    needs = [need for need in _needs(modified) if need not in _needs(base)]
    return _entry(name, kind, needs=needs, state=state, defaults={}, works_on=tuple(made))


def _behind(kind: type[Modifier], base: str) -> Modifier | None:
    try:
        return kind(base=POLICIES[base]())
    except ValueError:
        return None


def _entry(
    name: str,
    kind: type[Policy],
    *,
    needs: list[str],
    state: list[int],
    defaults: dict[str, Any],
    works_on: tuple[str, ...] = (),
) -> Entry:
    text, documented = text_of(kind), fields_of(kind)
    return Entry(
        name=name,
        file=kind.__module__.replace(".", "/") + ".py",
        summary=text.summary,
        papers=text.papers,
        evicts=kind.evicts,
        phases=_phases(kind),
        needs=tuple(needs),
        bytes_per_slot=state[0],
        bytes_per_query_head=state[1],
        defaults=defaults,
        options=tuple(
            Option(field.name, documented[field.name][0], field.default, documented[field.name][1])
            for field in fields(kind)
            if field.name != "base"
        ),
        deviations=text.deviations,
        works_on=works_on,
    )


def _phases(kind: type[Policy]) -> str:
    """When tokens are evicted."""
    if not kind.evicts:
        return "never"
    return "prefill" if hasattr(kind, "prompt_block") else "prefill and decode"


def _needs(policy: Policy) -> list[str]:
    known = needs_of(policy)
    needs = []
    if find(policy, ReadsTwice):
        needs.append("a second pass over the prompt")
    if known.queries:
        needs.append(f"last {known.queries} queries")
    if known.attention:
        every = known.prompt_queries is None
        needs.append(f"attention of every {'query' if every else 'step'}")
    observer = find(policy, ObservesQueries)
    if observer is not None and observer.query_state_shapes(HEAD_DIM):
        needs.append("queries of the first prompt")
    if known.values:
        needs.append("values")
    if known.hidden_states:
        needs.append("hidden states")
    return [*needs, *known.model]


def _defaults(policy: Policy) -> dict[str, Any]:
    usual = Defaults()._asdict()
    given = policy.defaults(BUDGET)._asdict()
    return {name: value for name, value in given.items() if value != usual[name]}


def _state(policy: Policy) -> list[int]:
    """Bytes per slot, and beside the slots, of one head, beyond what ``random`` keeps."""
    few, many = 256, 512
    ours, theirs = ([_bytes(p, slots) for slots in (few, many)] for p in (policy, _STATELESS))
    per_slot, rest = divmod((ours[1] - theirs[1]) - (ours[0] - theirs[0]), many - few)
    assert rest == 0
    return [per_slot, ours[0] - theirs[0] - few * per_slot]


def _bytes(policy: Policy, slots: int) -> int:
    eviction = EvictionConfig(slots, interval=1, sinks=0, recent=0, protect_prompt=False)
    bound = BoundPolicy(policy, eviction, layer=0, budget=slots, transform=LogitTransform(1.0))
    # A store off the device or with lazy layers adds no state of a slot.
    kind = SlotStore if find_store(policy) in ("offloaded", "lazy") else store_for(bound)
    store = kind(bound, lambda keys: None)
    # A policy that does not evict takes the next power of two beyond its prompt.
    prompt = torch.zeros(1, 1, slots - 1, HEAD_DIM, dtype=torch.bfloat16)
    store.provide(prompt, prompt, groups=1)
    return sum(tensor.nbytes for tensor in store.named_tensors().values())


_STATELESS = POLICIES["random"]()
