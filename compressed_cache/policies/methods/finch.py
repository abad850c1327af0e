"""The question votes."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressed_cache.ops.attention import masked_softmax
from compressed_cache.policies.methods.window_votes import (
    WindowVotes,
    causal,
    window_logits,
)
from compressed_cache.policies.view import Slots


@dataclass(frozen=True, kw_only=True)
class Finch(WindowVotes):
    """Keeps what the question at the end of the prompt attends to.

    FINCH (https://doi.org/10.1162/tacl_a_00716), with the scores of kvpress' implementation: the
    attention of the last ``window`` queries, each times the number of held tokens it sees, so that
    a query with more to look at has as much of a say; averaged over queries, not pooled. ``window``
    is the number of tokens of the question, which the user states. The window itself is kept
    through ``recent``, whose default is ``window``.

    Differs from the paper in four points: query heads that share a key are averaged and every
    key/value head keeps tokens of its own (the authors sum over all heads of a layer and keep one
    set); the prompt is scored at once, not in chunks with the question after each; keys keep their
    rotation unless combined with ``key_rerotation`` ("finch+key_rerotation"), where the paper
    numbers the kept tokens anew; and while decoding the same score is taken again at every ranking
    from the last ``window`` queries, where the paper evicts no more.
    """

    name: ClassVar[str] = "finch"
    window: int = 32
    """Queries that vote: the tokens of the question."""
    normalize_scores: bool = True
    """Whether weights are multiplied by the number of held tokens their query sees (kvpress'
    default; the authors' code for Mistral does so too, that for Llama computes it and does
    not use it)."""

    def scores(self, slots: Slots) -> Tensor:
        logits = window_logits(slots)
        visible = causal(slots)[:, :, None]
        votes = masked_softmax(logits, visible, slots.transform.sink_logits(logits))
        if self.normalize_scores:
            votes = votes * visible.sum(dim=-1, keepdim=True)
        return votes.sum(dim=3).mean(dim=2)
