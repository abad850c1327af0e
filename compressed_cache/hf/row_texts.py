"""The texts of a batch, whose rows grow by different numbers of tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.generation import logits_process
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria

# What these make of the scores does not depend on the text before.
_TEXTLESS = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "SuppressTokensLogitsProcessor",
    )
)


class RowTexts:
    """Texts as plain ``generate`` would write them, whatever is known of each row so far.

    Processors and criteria are shown the whole batch with as many tokens as plain ``generate``
    would show, and what they say counts for those rows that have so many. What would be after the
    end of a row is shown to no processor, nor to a ``prefix_allowed_tokens_fn`` any other row than
    these, since they may refuse what plain ``generate`` would never ask about.

    Args:
        ids: ``[B, L]`` int64, the prompt.
        processors: of logits.
        criteria: that end a row.
        pad_token: ``[]`` int64, for rows that have ended, where a token can end one.
        longest: tokens of a text at most.
        streamer: is given what all rows have.

    Attributes:
        lengths: tokens of each row so far.
        closing: which rows have ended by a token that is still to be read; those that end at the
            longest text are not.
    """

    def __init__(
        self,
        ids: Tensor,
        processors: Sequence[Callable[..., Tensor]],
        criteria: Sequence[Any],
        *,
        pad_token: Tensor | None,
        longest: float,
        streamer: Any = None,
    ) -> None:
        self.ids = ids
        self.processors, self.criteria = processors, criteria
        self.longest, self.streamer = longest, streamer
        self.lengths = [ids.shape[1]] * len(ids)
        self.closing = [False] * len(ids)
        self._ends: list[int | None] = [None] * len(ids)
        has_ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._pad = pad_token if has_ends else None
        self._ending = [one for one in criteria if type(one) is EosTokenCriteria]
        self._streamed = ids.shape[1]
        self._sees_text = any(type(one) not in _TEXTLESS for one in processors)
        self._may_refuse = any(
            type(one) is PrefixConstrainedLogitsProcessor
            or type(one).__module__ != logits_process.__name__
            for one in processors
        )

    @property
    def growing(self) -> list[bool]:
        """Which rows want more tokens.

        As in plain ``generate``, one that has ended without a token for it goes on beside others.
        """
        if self._pad is not None:
            return [end is None for end in self._ends]
        most = self._sure_width(self.lengths)
        return [length < most for length in self.lengths]

    def room(self) -> float:
        """How many tokens the shortest of the growing rows may still take."""
        rows = zip(self.lengths, self.growing, strict=True)
        return self.longest - min(length for length, grows in rows if grows)

    def last(self) -> Tensor:
        """``[B, 1]`` int64, the last token of each row."""
        return self.ids.gather(1, self._at(-1))

    def propose(self, tokens: Tensor, offset: int) -> None:
        """Writes tokens ``[B, 1]`` after those there are and ``offset`` proposed ones."""
        self._reserve(offset + 1)
        self.ids.scatter_(1, self._at(offset), tokens)

    def process(self, logits: Tensor, *, offset: int = 0) -> Tensor:
        """The scores of the next tokens.

        Args:
            logits: ``[B, n, V]``, those of the model after ``offset`` proposed tokens and more.
            offset: tokens proposed before.

        Returns:
            ``[B, n, V]`` float32.
        """
        # A copy: processors may write into it.
        scores = logits.to(self.ids.device, torch.float32, copy=True)
        if not self.processors:
            return scores
        batch, count, _ = scores.shape
        if not self._sees_text:
            flat = scores.flatten(0, 1)
            for processor in self.processors:
                flat = processor(self.ids, flat)
            return flat.view_as(scores)
        self._reserve(offset + count)
        processed = scores.clone()
        for width, rows in self._by_width(self._wanted(count, offset), offset):
            index = torch.tensor(
                [min(max(width - length - offset, 0), count - 1) for length in self.lengths],
                device=scores.device,
            )
            one = scores[torch.arange(batch, device=scores.device), index]
            for processor in self.processors:
                one = _processed(processor, self.ids[:, :width], one, rows)
            chosen = torch.tensor(rows, device=scores.device)
            processed[chosen, index[chosen]] = one[chosen]
        return processed

    def extend(self, counts: Sequence[int], next_tokens: Tensor) -> list[int]:
        """Takes proposed tokens and one more, as far as nothing ends a row before.

        Args:
            counts: of each row, how many of the proposed tokens stay.
            next_tokens: ``[B, 1]`` int64, the token after them.

        Returns:
            How many tokens each row has taken; 0 in one that had ended.
        """
        growing = self.growing
        self._reserve(max(counts) + 1)
        offsets = torch.tensor(counts, device=self.ids.device)[:, None]
        self.ids.scatter_(1, self._at(0) + offsets, next_tokens)
        rows = zip(counts, self.lengths, growing, strict=True)
        taken = [
            int(min(count + 1, self.longest - length)) * grows for count, length, grows in rows
        ]
        ended: list[int | None] = [None] * len(taken)
        for width, rows in self._by_width(taken, 1):
            done = torch.zeros(len(taken), dtype=torch.bool, device=self.ids.device)
            for criterion in self.criteria:
                done = done | _says(criterion, self.ids[:, :width], rows)
            if bool(done.any()):
                for row in rows:
                    if ended[row] is None and bool(done[row]):
                        ended[row] = width
        self.closing = [False] * len(taken)
        for row, end in enumerate(ended):
            if end is not None and self._ends[row] is None:
                self._ends[row] = end
                if self._pad is not None:
                    taken[row] = end - self.lengths[row]
                    self.closing[row] = end < self.longest
        if self._pad is None:
            # No row is to be ahead of where the text may end.
            after = [length + new for length, new in zip(self.lengths, taken, strict=True)]
            most = self._sure_width(after)
            taken = [new - max(end - most, 0) for new, end in zip(taken, after, strict=True)]
        self.lengths = [length + new for length, new in zip(self.lengths, taken, strict=True)]
        if self.streamer is not None:
            self._stream()
        return taken

    def finished(self) -> Tensor:
        """``[B, T]`` int64, all that plain ``generate`` would return."""
        width = self._width()
        if self.streamer is not None:
            self.streamer.end()
        return self._padded(self.ids[:, :width])

    def _wanted(self, count: int, offset: int) -> list[int]:
        """Of ``count`` scores after ``offset`` proposed tokens and more, how many of each row are
        processed: where that may be refused, none after the end of its text."""
        if not self._may_refuse:
            return [count] * len(self.lengths)
        rows = zip(self.lengths, self.growing, strict=True)
        wanted = [
            max(min(count, self.longest - length - offset), 0) * grows for length, grows in rows
        ]
        columns = self._at(0) + torch.arange(offset + count - 1, device=self.ids.device)
        proposed = self.ids.gather(1, columns)
        ends = torch.zeros_like(proposed, dtype=torch.bool)
        for criterion in self._ending:
            ends |= torch.isin(proposed, criterion.eos_token_id.to(ends.device))
        # The token that ends it is one that is asked for.
        asked = 1 + (ends.cumsum(dim=1) == 0).sum(dim=1) - offset
        return [int(min(*both)) for both in zip(wanted, asked.clamp(min=0).tolist(), strict=True)]

    def _sure_width(self, lengths: Sequence[int]) -> int:
        """Tokens that the text is sure to have, so that a row that has ended without a token for it
        may go on: as many as any had at its end, and one more than any that has not ended."""
        rows = zip(lengths, self._ends, strict=True)
        return max(length + 1 if end is None else end for length, end in rows)

    def _width(self) -> int:
        return max(end or 0 for end in self._ends)

    def _at(self, offset: int) -> Tensor:
        index = torch.tensor(self.lengths, device=self.ids.device)
        return index[:, None] + offset

    def _by_width(self, counts: Sequence[int], first: int) -> list[tuple[int, list[int]]]:
        """The rows that have something at each width, from ``first`` tokens after their own on."""
        found: dict[int, list[int]] = {}
        for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            for token in range(count):
                found.setdefault(length + first + token, []).append(row)
        return sorted(found.items())

    def _reserve(self, tokens: int) -> None:
        missing = max(self.lengths) + tokens - self.ids.shape[1]
        if missing > 0:
            # In large steps, as each is a copy.
            self.ids = pad(self.ids, (0, missing + 256))

    def _padded(self, ids: Tensor) -> Tensor:
        if self._pad is None:
            return ids
        columns = torch.arange(ids.shape[1], device=ids.device)
        return torch.where(columns < self._at(0), ids, self._pad.to(ids.device))

    def _stream(self) -> None:
        """Gives out the columns that all rows have."""
        growing = self.growing
        width = (
            self._width()
            if not any(growing)
            else min(length for length, grows in zip(self.lengths, growing, strict=True) if grows)
        )
        for column in self._padded(self.ids[:, :width])[:, self._streamed :].T:
            self.streamer.put(column.cpu())
        self._streamed = max(self._streamed, width)


def _processed(processor: Any, ids: Tensor, scores: Tensor, rows: Sequence[int]) -> Tensor:
    """What a processor makes of the scores ``[B, V]`` of these rows, which are not all."""
    if type(processor) is not PrefixConstrainedLogitsProcessor:
        return processor(ids, scores)
    allowed = processor._prefix_allowed_tokens_fn
    for row in rows:
        own: Any = PrefixConstrainedLogitsProcessor(lambda _, text, row=row: allowed(row, text), 1)
        scores[row : row + 1] = own(ids[row : row + 1], scores[row : row + 1])
    return scores


def _says(criterion: Callable[..., Any], ids: Tensor, rows: Sequence[int]) -> Tensor | bool:
    """What a criterion says of these rows, which are not all.

    Those of lm_eval end a batch when they have seen the end of all of its rows, which they remember
    in ``done_tracker``: what they see of others than these is not their text.
    """
    ended: list[bool] | None = getattr(criterion, "done_tracker", None)
    if ended is None:
        return criterion(ids, None)
    before = list(ended)
    criterion(ids, None)
    ended[:] = [ended[row] if row in rows else was for row, was in enumerate(before)]
    return all(ended)
