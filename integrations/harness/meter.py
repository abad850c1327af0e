"""What the replies of a run cost, tied to each of them."""

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from compressed_cache.cache import CompressedCache
from compressed_cache.tasks.record import Record, Reply


class Meter:
    """Collects one record per generated row and gives it to the reply of that row.

    The harness sorts requests by length, generates in batches and puts the texts back in order; the
    only place that sees each text in the order of generation is its cache hook. So a meter stands
    in for that hook while the harness generates.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.seconds = 0.0
        self._batch: deque[Record] = deque()
        self._replies: dict[Any, deque[Reply]] = defaultdict(deque)
        self._hook: Any = None

    def listen(self, hook: Any) -> "Meter":
        """Takes the place of the harness's hook, which still hears everything."""
        self._hook = hook
        self._batch.clear()
        self._replies.clear()
        return self

    def measure(self, rows: Sequence[Record], *, seconds: float) -> None:
        """Takes the records of a batch, in the order of its rows, and how long it took."""
        self.seconds += seconds
        self._batch.extend(rows)
        self.records.extend(rows)

    def add_partial(self, method: str, request: Any, text: str) -> None:
        """Called by the harness for each reply, in the order of generation."""
        reply = Reply(text, self._batch.popleft())
        self._replies[_key(request)].append(reply)
        self._hook.add_partial(method, request, reply)

    def replies(self, requests: Sequence[Any], texts: Sequence[str]) -> list[Reply]:
        """The harness's texts, in its order, with their records."""
        replies = [self._replies[_key(request.args)].popleft() for request in requests]
        if replies != list(texts):
            raise RuntimeError("replies and records are out of step: lm_eval's order has changed")
        return replies


def batch_records(
    cache: CompressedCache,
    attention_mask: Tensor,
    replies: Tensor,
    *,
    limit: int,
    ends: set[int],
    padding: int,
    full_bytes: int | None = None,
) -> list[Record]:
    """One record per row of a batch.

    A finished row is fed padding until the longest one ends, so what the cache holds at the end
    says nothing about that row. A row of ``n`` tokens has left ``min(n, slots)`` of them.

    Args:
        cache: as it is after the batch.
        attention_mask: ``[B, L]`` of the prompts, 0 where padded.
        replies: ``[B, N]`` generated ids.
        limit: most tokens a reply could have.
        ends: ids that end a text, and count.
        padding: the id that fills a row after its end, and does not.
        full_bytes: of the full cache that verifies, and holds everything; None: there is none.
    """
    layer = cache.compressed_layer
    assert layer is not None, "a batch was generated"
    slots = layer.store.slots_per_head
    share = (cache.nbytes + (full_bytes or 0)) // len(replies)
    records = []
    for prompt, row in zip(attention_mask.sum(dim=1).tolist(), replies.tolist(), strict=True):
        end = next((i for i, token in enumerate(row) if token in ends or token == padding), None)
        tokens = len(row) if end is None else end + (row[end] in ends)
        # The last token is never fed back.
        seen = prompt + tokens - 1
        records.append(
            Record(
                tokens=tokens,
                truncated=end is None and tokens >= limit,
                seen_tokens=seen,
                held_tokens=min(seen, slots) if full_bytes is None else seen,
                cache_bytes=share,
            )
        )
    return records


def _key(request: Any) -> tuple[str, str]:
    context, generation = request
    return context, repr(sorted(generation.items()))
