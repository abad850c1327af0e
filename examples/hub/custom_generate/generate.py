"""``model.generate(custom_generate=...)`` with a cache of a fixed budget."""

from typing import Any

from compressed_cache import CompressedCache, Policy
from compressed_cache.policies import option_names
from compressed_cache.versions import cache_argument

_SHARED = ("interval", "sinks", "recent", "protect_prompt")


def generate(
    model: Any, policy: str | Policy = "snapkv", budget: int = 256, **arguments: Any
) -> Any:
    """What ``model.generate`` returns, with a compressed cache.

    Args:
        model: of transformers.
        policy: as for ``CompressedCache``.
        budget: slots per key/value head and layer.
        arguments: further ones of ``CompressedCache``, options of the policy among them, and those
            of ``model.generate``, as which all others are taken.

    Raises:
        ValueError: a cache among the arguments, or what ``CompressedCache`` refuses.
    """
    for name in ("cache", "past_key_values"):
        if arguments.pop(name, None) is not None:
            raise ValueError(
                f"{name} must be left out, a compressed cache takes its place. To go on with one "
                "of your own, leave out custom_generate"
            )
    own = [*_SHARED, *(option_names(policy) if isinstance(policy, str) else ())]
    options = {name: arguments.pop(name) for name in own if name in arguments}
    cache = CompressedCache(policy, budget, config=model.config, **options)
    return model.generate(**cache_argument(cache), **arguments)
