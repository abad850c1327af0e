"""What one run took: seconds, tokens and bytes."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressed_cache.hf.draft_length import DraftStatistics
from compressed_cache.telemetry.peaks import peaks

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds, tokens and memory of a run.

    Tokens are those of all rows of the batch, padding included: the device works on them all.
    """

    prefill_s: float
    """Seconds from the start to the first decode step, all chunks of a prompt included."""
    decode_s: float
    """Seconds of the decode steps, the sum of :attr:`step_s`; with drafts, of all that came after
    the prompt."""
    tokens_in: int
    """Tokens of the prompts."""
    tokens_out: int
    """Tokens generated."""
    tokens_per_s: float | None
    """Tokens of the decode steps in each second of :attr:`decode_s`; None where there is none."""
    evicted_tokens: int
    """By how much ``CompressedCache.evicted_tokens`` grew; 0 of a cache that keeps everything."""
    cache_bytes: int
    """Bytes of the cache on the device at the end; with drafts, of the full one too."""
    peak_allocated_bytes: int | None
    """Most bytes of tensors on the CUDA devices since the start, None on a CPU."""
    peak_reserved_bytes: int | None
    """Most bytes PyTorch had of the CUDA devices since the start, None on a CPU."""
    peak_rss_bytes: int | None
    """Most bytes of host memory this process ever had, None where the system does not say."""
    step_s: tuple[float, ...] = field(repr=False)
    """Seconds of each decode step, from one token to the next: choosing it is included. Empty with
    drafts, where a step is of no fixed number of tokens."""
    drafts: DraftStatistics | None = field(default=None, hash=False)
    """What drafting brought under :func:`~compressed_cache.lossless`; None without it."""

    def write_json(self, path: str | Path) -> None:
        """Writes one JSON object: ``format`` and every field."""
        document = {"format": FORMAT, **asdict(self), "drafts": self._drafts()}
        Path(path).write_text(json.dumps(document, indent=1) + "\n")

    def write_csv(self, path: str | Path) -> None:
        """Writes a header and one row; ``step_s`` is one cell, its numbers apart by spaces, and
        ``drafts`` one of JSON."""
        row = asdict(self) | {"step_s": " ".join(map(repr, self.step_s))}
        row["drafts"] = json.dumps(self._drafts()) if self.drafts else None
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerow(row)

    def _drafts(self) -> dict[str, Any] | None:
        return self.drafts.to_json() if self.drafts else None


def finished(
    cache: Any,
    *,
    device: torch.device,
    rows: int,
    prefill_s: float,
    step_s: Sequence[float],
    tokens_in: int,
    tokens_out: int,
    evicted_tokens: int,
    drafts: DraftStatistics | None = None,
) -> Timing:
    """All of it, with what is known of memory now.

    Args:
        cache: a cache, or None where there was none.
        device: where the model is.
        rows: of the batch.
        prefill_s: see :class:`Timing`.
        step_s: see :class:`Timing`.
        tokens_in: see :class:`Timing`.
        tokens_out: see :class:`Timing`.
        evicted_tokens: see :class:`Timing`.
        drafts: see :class:`Timing`.
    """
    decode_s = drafts.seconds if drafts else sum(step_s)
    decoded = drafts.tokens if drafts else rows * len(step_s)
    peak = peaks(device)
    return Timing(
        prefill_s=prefill_s,
        decode_s=decode_s,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        tokens_per_s=decoded / decode_s if decode_s else None,
        evicted_tokens=evicted_tokens,
        cache_bytes=_bytes(cache) + (drafts.full_bytes if drafts else 0),
        peak_allocated_bytes=peak.allocated,
        peak_reserved_bytes=peak.reserved,
        peak_rss_bytes=peak.rss,
        step_s=tuple(step_s),
        drafts=drafts,
    )


def _bytes(cache: Any) -> int:
    own = getattr(cache, "nbytes", None)
    if own is not None:
        return own
    # A cache of an encoder and a decoder is two.
    parts = [
        cache,
        *(getattr(cache, f"{name}_attention_cache", None) for name in ("self", "cross")),
    ]
    layers = [layer for part in parts for layer in getattr(part, "layers", ())]
    return sum(tensor.nbytes for layer in layers for tensor in _tensors(vars(layer)))


def _tensors(held: Any) -> Iterator[Tensor]:
    for value in held.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value)


def total(timings: Sequence[Timing]) -> Timing:
    """One after the other: seconds and tokens add up, of bytes the most counts.

    Raises:
        ValueError: none at all.
    """
    if not timings:
        raise ValueError("timings must not be empty: nothing was generated")
    steps = tuple(seconds for timing in timings for seconds in timing.step_s)
    decode_s = sum(one.decode_s for one in timings)
    # A token of every row is generated in each step.
    tokens = sum((one.tokens_per_s or 0.0) * one.decode_s for one in timings)

    drafts = None
    for one in timings:
        if one.drafts:
            drafts = drafts or DraftStatistics()
            drafts.add(one.drafts)

    def most(name: str) -> int | None:
        known = [bytes_ for one in timings if (bytes_ := getattr(one, name)) is not None]
        return max(known, default=None)

    return Timing(
        prefill_s=sum(one.prefill_s for one in timings),
        decode_s=decode_s,
        tokens_in=sum(one.tokens_in for one in timings),
        tokens_out=sum(one.tokens_out for one in timings),
        tokens_per_s=tokens / decode_s if decode_s else None,
        evicted_tokens=sum(one.evicted_tokens for one in timings),
        cache_bytes=max(one.cache_bytes for one in timings),
        peak_allocated_bytes=most("peak_allocated_bytes"),
        peak_reserved_bytes=most("peak_reserved_bytes"),
        peak_rss_bytes=most("peak_rss_bytes"),
        step_s=steps,
        drafts=drafts,
    )
