"""The keyword arguments of one call of the pipeline, sorted and checked."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressed_cache.integrations.prompt import positive
from compressed_cache.policies.relative_budget import check_ratio, slots_kept
from compressed_cache.wording import listing, nearest, shown

if TYPE_CHECKING:
    from compressed_cache.cache import CompressedCache

_PRESSES = "`compressed-cache presses` tells what to type here for a press of kvpress."
_OF_CALLS = ("answer_prefix", "compression_ratio", "lossless", "question", "questions")
_OF_DRAFTS = ("adaptive", "num_draft_tokens", "refresh")
_FILLED_IN = ("attention_mask", "input_ids", "inputs", "kwargs", "past_key_values", "self")
# What the pipeline cannot serve, with the value that asks for nothing.
_NOT_SERVED = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "assistant_model": None,
    "prompt_lookup_num_tokens": None,
}


@dataclass(frozen=True)
class Request:
    """What to hold a context in, and how to answer."""

    cache: "CompressedCache"
    is_lent: bool
    """Whether the user made the cache, and may want to see what it held of the context."""
    generate: dict[str, Any]
    """Arguments of ``model.generate``."""
    lossless: bool
    """Whether the cache only drafts, and a full one verifies."""


def renamed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments in which kvpress's word ``press`` is ``policy``.

    Raises:
        ValueError: both are given.
    """
    given = dict(arguments)
    press = given.pop("press", None)
    if press is not None and given.get("policy") is not None:
        raise ValueError("policy and press are the same argument. Leave one of them out.")
    return given if press is None else given | {"policy": press}


def by_budget(
    arguments: dict[str, Any], lengths: Sequence[int]
) -> list[tuple[dict[str, Any], list[int]]]:
    """Which contexts a cache can hold one after the other, and the arguments of that cache.

    Args:
        arguments: as for :func:`make_request`, but for ``compression_ratio``, the share of the
            tokens of a context that is to go; it stands in place of ``budget``.
        lengths: tokens of each context. Those of other lengths have other budgets.

    Returns:
        Arguments without the ratio, and the numbers of the contexts.

    Raises:
        ValueError: a ratio below 0 or not below 1, one beside ``budget`` or ``cache``, or one
            without a policy.
        TypeError: something else than a number.
    """
    given = dict(arguments)
    ratio = given.pop("compression_ratio", None)
    if ratio is None:
        return [(given, [*range(len(lengths))])]
    check_ratio(ratio)
    for other in ("budget", "cache"):
        if given.get(other) is not None:
            raise ValueError(
                f"compression_ratio and {other} must not both be given. Leave one of them out."
            )
    if given.get("policy") is None:
        raise ValueError(
            "compression_ratio given without a policy. Add e.g. policy='snapkv', or leave it out "
            "for a full cache."
        )
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(slots_kept(ratio, length), []).append(row)
    return [(given | {"budget": budget}, rows) for budget, rows in groups.items()]


def make_request(model: Any, arguments: dict[str, Any]) -> Request:
    """Sorts arguments into those of the cache and those of ``generate``.

    Args:
        model: the model that is to answer.
        arguments: ``policy`` with rules and options of its own, or ``cache``; all else is for
            ``generate``. Greedy decoding of at most 50 tokens unless they say otherwise.
            ``lossless`` asks for drafts.

    Raises:
        ValueError: an unknown policy, a value out of range, a budget too small for what is
            protected, a cache that holds something, or arguments that exclude each other.
        TypeError: an unknown argument, or a value of the wrong type.
        NotImplementedError: a model or an argument of ``generate`` that cannot be served.
    """
    given = dict(arguments)
    policy, cache = given.pop("policy", None), given.pop("cache", None)
    lossless = given.pop("lossless", None)
    if lossless is False:
        # What else is said of drafts may be for other calls.
        given = {name: value for name, value in given.items() if name not in _OF_DRAFTS}
    own = _own_names(policy)
    rules = {name: given.pop(name) for name in own if name in given}
    _check_generate(model, policy, own, given)
    if cache is not None:
        _check_cache(cache, policy, rules)
    elif policy is None and rules:
        raise ValueError(
            f"{listing(rules)} given without a policy. Add e.g. policy='snapkv', or leave them out "
            "for a full cache."
        )
    made = (
        _make_cache(model, "full" if policy is None else policy, rules) if cache is None else cache
    )
    _check_lossless(lossless, made, given)
    return Request(made, cache is not None, given, bool(lossless))


def _check_lossless(lossless: Any, cache: "CompressedCache", given: dict[str, Any]) -> None:
    if not isinstance(lossless, bool | None):
        raise TypeError(f"lossless must be True or False, got {shown(lossless)}")
    if not lossless:
        if drafting := [name for name in _OF_DRAFTS if name in given]:
            raise ValueError(f"{listing(drafting)} given without lossless=True")
        return
    if given.get("custom_generate") is not None:
        raise ValueError("lossless and custom_generate must not both be given. Leave one out.")
    from compressed_cache.hf.checks import check_drafts

    check_drafts(cache.policy)


def _own_names(policy: Any) -> list[str]:
    from compressed_cache.policies import Policy, option_names
    from compressed_cache.policies.eviction_config import ARGUMENTS

    rules = [*ARGUMENTS]
    if policy is None or isinstance(policy, Policy):
        return rules
    if not isinstance(policy, str):
        raise TypeError(
            f"policy must be a name or a Policy object, got {policy!r} ({type(policy).__name__}). "
            f"{_PRESSES}"
        )
    try:
        return rules + option_names(policy)
    except ValueError as error:
        raise ValueError(f"policy={policy!r}: {error}") from None


def _make_cache(model: Any, policy: Any, rules: dict[str, Any]) -> "CompressedCache":
    from compressed_cache.cache import CompressedCache

    try:
        return CompressedCache(policy, config=model.config, **rules)
    except (TypeError, ValueError) as error:
        raise type(error)(f"policy={policy!r}: {error}") from None


def _check_cache(cache: Any, policy: Any, rules: dict[str, Any]) -> None:
    from compressed_cache.cache import CompressedCache

    if not isinstance(cache, CompressedCache):
        raise TypeError(
            f"cache must be a CompressedCache, got {type(cache).__name__}. Leave out cache and "
            "policy for a full cache."
        )
    if policy is not None or rules:
        also = listing([*(["policy"] if policy is not None else []), *rules])
        raise ValueError(f"cache must be given alone, got {also} beside it. They are the cache's.")
    if cache.get_seq_length():
        raise ValueError(
            f"cache must be empty, got one that holds a text of {cache.get_seq_length()} tokens. "
            "Call cache.reset() if that is no longer needed."
        )


def _check_generate(model: Any, policy: Any, own: list[str], given: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    settings = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    known = {*settings, *inspect.signature(model.generate).parameters, *_OF_DRAFTS} - {*_FILLED_IN}
    for name in given:
        if name not in known:
            names = {*own, *known, "policy", "cache", *_OF_CALLS}
            raise TypeError(
                f"unknown argument {name!r} for policy={policy!r}, expected one of "
                f"{listing(['policy', 'cache', *own])} or an argument of model.generate"
                f"{nearest(name, names)}"
            )
    # What one does not say, generate takes from the next.
    configs = given.get("generation_config"), model.generation_config
    for name, nothing in _NOT_SERVED.items():
        said = (given.get(name), *(getattr(config, name, None) for config in configs))
        if next((value for value in said if value is not None), nothing) != nothing:
            raise NotImplementedError(
                f"{name} is not served by this pipeline, which gives one text for each question, "
                "token by token. Call model.generate with a CompressedCache instead."
            )
    if given.get("generation_config") is None:
        given.setdefault("do_sample", False)
        if given.get("max_length") is None and given.get("max_new_tokens") is None:
            given["max_new_tokens"] = 50
    if given.get("max_new_tokens") is not None:
        given["max_new_tokens"] = positive("max_new_tokens", given["max_new_tokens"])
