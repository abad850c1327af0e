"""What the model looks at when it repeats the context, whatever will be asked about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressed_cache.ops.eviction import per_head
from compressed_cache.policies.base import Defaults, Needs, Policy
from compressed_cache.policies.capabilities import Repetition
from compressed_cache.policies.needs import usual_interval
from compressed_cache.policies.view import Slots

_NEW = -1.0  # the note of a token that the second pass did not see; attention is never below 0
_NEWEST = 2.0  # nor above 1


@dataclass(frozen=True, kw_only=True)
class KVzip(Policy):
    """Keeps what the model attends to while it repeats the context, once for all questions.

    KVzip, section 3 (https://arxiv.org/abs/2505.23416). The context is read with a full cache. Then
    the model reads, chunk by chunk, an instruction to repeat it and the chunk itself; a key's score
    is the most attention it gets there from any query of the input and any query head of its group,
    in a softmax over the sinks, the chunk and what of the input precedes the query. The first
    ``sinks`` tokens, the system prompt in the paper, are neither repeated nor scored nor evicted.
    :func:`compressed_cache.compress` does this; a prompt given to ``generate`` alone is refused.

    Tokens read after that have no score, and the paper's cache grows by them. Here the newest of
    them stay, up to half of the budget of their head at each ranking and until the next one those
    that come in, in place of the lowest scores of the context; older ones go before any of the
    context, the oldest first.

    Differs in six points from the authors' code: a budget in tokens is fixed (their cache grows
    after the context); it is that of each head, or with ``+adakv`` of a layer, whose heads then
    compete (they also share among layers, with no floor); the instructions have words of their own
    (set ``repeat_prompt`` and ``repeat_from_prompt`` for theirs); the softmax is in float32 and
    knows soft-capping and learned sinks (theirs is in the dtype of the model, without); layers with
    a sliding window keep it; and sinks are the first 4 tokens unless ``sinks`` says how long the
    system prompt is.
    """

    name: ClassVar[str] = "kvzip"
    scores_attention: ClassVar = True
    repeat_chunk: int = 2000
    """Tokens of the context that are repeated at a time (the authors' code has 2000)."""
    repeat_overlap: int = 8
    """Last tokens of the chunk before that the instruction for the next one quotes (theirs)."""
    repeat_prompt: str = "\n\nRepeat the text above word for word."
    """Instruction before the first chunk."""
    repeat_from_prompt: str = "\n\nRepeat the text above word for word from here on: "
    """Instruction before later chunks, which the quoted tokens follow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("repeat_chunk", 1), ("repeat_overlap", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        for name in ("repeat_prompt", "repeat_from_prompt"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} must not be empty, got {getattr(self, name)!r}")

    @property
    def needs(self) -> Needs:
        return Needs(notes=1)

    def defaults(self, budget: int) -> Defaults:
        return Defaults(interval=usual_interval(budget), sinks=4)

    def repetitions(
        self, context: Sequence[int], sinks: int, suffix: str, encode: Callable[[str], list[int]]
    ) -> list[Repetition]:
        after = encode(suffix) if suffix else []
        made: list[Repetition] = []
        for start in range(sinks, len(context), self.repeat_chunk):
            stop = min(start + self.repeat_chunk, len(context))
            before = encode(self.repeat_from_prompt if made else self.repeat_prompt)
            overlap = min(self.repeat_overlap, self.repeat_chunk) if made else 0
            quoted = context[start - overlap : start]
            made.append(Repetition(start, stop, [*before, *quoted, *after, *context[start:stop]]))
        return made

    def note(self, tokens: Slots) -> Tensor:
        shape = (*tokens.positions.shape, 1)
        return torch.full(shape, _NEW, dtype=torch.float32, device=tokens.positions.device)

    def scores(self, slots: Slots) -> Tensor:
        scores = slots.notes[..., 0]
        newest = per_head([budget // 2 for budget in slots.budgets], slots.positions)
        oldest = slots.next_position[:, None, None] - newest
        is_newest = (scores < 0) & (slots.positions >= oldest)
        return scores.masked_fill(is_newest, _NEWEST)
