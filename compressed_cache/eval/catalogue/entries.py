"""Every policy and modifier with what a reader has to know, taken from its class."""

import inspect
import re
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch

from compressed_cache.eval.catalogue.docstrings import fields_of, text_of
from compressed_cache.hf.columns import Columns
from compressed_cache.policies import MODIFIERS, POLICIES, Modifier, Policy
from compressed_cache.policies.base import Defaults
from compressed_cache.policies.eviction_config import Rules
from compressed_cache.step_counter import Clock
from compressed_cache.stores.pool import PoolLayer
from compressed_cache.stores.slots import SlotMemory

BUDGET = 256
"""Where defaults are told."""
HEAD_DIM = 128
"""Where the size of the query ring is told, in bfloat16."""

# What the interface does not tell, by what a policy's module names.
_SIGNS = {
    "values": r"\b(slots|tokens)\.values\b",
    "rotary position embedding": r"\bcompressed_cache\.rotary\b",
    "output projection": r"\boutput_projection\b",
}


@dataclass(frozen=True)
class Option:
    """A field of a policy."""

    name: str
    type: str
    default: Any
    meaning: str


@dataclass(frozen=True)
class Entry:
    """A policy, or a modifier with what it adds to the policy before it."""

    name: str
    file: str
    summary: str
    papers: tuple[str, ...]
    evicts: bool
    phases: str
    """When it does."""
    needs: tuple[str, ...]
    """What it looks at beside keys and positions."""
    bytes_per_slot: int
    """State of each slot of a key/value head, beside key, value and position."""
    bytes_per_query_head: int
    """State of each query head of a layer that does not grow with the slots."""
    defaults: dict[str, int | bool]
    """What ``None`` means at :data:`BUDGET`, where it is not 0 (1 for ``interval``)."""
    options: tuple[Option, ...]
    deviations: str
    works_on: tuple[str, ...]
    """Of a modifier: the policies it may stand behind."""


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
        phases=kind.phases if kind.evicts else "never",
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


def _needs(policy: Policy) -> list[str]:
    needs = []
    if policy.num_queries:
        needs.append(f"last {policy.num_queries} queries")
    if policy.observes_attention:
        every = policy.prompt_queries is None
        needs.append(f"attention of every {'query' if every else 'step'}")
    source = "\n".join(inspect.getsource(module) for module in _modules(policy))
    needs += [need for need, sign in _SIGNS.items() if re.search(sign, source)]
    if "calibration" in policy.options:
        needs.append("calibration")
    return needs


def _modules(policy: Policy) -> list[Any]:
    """Where the parts of a policy are written, down to what all policies share."""
    kinds = [kind for part in policy.parts for kind in type(part).__mro__]
    shared = {kind.__module__ for kind in (*Policy.__mro__, Modifier)}
    own = [kind for kind in kinds if kind.__module__ not in shared]
    return list(dict.fromkeys(inspect.getmodule(kind) for kind in own))


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
    rules = Rules(slots, interval=1, sinks=0, recent=0, protect_prompt=False)
    is_pool = policy.layout == "pool"
    memory = (
        PoolLayer(policy, rules, Clock(1), Columns(), 0) if is_pool else SlotMemory(policy, rules)
    )
    memory.budget = slots
    # A policy that does not evict takes the next power of two beyond its prompt.
    prompt = torch.zeros(1, 1, slots - 1, HEAD_DIM, dtype=torch.bfloat16)
    memory.provide(prompt, prompt, prompt)
    return sum(tensor.nbytes for tensor in memory.tensors())


_STATELESS = POLICIES["random"]()
