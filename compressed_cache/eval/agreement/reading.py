"""The same texts read through several caches, beside the full one."""

import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from compressed_cache.eval.agreement.joined import apart, together
from compressed_cache.eval.agreement.reader import Reader
from compressed_cache.eval.agreement.text import Batch


@dataclass(frozen=True)
class Compared:
    """One cache beside the full one, all ``[B, T]``: at each token what was said before it.

    What stands after the end of a row's answer means nothing.
    """

    same: Tensor
    """bool, whether the most likely token is the full cache's."""
    divergence: Tensor
    """float32, KL divergence of the full cache's distribution from this one's, in nats."""
    lost: Tensor
    """float32, what the full cache's most likely token lost of its log-probability, in nats."""


class _Side:
    """A cache that reads beside the full one, until something goes wrong with it."""

    def __init__(self, model: Any, batch: Batch, make: Callable[[], Any]) -> None:
        self.error: Exception | None = None
        self._begin = lambda: _Steps(model, batch, make())
        self._steps: _Steps | None = None
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []

    def next(self) -> Tensor:
        """The logits ``[B, V]`` before the next token of each answer."""
        self._steps = self._steps or self._begin()
        return self._steps.next()

    def compare(self, reference: Tensor, likeliest: Tensor, logits: Tensor | Exception) -> None:
        """Keeps what is found of its logits, or what went wrong."""
        if not isinstance(logits, Exception):
            self._found.append(_compare(reference, likeliest, logits))
            return
        # To the log; its frames would keep the cache alive.
        traceback.print_exception(logits)
        self.error = logits.with_traceback(None)
        self._steps = None
        self._found.clear()

    def compared(self) -> Compared | Exception:
        """All of it, or what went wrong."""
        if self.error is not None:
            return self.error
        parts = zip(*self._found, strict=True)
        return Compared(*(torch.stack(part, dim=1).cpu() for part in parts))


class _Steps:
    """A cache on its way through a batch."""

    def __init__(self, model: Any, batch: Batch, cache: Any) -> None:
        self._batch = batch
        self._done = 0
        self._reader = Reader(model, cache, batch.mask, steps=batch.answers.shape[1])

    def next(self) -> Tensor:
        """The logits ``[B, V]`` before the next token of each answer."""
        done, self._done = self._done, self._done + 1
        if not done:
            return self._reader.prompt(self._batch.ids)
        return self._reader.step(self._batch.answers[:, done - 1])


@torch.inference_mode()
def read(
    model: Any, batch: Batch, caches: Mapping[str, Callable[[], Any]]
) -> dict[str, Compared | Exception]:
    """Reads a batch with the full cache and with others, all of them at the same token at a time.

    So the full cache reads once for all of them, and only the distributions of one token are held.
    It reads as they do, token by token in the same batch, because the logits of a text that is read
    at once are rounded otherwise.

    Args:
        model: a causal language model of transformers.
        batch: what is read.
        caches: what makes each of them, by name.

    Returns:
        By name what was found, or the error that made a cache drop out.

    Raises:
        Exception: whatever the full cache meets.
    """
    sides = {name: _Side(model, batch, make) for name, make in caches.items()}
    full = _Steps(model, batch, DynamicCache(config=model.config))
    with ThreadPoolExecutor(len(sides) + 1) as pool:
        for step in range(batch.answers.shape[1]):
            reading = [side for side in sides.values() if side.error is None]
            if not reading:
                break
            readers = [full.next, *(side.next for side in reading)]
            # Rounded to few bits, a row would depend on what is read beside it; and prompts have
            # rows enough, all of which would be held at once.
            joins = step > 0 and model.dtype == torch.float32
            logits, *others = together(readers, pool) if joins else apart(readers)
            if isinstance(logits, Exception):
                raise logits
            # As they are: rounded to fewer bits, several tokens may be as likely, and the first
            # wins.
            likeliest = logits.argmax(dim=-1, keepdim=True)
            reference = logits.float().log_softmax(dim=-1)
            for side, own in zip(reading, others, strict=True):
                side.compare(reference, likeliest, own)
    return {name: side.compared() for name, side in sides.items()}


def _compare(reference: Tensor, likeliest: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of log-probabilities ``[B, V]``, their most likely token ``[B, 1]`` and a policy's logits."""
    own = logits.float().log_softmax(dim=-1)
    share = reference.exp()
    # A token that cannot be has a log-probability of -inf, which counts nothing.
    terms = torch.where(share > 0, share * (reference - own), 0.0)
    lost = reference.gather(1, likeliest) - own.gather(1, likeliest)
    same = logits.argmax(dim=-1, keepdim=True) == likeliest
    return same[:, 0], terms.sum(dim=-1).clamp(min=0), lost[:, 0]
