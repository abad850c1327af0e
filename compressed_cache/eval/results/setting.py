"""A policy with some of its options, as a sweep is asked for it: ``h2o:interval=8,recent=16``."""

from compressed_cache.policies import canonical_name


def policy_of(setting: str) -> str:
    """The name of the policy."""
    return setting.partition(":")[0]


def canonical(setting: str) -> str:
    """The same with the policy's name as results have it."""
    policy, colon, options = setting.partition(":")
    return canonical_name(policy) + colon + options
