"""The prompt, and what chance leaves of the rest: the baseline to beat."""

from dataclasses import dataclass
from typing import ClassVar

from compressed_cache.policies.base import Defaults
from compressed_cache.policies.methods.random import Random
from compressed_cache.policies.needs import usual_interval


@dataclass(frozen=True, kw_only=True)
class RandomPrompt(Random):
    """Keeps the prompt and the last tokens, and evicts the others at random, each head for itself.

    "Random Attention" (https://arxiv.org/abs/2609.03430): victims are uniform among all tokens
    that are neither of the prompt nor recent, and drawn anew at every ranking. It is ``random``
    with other defaults: ``protect_prompt=True``, and as many recent tokens as steps between two
    rankings, which from a budget of 512 on are the paper's 64.

    Differs in two points: of a prompt that leaves no room only the first ``budget // 2`` tokens are
    protected, where the paper reads it whole and then keeps all of it but one token; and slots are
    overwritten one by one in the order of the ranking, where the paper lets the cache grow by 64
    tokens and cuts it back, so the budget here includes that buffer.
    """

    name: ClassVar[str] = "random_prompt"

    def defaults(self, budget: int) -> Defaults:
        steps = usual_interval(budget)
        return Defaults(interval=steps, recent=steps, protect_prompt=True)
