"""The report: what it reads, what it refuses and what its figures hold."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from scipy.stats import binomtest
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache
from compressed_cache.__main__ import main
from compressed_cache.eval.report import attention, costs, figures, quality
from compressed_cache.eval.report.benches import Bench
from compressed_cache.eval.report.comparison import comparison
from compressed_cache.eval.report.figures import Curve
from compressed_cache.eval.report.inputs import read
from compressed_cache.eval.report.page import page
from compressed_cache.eval.report.rows import groups, of_harness, series, to_random, with_prompt
from compressed_cache.eval.report.sections import sections
from compressed_cache.eval.report.svg import Picture
from compressed_cache.eval.report.tables import MISSING, Table
from compressed_cache.eval.report.traces import POSITIONS, Head, Losses
from compressed_cache.telemetry import Recorder, measure
from compressed_cache.wording import missing
from tests.conftest import distinct_tokens
from tests.reports import (
    PROMPT,
    RECORDED,
    ROOT,
    STEPS,
    SWEEP,
    TIMING,
    evictions,
    losses,
    one_of_each,
    result,
    write_parquet,
    write_sweep,
    write_timing,
)


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sections: list[str] = []
        self.labels: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.ids += [told["id"]] if "id" in told else []
        self.links += [told[k] for k in ("href", "src", "xlink:href", "srcset") if k in told]
        self.sections += [told["id"]] if tag == "section" else []
        self.labels += [told["aria-label"]] if tag == "svg" else []

    def handle_data(self, data: str) -> None:
        self.words += [data.strip()] if data.strip() else []


def report(folder: Path, *paths: Path | str, more: tuple[str, ...] = ()) -> str:
    out = folder / "out" / "report.html"
    assert main(["report", *map(str, paths), "--out", str(out), *more]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    return out.read_text(encoding="utf-8")


def texts(table: Table, title: str) -> list[str]:
    column = [name for name, _ in table.titles].index(title)
    return [row[column].text for row in table.rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("whole")
    return page(read(one_of_each(folder)))


def test_each_kind_of_file_has_its_sections(tmp_path: Path) -> None:
    accuracy = ["accuracy", "tokens"]
    kinds = {
        write_sweep(tmp_path / "results.jsonl"): ["accuracy", "comparison", "tokens"],
        write_parquet(tmp_path / "trace.parquet", evictions()): ["retention"],
        write_parquet(tmp_path / "losses.parquet", losses()): ["lost"],
        write_timing(tmp_path / "timing.json"): ["speed"],
        RECORDED / "demo.json": accuracy,
        RECORDED / "harness.json": accuracy,
        RECORDED / "on-cpu-amd-epyc.json": ["speed", "memory"],
    }
    for path, expected in kinds.items():
        found = sections(read([str(path)]))
        assert [section.name for section in found] == expected, path.name


def test_what_was_recorded_of_a_run_is_read(model: LlamaForCausalLM, tmp_path: Path) -> None:
    ids = distinct_tokens(1, 20)
    cache = CompressedCache("h2o", 8)
    recorder = Recorder(cache, shadow=True)
    with measure(model) as measured:
        model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
    recorder.trace().write(tmp_path / "run.parquet")
    measured.timing.write_json(tmp_path / "run.json")
    names = ("run.parquet", "run.losses.parquet", "run.json")
    found = read(str(tmp_path / name) for name in names)
    kinds = [source.kind for source in found.sources]
    assert kinds == ["eviction trace", "losses of attention", "timing"]
    assert [head.held for head in found.traces[0].heads] == [8] * 4
    assert found.losses[0].steps == 11
    assert found.timings[0].document["tokens_out"] == 12


def test_the_catalogue_and_the_folder_of_a_sweep_are_read_too(tmp_path: Path) -> None:
    write_sweep(tmp_path / "results.jsonl")
    inputs = read([str(tmp_path), str(RECORDED / "catalogue.json")])
    recorded = json.loads((RECORDED / "catalogue.json").read_text())["rows"]
    assert len(inputs.rows) == len(SWEEP) + len(recorded)
    assert [source.kind for source in inputs.sources] == ["sweep", "demo"]
    single = write_sweep(tmp_path / "one.jsonl", SWEEP[:1])
    assert [row.policy for row in read([str(single)]).rows] == ["full"]


def test_a_page_needs_nothing_else_and_says_so(whole: str) -> None:
    found = Page(whole)
    assert all(link.startswith(("#", "data:")) for link in found.links)
    urls = re.findall(r"url\(([^)]*)\)", whole)
    assert urls and all(url.startswith("#") for url in urls)
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    assert f'content="{policy}img-src data:"' in whole
    assert found.tags.count("script") == 1 and not {"iframe", "object", "embed"} & set(found.tags)


def test_no_identifier_is_there_twice_and_all_references_lead_somewhere(whole: str) -> None:
    found = Page(whole)
    assert len(found.ids) == len(set(found.ids))
    urls = {url.removeprefix("#") for url in re.findall(r"url\(([^)]*)\)", whole)}
    links = {link.removeprefix("#") for link in found.links if link.startswith("#")}
    assert urls | links <= set(found.ids)


def test_every_figure_says_in_words_what_it_shows(whole: str) -> None:
    found = Page(whole)
    assert found.tags.count("figure") == len(found.labels) == len(set(found.labels))
    assert any("h2o at 64: 70%" in label for label in found.labels)
    assert any(label.startswith("What layer 0, head 1 holds") for label in found.labels)


def test_figures_take_their_colours_from_the_page(whole: str) -> None:
    assert not set(re.findall(r"(?:fill|stroke): (#\w+)", whole))
    used = set(re.findall(r"var\((--c-\w+)\)", whole))
    assert len(used) > 5
    for name in used:
        assert len(re.findall(rf"{name}: #\w+;", whole)) == 2, "light and dark"


def test_names_cannot_become_part_of_the_page(tmp_path: Path) -> None:
    name = "<script>alert('$x_1$')</script>"
    rows = [row | {"model": name, "task": name, "policy": name} for row in SWEEP[3:5]]
    rows += [SWEEP[0] | {"model": name, "task": name, "versions": {name: name}}]
    html = report(
        tmp_path,
        write_sweep(tmp_path / "results.jsonl", rows),
        write_parquet(tmp_path / "losses.parquet", losses(), policy=name, model=name),
    )
    found = Page(html)
    assert found.tags.count("script") == 1
    assert found.words.count(name) >= 3
    assert any(name in label for label in found.labels)


def test_versions_and_configurations_are_all_named(whole: str) -> None:
    words = " ".join(Page(whole).words)
    for told in ("torch 9.9", "processor abacus", "threads 1", "dtype float32", "format"):
        assert (told in words) is (told != "format")


NEWER = "must have format 1, got 2. Install a newer version"
WRONG: dict[str, tuple[Any, str]] = {
    "absent": (None, "must be readable, got: No such file"),
    "a picture": (b"\x89PNG\xff\xfe", "must be a sweep's folder .* got neither text nor Parquet"),
    "words": ("hello", r"must be a sweep's folder .* got no JSON"),
    "other JSON": ({"a": 1}, "must be a sweep's folder .* got JSON with 'a'"),
    "a list": ([1], "must be a sweep's folder .* got JSON of type list"),
    "a newer sweep": (SWEEP[0] | {"format": 2}, "line 1: format must be 1, got 2. A newer"),
    "a newer timing": (TIMING | {"format": 2}, NEWER),
    "half a sweep": (
        json.dumps(SWEEP[0]) + "\n" + json.dumps(SWEEP[1])[:50],
        "line 2: must be a JSON object, got half of one",
    ),
    "a sweep without accuracy": (
        {key: value for key, value in SWEEP[0].items() if key != "accuracy_low"},
        "line 1: must have the fields of a row, differs in {'accuracy_low'}",
    ),
    "a demo without numbers": (
        {"versions": {}, "machine": {}, "problems": {"steps": 2}, "rows": [{"policy": "h2o"}]},
        "must be complete, got one that lacks or misplaces 'budget'",
    ),
    "a benchmark without ratios": (
        {
            "hardware": "abacus",
            "device": "cpu",
            "tables": {"budget": {"conditions": {"versions": {}}, "rows": {"a": {"model": "m"}}}},
        },
        "must be complete, got one that lacks or misplaces .*ms_per_token",
    ),
    "half a Parquet file": (b"PAR1abc", "must be a whole Parquet file"),
}


@pytest.mark.parametrize("content, message", WRONG.values(), ids=list(WRONG))
def test_what_cannot_be_read_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, message: str
) -> None:
    path, good = tmp_path / "given", write_sweep(tmp_path / "good.jsonl")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    out = tmp_path / "report.html"
    out.write_text("of before")
    assert main(["report", str(good), str(path), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(str(path)) and error.count("\n") == 1
    assert re.search(message, error), error
    assert out.read_text() == "of before"
    left = {"given", "good.jsonl", "report.html"} - ({"given"} if content is None else set())
    assert {each.name for each in tmp_path.iterdir()} == left


def test_parquet_of_something_else_newer_or_empty_is_refused(tmp_path: Path) -> None:
    empty = {name: column[:0] for name, column in evictions().items()}
    for columns, about, message in (
        ({"a": np.arange(3)}, {}, "must be a sweep's folder .* got Parquet with 'a'"),
        (evictions(), {"format": "2"}, NEWER),
        (losses(), {"format": "2"}, NEWER),
        (empty, {}, "must hold the trace of at least one token, got none"),
    ):
        path = write_parquet(tmp_path / "given.parquet", columns, **about)
        with pytest.raises(ValueError, match=message):
            read([str(path)])


def test_losses_of_a_trace_without_a_shadow_cache_are_no_section(tmp_path: Path) -> None:
    none = write_parquet(
        tmp_path / "losses.parquet", {name: each[:0] for name, each in losses().items()}
    )
    assert Page(report(tmp_path, none)).sections == ["sources"]


def test_a_sweep_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="got no JSON"):
        read([str(path)])
    path.write_text("")
    with pytest.raises(ValueError, match="must hold at least one finished row, got none"):
        read([str(tmp_path)])
    path.unlink()
    with pytest.raises(ValueError, match=r"no results at .*: name a sweep's folder"):
        read([str(tmp_path)])


def test_a_page_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timing = str(write_timing(tmp_path / "timing.json"))
    assert main(["report", timing, "--out", timing + "/report.html"]) == 1
    assert main(["report", timing, "--out", str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"--out {timing}/report.html: ")
    assert second == f"--out must name a file, got the folder {tmp_path}"


@pytest.mark.slow
def test_without_a_package_the_extra_is_named() -> None:
    program = (
        "import sys; sys.modules['jinja2'] = None\n"
        "from compressed_cache.__main__ import main; sys.exit(main(['report', 'tests']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"{missing('jinja2', 'report')}\n"


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_timing(tmp_path / folder / "timing.json")
    paths = [str(tmp_path / folder / "timing.json") for folder in ("a", "b", "a")]
    assert [source.name for source in read(paths).sources] == ["a/timing.json", "b/timing.json"]


def test_lines_of_accuracy_hold_the_numbers_of_the_rows() -> None:
    document = json.loads((RECORDED / "harness.json").read_text())
    for group in groups(of_harness(document, "harness.json")):
        for lines in figures.panels(series(group)):
            axes = figures.accuracy(lines).axes[0]
            drawn = {line.get_label(): line for line in axes.get_lines()}
            for name, rows in lines.items():
                found = np.asarray(drawn[name].get_xydata())
                if name == "full":
                    assert set(found[:, 1]) == {rows[0].accuracy}
                    continue
                expected = [(row.budget, row.accuracy) for row in rows]
                np.testing.assert_array_equal(found, expected)
            bars = {
                tuple(np.asarray(line.get_xydata()).ravel())
                for line in axes.get_lines()
                if str(line.get_label()).startswith("_")
            }
            expected = {
                (row.budget, row.accuracy_low, row.budget, row.accuracy_high)
                for rows in lines.values()
                for row in rows
                if not row.is_full
            }
            assert bars == expected


def test_lines_of_tokens_are_means_of_seeds(tmp_path: Path) -> None:
    rows = [result("h2o", 64, solved, seed=seed) for seed, solved in enumerate(("1111", "1100"))]
    found = read([str(write_sweep(tmp_path / "results.jsonl", rows))]).rows
    (line,) = figures.tokens(series(found)).axes[0].get_lines()
    assert np.asarray(line.get_xydata()).tolist() == [[64, 107.0]]


def test_rows_are_named_by_the_options_that_tell_them_apart(tmp_path: Path) -> None:
    options = {"protect_prompt": False, "recent": 4}
    rows = [
        result("h2o", 64, "10", options=options),
        result("h2o", 64, "11", options=options | {"recent": 8}),
        result("knorm", 64, "11", options=options),
    ]
    found = read([str(write_sweep(tmp_path / "results.jsonl", rows))]).rows
    assert list(series(found)) == ["h2o (recent=4)", "h2o (recent=8)", "knorm"]


def test_a_policy_is_one_line_as_it_was_asked_for(tmp_path: Path) -> None:
    def rows(given: dict[str, int] | None, **options: int | None) -> list[dict[str, Any]]:
        # Where nothing is asked for, recent is half a budget.
        return [
            result("h2o", budget, "10", options={"recent": budget // 2} | options, given=given)
            for budget in (64, 128)
        ]

    def lines(*rows: list[dict[str, Any]]) -> dict[str, list[int | None]]:
        found = read([str(write_sweep(tmp_path / "results.jsonl", [*chain(*rows)]))]).rows
        return {name: [row.budget for row in own] for name, own in series(found).items()}

    assert lines(rows({})) == {"h2o": [64, 128]}
    # A file of before this was kept.
    assert lines(rows(None)) == {"h2o": [64, 128]}
    # At one budget it is the default.
    asked = rows({"recent": 32}, recent=32)
    assert lines(rows({}), asked) == {
        "h2o": [64, 128],
        "h2o (recent=32)": [64, 128],
    }


@pytest.mark.parametrize("given", [{}, None])
def test_seeds_of_a_policy_that_draws_are_one_line_and_one_comparison(
    given: dict[str, int] | None, tmp_path: Path
) -> None:
    rows = [result("full", None, "11", seed=seed) for seed in (0, 1)]
    rows += [
        result("random", budget, "10", seed=seed, options={"seed": seed}, given=given)
        for seed in (0, 1)
        for budget in (64, 128)
    ]
    inputs = read([str(write_sweep(tmp_path / "results.jsonl", rows))])
    assert list(series(inputs.rows)) == ["full", "random"]
    (table,) = comparison(inputs.results)[0].tables
    assert texts(table, "budget") == ["64", "128"]
    assert texts(table, "seeds") == ["2", "2"]


def test_a_policy_has_the_same_colour_in_every_figure_of_a_page() -> None:
    def looks(lines: dict[str, Curve]) -> list[dict[str, tuple[str, str]]]:
        drawn = [figures.curves(part, x="x", y="y").axes[0] for part in figures.panels(lines)]
        return [
            {str(one.get_label()): (to_hex(one.get_color()), str(one.get_marker())) for one in own}
            for own in (axes.get_lines() for axes in drawn)
        ]

    names = ["full", *(f"policy {number}" for number in range(7)), "random"]
    with figures.same_looks():
        first = looks({name: Curve([1, 2], [3, 4]) for name in names})
        again = looks({name: Curve([1, 2], [3, 4]) for name in [*reversed(names), "another"]})
    assert sorted(map(len, first)) == [2 + 3, 2 + 4]
    known = {name: look for part in first for name, look in part.items()}
    for part in again:
        assert len({colour for colour, _ in part.values()}) == len(part)
        assert all(known.get(name, look) == look for name, look in part.items())
    assert {name for part in again for name in part} == {*names, "another"}


def test_each_line_is_in_one_figure_and_what_they_are_compared_with_in_all() -> None:
    lines = {name: [name] for name in ("full", *map(str, range(15)), "random")}
    parts = figures.panels(lines)
    assert [name for part in parts for name in part if name not in figures.BESIDE] == [
        str(number) for number in range(15)
    ]
    for part in parts:
        assert {"full", "random"} < set(part) and len(part) <= 2 + figures.MOST
    assert figures.panels({"full": []}) == [{"full": []}]


def test_lines_of_a_figure_differ_in_colour_and_in_marker() -> None:
    names = ["full", "random", *map(str, range(figures.MOST))]
    lines = {name: Curve([1, 2], [3, 4]) for name in names}
    drawn = figures.curves(lines, x="x", y="y").axes[0].get_lines()
    for looks in (
        [to_hex(line.get_color()) for line in drawn],
        [str(line.get_marker()) for line in drawn],
    ):
        assert len(set(looks)) == len(names)


def test_rows_below_random_are_marked_and_stay(tmp_path: Path) -> None:
    path = write_sweep(tmp_path / "results.jsonl")
    (group,) = groups(read([str(path)]).rows)
    (table,) = quality.accuracy(group).tables
    assert [row[0].mark for row in table.rows] == [None] * 5 + ["below random"] * 2
    assert texts(table, "to random, points")[3:] == ["+30.0", "+20.0", "-20.0", "-10.0"]
    assert {cell.key for row in table.rows[:3] for cell in row if cell.text == MISSING} == {""}


def test_only_random_at_the_same_setting_counts() -> None:
    document = json.loads((RECORDED / "harness.json").read_text())
    rows = of_harness(document, "harness.json")
    for row in rows:
        others = [
            other["accuracy"]
            for other in document["rows"]
            if other["policy"] == "random"
            and (other["task"], other["budget"]) == (row.task, row.budget)
        ]
        (group,) = [group for group in groups(rows) if row in group]
        expected = row.accuracy - others[0] if others and row.policy != "random" else None
        assert to_random(row, group) == expected


def test_policies_are_compared_on_the_documents_they_share(tmp_path: Path) -> None:
    protected = {"protect_prompt": True, "recent": 4}
    rows = [*SWEEP, result("h2o", 64, "0" * 10, options=protected)]
    inputs = read([str(write_sweep(tmp_path / "results.jsonl", rows))])
    (part,) = comparison(inputs.results)
    (table,) = part.tables
    names = ("policy", "budget", "against", "difference, points", "only this", "only the other")
    found = list(zip(*(texts(table, name) for name in names), strict=True))
    assert found == [
        ("random", "64", "full", "-50.0", "0", "5"),
        ("random", "128", "full", "-30.0", "0", "3"),
        ("h2o", "64", "full", "-20.0", "0", "2"),
        ("h2o", "128", "full", "-10.0", "0", "1"),
        ("h2o", "64", "random", "+30.0", "3", "0"),
        ("h2o", "128", "random", "+20.0", "2", "0"),
        ("knorm", "64", "full", "-70.0", "0", "7"),
        ("knorm", "128", "full", "-40.0", "0", "4"),
        ("knorm", "64", "random", "-20.0", "0", "2"),
        ("knorm", "128", "random", "-10.0", "0", "1"),
        # With a protected prompt random did not run.
        ("h2o", "64", "full", "-90.0", "0", "9"),
    ]
    assert texts(table, "p")[2] == f"{binomtest(0, 2).pvalue:.2g}"
    assert part.text == ""


def test_settings_of_a_policy_are_compared_apart(tmp_path: Path) -> None:
    options = {"protect_prompt": False, "recent": 16}
    rows = [
        *SWEEP[:4:3],
        result("h2o", 64, "1" * 10, options=options, setting="h2o:recent=16"),
        result("random", 64, "0" * 10, options=options, setting="random:recent=16"),
    ]
    inputs = read([str(write_sweep(tmp_path / "results.jsonl", rows))])
    (table,) = comparison(inputs.results)[0].tables
    found = zip(*(texts(table, name) for name in ("policy", "against", "only this")), strict=True)
    assert list(found) == [
        ("h2o", "full", "0"),
        ("h2o", "random:recent=16", "7"),
        ("h2o:recent=16", "full", "1"),
        ("h2o:recent=16", "random:recent=16", "10"),
        ("random:recent=16", "full", "0"),
    ]


def test_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    rows = [SWEEP[0], result("h2o", 64, "1", correct={"not among them": 1.0})]
    inputs = read([str(write_sweep(tmp_path / "results.jsonl", rows))])
    (part,) = comparison(inputs.results)
    assert part.tables == []
    assert "Not compared: sums, budget 64: the rows must have documents in common" in part.text
    assert comparison([]) == comparison(inputs.results[:1]) == []


def test_protected_prompts_have_figures_of_their_own() -> None:
    lines = series(read([str(RECORDED / "demo.json")]).rows)
    for kept in (False, True):
        own = with_prompt(lines, kept=kept)
        assert {row.protect_prompt for row in own["h2o"]} == {kept}
        assert len(own["full"]) == 1


def bench() -> Bench:
    return Bench.of(json.loads((RECORDED / "on-cpu-amd-epyc.json").read_text()), "on-cpu.json")


def pictured(pictures: list[Picture]) -> dict[str, list[list[float]]]:
    found = {}
    for picture in pictures:
        for line in picture.figure.axes[0].get_lines():
            found[str(line.get_label())] = np.asarray(line.get_xydata()).tolist()
    return found


@pytest.mark.parametrize(
    "table, title, name, x, y",
    [
        ("tokens seen", "Latency against tokens seen", "contender", "prompt", "ms_per_token"),
        ("budget", "Latency against budget", "contender", "budget", "ms_per_token"),
        ("chunks", "Prompts in chunks", "cache", "tokens", "peak_mib"),
        ("prefill", "Prompts at once", "cache", "tokens", "peak_mib"),
    ],
)
def test_lines_of_benchmarks_hold_their_numbers(
    table: str, title: str, name: str, x: str, y: str
) -> None:
    parts = [*costs.speed(bench()), *costs.memory(bench())]
    (part,) = [part for part in parts if part.title.startswith(title)]
    rows = bench().rows(table)
    expected = {
        key: sorted([row[x], row[y]] for row in rows if row[name] == key)
        for key in {row[name] for row in rows}
    }
    assert pictured(part.pictures) == expected
    assert len(part.tables[0].rows) == len(rows)


def test_the_speed_of_every_policy_is_a_table_of_its_own() -> None:
    rows = bench().tables["decode"]
    found = costs.speed(Bench("on-cpu.json", "abacus", "cpu", {"policies": rows}))
    (part,) = found
    assert part.title.startswith("Decoding under every policy")
    assert len(part.tables[0].rows) == len(rows["rows"])


def test_memory_against_batch_is_that_of_a_row_times_the_rows_that_fit() -> None:
    part = next(costs.memory(bench()))
    lines = pictured(part.pictures)
    for row in bench().rows("capacity"):
        for batch, mib in lines[row["cache"]]:
            assert mib == batch * row["row_bytes"] / 2**20
        last = lines[row["cache"]][-1][0]
        assert last <= row["largest_batch"] and (last == 8192 or 2 * last > row["largest_batch"])


def test_steps_of_a_timing_are_medians_of_as_many_as_it_takes(tmp_path: Path) -> None:
    steps = [0.001 * (i % 3) for i in range(300)]
    inputs = read([str(write_timing(tmp_path / "timing.json", step_s=steps))])
    (part,) = costs.timings(inputs.timings)
    (line,) = pictured(part.pictures).values()
    assert line == [[1 + 3 * i, 1.0] for i in range(100)]
    assert texts(part.tables[0], "cache MiB") == ["1.00"]
    assert "peak reserved MiB" not in [title for title, _ in part.tables[0].titles]
    inputs = read([str(write_timing(tmp_path / "timing.json", step_s=[]))])
    assert costs.timings(inputs.timings)[0].pictures == []
    drafts = {"acceptance_rate": 0.5, "tokens": 9}
    inputs = read([str(write_timing(tmp_path / "timing.json", step_s=[], drafts=drafts))])
    (drafted,) = costs.timings(inputs.timings)[0].tables
    assert ("drafts accepted %", True) in drafted.titles
    assert [cell.text for cell in drafted.rows[0]][-1] == "50.0"


def test_pixels_of_a_head_are_what_it_held(tmp_path: Path) -> None:
    columns = evictions()
    trace = read([str(write_parquet(tmp_path / "trace.parquet", columns))], layers=[1]).traces[0]
    assert [(head.layer, head.head) for head in trace.heads] == [(1, 0), (1, 1)]
    assert (trace.steps, trace.positions, trace.prompt) == (STEPS, PROMPT + STEPS, PROMPT)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for head in trace.heads:
        own = [row for row in rows if (row["layer"], row["head"]) == (1, head.head)]
        share = head.share(steps=trace.steps, positions=trace.positions)
        assert share.shape == (STEPS + 1, PROMPT + STEPS)
        for step in range(STEPS + 1):
            for row in own:
                pixel = share[step, row["position"]]
                if row["inserted"] > step:
                    assert np.isnan(pixel)
                else:
                    assert pixel == (row["evicted"] < 0 or step < row["evicted"])
        gone = [row for row in own if row["evicted"] >= 0]
        assert gone and head.held == len(own) - len(gone)
        assert head.missed == 0.5 * len(gone)
        assert head.lifetime == np.mean([row["evicted"] - row["inserted"] for row in gone])
        figure = figures.retention(
            share, steps=trace.steps, positions=trace.positions, prompt=trace.prompt
        )
        pixels = np.asarray(figure.axes[0].get_images()[0].get_array())
        np.testing.assert_array_equal(pixels[..., 3] == 0, np.isnan(share))
        assert (pixels[..., 3] == 1).sum() == (share == 1).sum() > 0


def test_a_long_text_is_drawn_small() -> None:
    length, steps = 5 * POSITIONS, 4000
    position = np.arange(length)
    head = Head(
        layer=0,
        head=0,
        position=position,
        inserted=np.zeros(length),
        evicted=np.where(position % 2, -1, 0),
        attention=np.full(length, np.nan),
    )
    share = head.share(steps=steps, positions=length)
    assert share.shape == (240, POSITIONS)
    assert set(np.unique(share)) == {0.4, 0.6}
    assert head.missed is None and head.lifetime == 0


def test_first_middle_and_last_layer_are_drawn_unless_others_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_parquet(tmp_path / "trace.parquet", evictions(layers=5))
    (trace,) = read([str(path)]).traces
    assert [head.layer for head in trace.heads] == [0, 0, 2, 2, 4, 4]
    html = report(tmp_path, path, more=("--layers", "1,3"))
    assert "Layers 1, 3 of 5." in html and "layer 1, head 1" in html and "layer 2" not in html
    assert main(["report", str(path), "--layers", "9", "--out", str(tmp_path / "r.html")]) == 2
    assert capsys.readouterr().err == (
        f"--layers must be among those of {path}, [0, 1, 2, 3, 4], got [9]\n"
    )


def test_losses_are_means_over_heads_and_add_up_over_steps(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "losses.parquet", losses())
    inputs = read([str(path)])
    expected = np.array(
        [[(step + 0.5) / 20 / (layer + 1) for step in range(1, STEPS + 1)] for layer in range(4)]
    )
    np.testing.assert_allclose(inputs.losses[0].lost, expected, rtol=1e-6)
    (part,) = attention.lost(inputs.losses)
    summed, by_layer = part.pictures
    (line,) = pictured([summed]).values()
    steps = range(1, STEPS + 1)
    np.testing.assert_allclose(line, np.column_stack([steps, expected.mean(0).cumsum()]))
    image = by_layer.figure.axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(np.asarray(image), expected, rtol=1e-6)
    means = [float(text) for text in texts(part.tables[0], "mean lost %")]
    np.testing.assert_allclose(means, 100 * expected.mean(axis=1), atol=0.0051)  # two digits


def test_many_steps_share_columns_of_a_map() -> None:
    lost = np.arange(2.0 * 3 * POSITIONS).reshape(2, -1)
    shown = Losses("x", {}, lost).shown
    np.testing.assert_allclose(shown, lost.reshape(2, POSITIONS, 3).mean(axis=2))
