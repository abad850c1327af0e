"""The ``kv_`` arguments of one run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressed_cache.wording import listing, nearest, shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from compressed_cache.cache import CompressedCache

PREFIX = "kv_"
POLICY = ("kv_policy", "kv_press")
"""What names the policy: our word, and the one that users of kvpress know."""
_RULES = ("budget", "interval", "sinks", "recent", "protect_prompt")


@dataclass(frozen=True)
class PressArguments:
    """A recipe for caches: every batch gets a fresh one."""

    policy: Any
    """A name, or a policy object where the harness is called from Python."""
    arguments: Mapping[str, Any]
    """Further arguments of :class:`~compressed_cache.CompressedCache`, without the prefix."""
    lossless: bool = False
    """Whether the cache only drafts, and a full one verifies."""

    def make_cache(self, config: "PreTrainedConfig | None" = None) -> "CompressedCache":
        """A cache as the user asked for; ``config`` lets it refuse a model it cannot serve."""
        from compressed_cache.cache import CompressedCache
        from compressed_cache.hf.checks import check_drafts

        cache = CompressedCache(self.policy, config=config, **self.arguments)
        if self.lossless:
            check_drafts(cache.policy)
        return cache

    def describe(self) -> dict[str, Any]:
        """Every number that shapes an answer, defaults filled in."""
        cache = self.make_cache()
        policy = cache.policy
        return {
            "policy": policy.label,
            **cache.eviction.described(),
            **policy.options,
            **({"lossless": True} if self.lossless else {}),
        }

    def options(self) -> dict[str, Any]:
        """The same without policy and budget."""
        described = self.describe()
        return {name: described[name] for name in described if name not in ("policy", "budget")}


def take_press(arguments: dict[str, Any]) -> PressArguments | None:
    """Removes the ``kv_`` arguments from a model's arguments and checks them.

    Args:
        arguments: keyword arguments of the model class, changed in place. The text ``none`` means
            ``None``, which the harness has no spelling for, and ``256/128`` a list.

    Returns:
        What they ask for, or None if there are none.

    Raises:
        ValueError: neither or both of ``kv_policy`` and ``kv_press`` beside other ``kv_``
            arguments, an unknown policy, a value out of range, or a budget too small for what is
            protected.
        TypeError: an unknown argument, or a value of the wrong type.
    """
    given = {
        name: None if str(value).lower() == "none" else value
        for name, value in arguments.items()
        if name.startswith(PREFIX)
    }
    if not given:
        return None
    for name in given:
        del arguments[name]
    named = {name: given.pop(name) for name in POLICY if name in given}
    policies = {name: policy for name, policy in named.items() if policy is not None}
    if not policies and not given:
        return None
    if not policies:
        raise ValueError(
            f"{listing(given)} given without kv_policy. Add e.g. kv_policy=snapkv (kv_press is the "
            "same), or leave out all arguments that begin with kv_."
        )
    if len(policies) > 1:
        raise ValueError("kv_policy and kv_press are the same argument. Leave one of them out.")
    ((word, policy),) = policies.items()
    options = {name.removeprefix(PREFIX): value for name, value in given.items()}
    if isinstance(budget := options.get("budget"), str) and "/" in budget:
        # The harness takes a comma for the end of an argument.
        options["budget"] = [_number(part) for part in budget.split("/")]
    lossless = options.pop("lossless", None)
    if not isinstance(lossless, bool | None):
        raise TypeError(f"kv_lossless must be a bool, got {shown(lossless)}")
    _check_names(word, policy, options)
    press = PressArguments(policy, options, bool(lossless))
    try:
        press.make_cache()
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{word}={policy!r}: {error} (each argument carries the prefix kv_ here)"
        ) from None
    return press


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _check_names(word: str, policy: Any, options: dict[str, Any]) -> None:
    from compressed_cache.policies import option_names

    try:
        own = option_names(policy) if isinstance(policy, str) else []
    except ValueError as error:
        raise ValueError(f"{word}={policy!r}: {error}") from None
    known = [word, *(PREFIX + name for name in (*_RULES, "lossless", *own))]
    if "compression_ratio" in options:
        raise TypeError(
            f"{word}={policy!r}: compression_ratio must be given as kv_budget, so that results "
            "are of one budget: the tokens of a prompt times (1 - "
            f"{options['compression_ratio']})"
        )
    for name in options:
        if PREFIX + name not in known:
            raise TypeError(
                f"unknown model argument {PREFIX + name!r} for {word}={policy!r}, expected one "
                f"of {listing(known)}{nearest(PREFIX + name, known)}"
            )
