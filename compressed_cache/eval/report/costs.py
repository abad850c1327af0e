"""What caches cost: time and memory."""

import math
from collections.abc import Iterator
from statistics import median
from typing import Any

from compressed_cache.eval.report.benches import Bench
from compressed_cache.eval.report.figures import Curve
from compressed_cache.eval.report.inputs import TimingFile
from compressed_cache.eval.report.parts import Part, drawn
from compressed_cache.eval.report.tables import Column, table
from compressed_cache.eval.report.tables import field as column

Measured = dict[str, Any]
MIB = 2**20
_STEPS_DRAWN = 100
_BATCHES = [2**power for power in range(14)]
_RATIO: list[Column[Measured]] = [
    column("ms_per_token", "ms per token", ".2f"),
    Column("times as fast as DynamicCache", lambda row: 1 / row["ratio"], ".2f"),
    Column("slowest round", lambda row: 1 / row["ratio_high"], ".2f"),
    Column("fastest round", lambda row: 1 / row["ratio_low"], ".2f"),
    column("share_of_bandwidth", "bandwidth %", ".0f", 0.01),
]
_RATE: list[Column[Measured]] = [
    Column("tokens/s", lambda row: 1000 * row["batch"] / row["ms_per_token"], ",.0f"),
]
_WHERE: list[Column[Measured]] = [column("contender", "cache"), column("step")]
_PEAK: list[Column[Measured]] = [
    column("cache"),
    column("tokens", "prompt tokens", ",d"),
    column("budget", form=",d"),
    column("peak_mib", "peak MiB", ",.0f"),
    column("seconds", form=",.2f"),
]


def speed(bench: Bench) -> Iterator[Part]:
    """How long tokens take on one machine."""
    for name, x, axis, text in (
        (
            "tokens seen",
            "prompt",
            "tokens seen",
            "budget {budget}. Some were measured at one point",
        ),
        ("budget", "budget", "budget (slots per head)", "after a prompt of {prompt:,} tokens"),
    ):
        for where, rows in _by_model(bench, name):
            words = f"Latency against {name}, {where}"
            lines = _curves(rows, "contender", x, "ms_per_token")
            yield Part(
                words,
                f"Batch 1, {text.format(**rows[0])}.",
                drawn(lines, words, x=axis, y="ms per token", log="x"),
                [table(words, [*_WHERE, column(x, name, ",d"), *_RATIO], rows)],
            )
    for name, title in (("decode", "Decoding"), ("policies", "Decoding under every policy")):
        for where, rows in _by_model(bench, name):
            words = f"{title}, {where}"
            yield Part(
                words,
                "Budget {budget}, after a prompt of {prompt:,} tokens.".format(**rows[0]),
                tables=[table(words, [*_WHERE, column("batch", form="d"), *_RATE, *_RATIO], rows)],
            )


def memory(bench: Bench) -> Iterator[Part]:
    """What caches take on one machine."""
    for where, rows in _by_model(bench, "capacity"):
        words = f"Memory against batch, {where}"
        first = rows[0]
        room = first["memory_bytes"]
        lines = {}
        for row in rows:
            batches = [batch for batch in _BATCHES if batch * row["row_bytes"] <= room]
            if batches:
                mib = [batch * row["row_bytes"] / MIB for batch in batches]
                lines[row["cache"]] = Curve(batches, mib)
        yield Part(
            words,
            f"Rows of {first['row_tokens']:,} tokens, up to {room / 2**30:.0f} GiB of cache: the "
            "bytes that a cache of one row held, times the rows.",
            drawn(lines, words, x="batch (rows)", y="cache, MiB", log="xy"),
            [
                table(
                    words,
                    [
                        column("cache"),
                        column("budget", form=",d"),
                        column("row_bytes", "MiB per row", ",.2f", MIB),
                        column("largest_batch", "rows that fit", ",d"),
                        column("longest_text_tokens", "longest text, tokens", ",d"),
                    ],
                    rows,
                )
            ],
        )
    for name, title in (("chunks", "Prompts in chunks"), ("prefill", "Prompts at once")):
        for where, rows in _by_model(bench, name):
            words = f"{title}, {where}"
            yield Part(
                words,
                "Peak beyond " + ("one chunk." if name == "chunks" else "the model."),
                drawn(
                    _curves(rows, "cache", "tokens", "peak_mib"),
                    words,
                    x="prompt tokens",
                    y="peak, MiB",
                    log="x",
                ),
                [table(words, _PEAK, rows)],
            )


def timings(timings: list[TimingFile]) -> list[Part]:
    """How long the steps of single generations took."""
    if not timings:
        return []
    lines = {}
    for timing in timings:
        steps = [1000 * seconds for seconds in timing.document["step_s"]]
        width = max(1, math.ceil(len(steps) / _STEPS_DRAWN))
        starts = range(0, len(steps), width)
        if steps:
            first = [start + 1 for start in starts]
            lines[timing.source] = Curve(first, [median(steps[s : s + width]) for s in starts])
    words = "Step by step"
    columns: list[Column[Measured]] = [
        column("file"),
        column("tokens_in", form=",.0f"),
        column("tokens_out", form=",.0f"),
        column("prefill_s", "prefill, s", ",.3f"),
        column("decode_s", "decode, s", ",.3f"),
        column("tokens_per_s", "tokens/s", ",.1f"),
        column("evicted_tokens", form=",.0f"),
        column("cache_bytes", "cache MiB", ",.2f", MIB),
        column("peak_allocated_bytes", "peak allocated MiB", ",.0f", MIB),
        column("peak_reserved_bytes", "peak reserved MiB", ",.0f", MIB),
        column("peak_rss_bytes", "peak RSS MiB", ",.0f", MIB),
        column("acceptance_rate", "drafts accepted %", ".1f", 0.01),
    ]
    axes = {"x": "decode step", "y": "ms per step", "dots": False}
    return [
        Part(
            words,
            f"Medians where there are more than {_STEPS_DRAWN} steps.",
            drawn(lines, words, **axes) if lines else [],
            [table(words, columns, [_row(timing) for timing in timings])],
        )
    ]


def _row(timing: TimingFile) -> Measured:
    drafts = timing.document.get("drafts") or {}
    return {"file": timing.source} | timing.document | drafts


def _by_model(bench: Bench, name: str) -> Iterator[tuple[str, list[Measured]]]:
    rows = bench.rows(name)
    for model in dict.fromkeys(row.get("model") for row in rows):
        own = [row for row in rows if row.get("model") == model]
        where = f"{bench.hardware}, {bench.device}"
        yield f"{model}, {where}" if model else where, own


def _curves(rows: list[Measured], name: str, x: str, y: str) -> dict[str, Curve]:
    found: dict[str, list[Measured]] = {}
    for row in rows:
        found.setdefault(row[name], []).append(row)
    lines = {}
    for key, own in found.items():
        own.sort(key=lambda row: row[x])
        lines[key] = Curve([row[x] for row in own], [row[y] for row in own])
    return lines
