"""The results of the benchmarks as Markdown and as pictures."""

from collections.abc import Callable
from typing import Any

from bench.results import Results
from compressed_cache.wording import markdown

COMMAND = "pytest bench/ --benchmark-only"
DEVICES = ("cpu", "cuda")
Row = dict[str, Any]


def table(name: str, make: Callable[[Results], str]) -> str:
    """What was measured on each machine, or the command that would."""
    parts = []
    for device in DEVICES:
        found = [each for each in Results.all() if each.device == device and each.rows(name)]
        parts += [make(each) for each in found]
        if not found:
            parts.append(f"On {device}: not measured. `{COMMAND}` fills these rows where it can.")
    return "\n\n".join(parts)


def decode() -> str:
    """How long a token takes under each cache."""
    return table("decode", _decode)


def policies() -> str:
    """Every policy beside the full cache."""
    return table("policies", _policies)


def telemetry() -> str:
    """What watching a cache costs."""
    return table("telemetry", _telemetry)


def tokens_seen() -> str:
    """How long a token takes after texts of several lengths."""
    return table("tokens seen", _tokens_seen)


def budget() -> str:
    """How long a token takes under several budgets."""
    return table("budget", _budget)


def prefill() -> str:
    """What reading a prompt at once takes."""
    return table("prefill", _prefill)


def chunks() -> str:
    """What reading a long prompt in chunks takes in memory."""
    return table("chunks", _chunks)


def capacity() -> str:
    """What fits in memory."""
    return table("capacity", _capacity)


def lossless() -> str:
    """How long a token takes where drafts are verified."""
    return table("lossless", _lossless)


def growth() -> str:
    """How memory and the time of a token grow."""
    return table("growth", _growth)


def compilation() -> str:
    """How long the decode step takes to compile."""
    return table("compile", _compilation)


def _machine(results: Results, name: str) -> str:
    conditions = results.tables[name]["conditions"]
    versions = conditions["versions"]
    threads = f"{conditions['threads']} thread, " if results.device == "cpu" else ""
    return (
        f"{results.hardware}, {threads}{conditions['dtype']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}"
    )


def _by_model(rows: list[Row]) -> dict[str, list[Row]]:
    models: dict[str, list[Row]] = {}
    for row in rows:
        models.setdefault(row["model"], []).append(row)
    return models


def _speed(row: Row) -> str:
    # The ratio is of times, so its extremes change places.
    return f"{1 / row['ratio']:.2f} [{1 / row['ratio_high']:.2f}, {1 / row['ratio_low']:.2f}]"


def _share(row: Row) -> str:
    return f"{row['share_of_bandwidth']:.0%}" if "share_of_bandwidth" in row else "-"


def _decode(results: Results) -> str:
    header = ["batch", "cache", "step", "ms per token", "tokens/s", "times as fast as DynamicCache"]
    parts = []
    for model, rows in _by_model(results.rows("decode")).items():
        first = rows[0]
        lines = [
            [
                *(str(row["batch"]), row["contender"], row["step"], f"{row['ms_per_token']:.2f}"),
                f"{1000 * row['batch'] / row['ms_per_token']:,.0f}",
                *(_speed(row), _share(row)),
            ]
            for row in sorted(rows, key=lambda row: (row["batch"], "versions" in row))
        ]
        parts.append(
            f"{_machine(results, 'decode')}; {model}, prompt of {first['prompt']:,} tokens, budget "
            f"{first['budget']}. Medians, with the extremes of the rounds, each of "
            f"{first['tokens_per_round']} tokens and right after as many of DynamicCache.\n\n"
            + markdown([*header, "share of bandwidth"], lines)
        )
    return "\n\n".join([*parts, *_claims(results)])


def _claims(results: Results) -> list[str]:
    rows = results.rows("late against early")
    lines = [
        f"- {row['model']}, `{row['contender']}`, compiled: a token after {row['late']:,} tokens "
        f"takes {row['ratio']:.2f} times as long as after {row['early']:,} "
        f"[{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]."
        for row in rows
    ]
    lines += [
        f"- {row['contender']}, batch {row['batch']}: held up to {row['held_tokens']:,} tokens."
        for row in results.rows("decode")
        if row.get("held_tokens") and row["batch"] == 1
    ]
    lines += [
        f"- {row['model']}, `{row['contender']}`, compiled: the first {row['tokens']} tokens with "
        f"a new cache object take {row['ratio']:.2f} times as long as with one that was reset "
        f"[{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]."
        for row in results.rows("fresh cache")
    ]
    return ["\n".join(lines)] if lines else []


def _policies(results: Results) -> str:
    parts = []
    for model, rows in _by_model(results.rows("policies")).items():
        cells: dict[str, dict[str, list[str]]] = {}
        for row in rows:
            shown = [f"{row['ms_per_token']:.2f}", f"{row['mean_ms_per_token']:.2f}", _speed(row)]
            cells.setdefault(row["contender"], {})[row["step"]] = shown
        lines = [
            [f"`{name}`", *(steps.get("eager", ["-"] * 3)), *(steps.get("compiled", ["-"] * 3))]
            for name, steps in cells.items()
        ]
        first = rows[0]
        header = [
            f"{step}: {column}"
            for step in ("eager", "compiled")
            for column in ("ms per token", "mean", "times as fast as DynamicCache")
        ]
        parts.append(
            f"{_machine(results, 'policies')}; {model}, batch {first['batch']}, prompt of "
            f"{first['prompt']:,} tokens, budget {first['budget']}. Medians, with the extremes of "
            f"{first['rounds']} rounds of {first['tokens_per_round']} tokens, each right after as "
            "many of DynamicCache, which is eager; the mean counts steps that rank slots too.\n\n"
            + markdown(["policy", *header], lines)
        )
    return "\n\n".join(parts)


def _telemetry(results: Results) -> str:
    inside = {row["contender"]: row for row in results.rows("share of timing")}
    outside = {row["contender"]: row for row in results.rows("telemetry")}
    first = next(iter(outside.values()))
    lines = []
    for watched in dict.fromkeys([*outside, *inside]):
        ratio, part = outside.get(watched), inside.get(watched)
        lines.append(
            [
                f"`{watched}`",
                f"{part['us_per_token']:.1f}" if part else "-",
                f"{part['share']:.2%}" if part else "-",
                f"{ratio['ratio']:.3f} [{ratio['ratio_low']:.2f}, {ratio['ratio_high']:.2f}]"
                if ratio
                else "-",
            ]
        )
    return (
        f"{_machine(results, 'telemetry')}; {first['model']}, `{first['policy']}`, batch "
        f"{first['batch']}, budget {first['budget']}, eager. Time inside the observer, its share "
        "of the step, and how many times as long a step takes as one that nobody observes: the row "
        "of `nothing` says how well this can be told.\n\n"
        + markdown(["observed by", "us per token", "share of a step", "times as long"], lines)
    )


def _grid(
    results: Results, name: str, column: str, cell: Callable[[Row], str], corner: str, title: str
) -> str:
    """A table with a row per cache and a column per size, for each model."""
    parts = []
    for model, rows in _by_model(results.rows(name)).items():
        sizes = sorted({row[column] for row in rows})
        key = "contender" if "contender" in rows[0] else "cache"
        found = {(row[key], row[column]): row for row in rows}
        lines = []
        for cache in dict.fromkeys(row[key] for row in rows):
            cells = [found.get((cache, size)) for size in sizes]
            lines.append([cache, *(cell(row) if row else "-" for row in cells)])
        parts.append(
            f"{_machine(results, name)}; {model}, {title}\n\n"
            + markdown([corner, *(f"{size:,}" for size in sizes)], lines)
        )
    return "\n\n".join(parts)


def _milliseconds(row: Row) -> str:
    return f"{row['ms_per_token']:.2f} ({1 / row['ratio']:.2f}x)"


def _mean_milliseconds(row: Row) -> str:
    return f"{row['mean_ms_per_token']:.2f} ({1 / row['mean_ratio']:.2f}x)"


def _tokens_seen(results: Results) -> str:
    budget = results.rows("tokens seen")[0]["budget"]
    return _grid(
        *(results, "tokens seen", "prompt", _milliseconds),
        "ms per token after so many",
        f"batch 1, budget {budget}; in brackets how many times as fast as DynamicCache there.",
    )


def _budget(results: Results) -> str:
    prompt = results.rows("budget")[0]["prompt"]
    return _grid(
        *(results, "budget", "budget", _mean_milliseconds),
        "ms per token at budget",
        f"batch 1, prompt of {prompt:,} tokens, compiled; means over as many tokens as there are "
        "between two rankings, in brackets how many times as fast as DynamicCache there.",
    )


def _prefill(results: Results) -> str:
    plain = {
        (row["model"], row["tokens"]): row
        for row in results.rows("prefill")
        if row["cache"] == "DynamicCache"
    }

    def cell(row: Row) -> str:
        ratio = row["seconds"] / plain[row["model"], row["tokens"]]["seconds"]
        return f"{row['seconds']:.2f} ({ratio:.2f}x), {row['peak_mib']:,.0f}"

    budget = results.rows("prefill")[0]["budget"]
    return _grid(
        *(results, "prefill", "tokens", cell),
        "prompt of so many tokens",
        f"budget {budget}; seconds (of those of DynamicCache), and peak MiB beyond the model; each "
        "in a process of its own.",
    )


def _chunks(results: Results) -> str:
    rows = results.rows("chunks")
    lengths = list(dict.fromkeys(row["tokens"] for row in rows))
    found = {(row["cache"], row["tokens"]): row for row in rows}
    header = ["peak MiB beyond one chunk", *(f"{tokens:,} tokens" for tokens in lengths)]
    lines = []
    for cache in dict.fromkeys(row["cache"] for row in rows):
        cells = [found.get((cache, tokens)) for tokens in lengths]
        shown = [f"{row['peak_mib']:.0f}" if row else "-" for row in cells]
        lines.append([cache, *shown])
    return "\n".join(
        [
            f"{_machine(results, 'chunks')}; four layers of 128, chunks of {rows[0]['chunk']:,} "
            f"tokens, budget {rows[0]['budget']}; each cell in a process of its own.",
            "",
            markdown(header, lines),
            "",
            "![Peak memory against the length of the prompt]"
            f"(bench/results/{results.picture('chunks').name})",
        ]
    )


def draw_peaks() -> None:
    """Draws peak memory against the length of the prompt, for each machine."""
    from matplotlib.figure import Figure

    for results in Results.all():
        rows = results.rows("chunks")
        if not rows:
            continue
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.subplots()
        for cache in dict.fromkeys(row["cache"] for row in rows):
            own = [row for row in rows if row["cache"] == cache]
            peaks = [row["peak_mib"] for row in own]
            axes.plot([row["tokens"] for row in own], peaks, marker="o", label=cache)
        axes.set_xlabel("tokens of the prompt")
        axes.set_ylabel("peak MiB beyond one chunk")
        axes.set_ylim(bottom=0)
        axes.legend()
        figure.savefig(results.picture("chunks"), dpi=120)


def _capacity(results: Results) -> str:
    parts = []
    for model, rows in _by_model(results.rows("capacity")).items():
        first = rows[0]
        lines = []
        for row in rows:
            longest = row["longest_text_tokens"]
            lines.append(
                [
                    *(row["cache"], f"{row['row_bytes'] / 2**20:,.1f}"),
                    f"{row['largest_batch']:,}",
                    "any" if longest is None else f"{longest:,}",
                ]
            )
        header = ["cache", f"MiB per row of {first['row_tokens']:,} tokens", "rows", "longest text"]
        budget = next(row["budget"] for row in rows if row["budget"])
        parts.append(
            f"{model}, {results.tables['capacity']['conditions']['dtype']}, budget {budget}: what "
            f"fits in {first['memory_bytes'] / 2**30:.0f} GiB of cache, from the bytes it held "
            f"({results.device}).\n\n" + markdown(header, lines)
        )
    return "\n\n".join(parts)


def _lossless(results: Results) -> str:
    rows = results.rows("lossless")
    rows.sort(key=lambda row: (row["seen"], row["step"], row["chance"]))
    header = ["tokens seen", "drafts", "right %", "tokens per verification", "ms per token"]
    header.append("times as fast as DynamicCache")
    lines = [
        [
            f"{row['seen']:,}",
            row["step"],
            f"{100 * row['chance']:.0f}",
            f"{row['tokens_per_verification']:.2f}"
            + (f" (given up after {row['plain_from']})" if row["plain_from"] else ""),
            f"{row['ms_per_token']:.2f}",
            _speed(row),
        ]
        for row in rows
    ]
    return (
        f"{_machine(results, 'lossless')}; 4 layers of 512, batch 1, snapkv with "
        f"{rows[0]['budget']} slots, at most 8 drafts.\n\n" + markdown(header, lines)
    )


def _growth(results: Results) -> str:
    rows = results.rows("growth")
    found = {(row["policy"], row["quantity"]): row for row in rows}
    quantities = list(dict.fromkeys(row["quantity"] for row in rows))
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        cells = [f"`{policy}`"]
        for quantity in quantities:
            row = found.get((policy, quantity))
            exponents = ("bytes_exponent", "seconds_exponent")
            cells += ["-", "-"] if row is None else [f"{row[name]:.2f}" for name in exponents]
        lines.append(cells)
    header = ["policy", *(f"{one}: {what}" for one in quantities for what in ("bytes", "time"))]
    ranges = [
        f"{quantity} {min(values):,} to {max(values):,}"
        for quantity in quantities
        for values in [next(row["values"] for row in rows if row["quantity"] == quantity)]
    ]
    others = ", ".join(f"{name} {value:,}" for name, value in rows[0]["as_it_is"].items())
    return (
        f"{_machine(results, 'growth')}; layers of 512, eager. {', '.join(ranges)}, one at a time; "
        f"the others are {others}.\n\n" + markdown(header, lines)
    )


def _compilation(results: Results) -> str:
    rows = results.rows("compile")
    sizes = list(dict.fromkeys(row["layers"] for row in rows))
    found = {(row["cache"], row["once"], row["layers"]): row for row in rows}
    header = ["cache", "compiles", *(f"{n} layers, {t}" for n in sizes for t in ("cold", "warm"))]
    lines = []
    for cache, once in dict.fromkeys((row["cache"], row["once"]) for row in rows):
        cells = [found.get((cache, once, size), {}) for size in sizes]
        times = [row.get(name) for row in cells for name in ("cold_s", "warm_s")]
        shown = ["-" if seconds is None else f"{seconds:.1f}" for seconds in times]
        lines.append([cache, "one layer" if once else "every layer", *shown])
    return "\n".join(
        [
            f"Seconds to compile the decode step ({_machine(results, 'compile')}): *cold* with "
            "nothing on disk, *warm* in a new process that finds what another left there.",
            "",
            markdown(header, lines),
        ]
    )
