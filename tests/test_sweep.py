"""Sweeps: the plan, the folder, and what is refused before anything runs."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from compressed_cache.__main__ import main
from compressed_cache.eval.options import parse
from compressed_cache.eval.results.row import FILE, Result, append, from_json, read
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.tasks import metrics
from tests.results import make_agreement, make_result, typed

pytest.importorskip("lm_eval")
from compressed_cache.eval.sweep import accuracy, command, estimate, loaded, prompts, tasks
from compressed_cache.eval.sweep.cell import take
from compressed_cache.eval.sweep.folder import RESULT, Folder, write_error
from compressed_cache.eval.sweep.group import Finished, Group
from compressed_cache.eval.sweep.plan import Cell, Plan
from compressed_cache.wording import missing

EASY = "reasoning_shipped_easy"
PLAN = Plan(model="shipped", tasks=[EASY], policies=["full", "h2o"], budgets=[64, 80], seeds=2)


def arguments(out: Path, **changes: str | None) -> list[str]:
    """A small sweep as typed; None leaves an option out."""
    options: dict[str, str | None] = {
        "model": "shipped",
        "tasks": EASY,
        "policies": "full,h2o",
        "budgets": "64,80",
        "limit": "2",
        "gen-kwargs": "max_gen_toks=30",
        "out": str(out),
    }
    return typed("sweep", options, **changes)


def row_of(cell: Cell, **changes: Any) -> Result:
    return make_result(
        task=cell.task, policy=cell.policy, budget=cell.budget, seed=cell.seed, **changes
    )


def finish(folder: Folder, cell: Cell, result: Result | None = None) -> None:
    """Publishes a cell, with an error unless there is a result."""
    partial = folder.begin(cell)
    if result is None:
        write_error(partial, "OSError: no")
    else:
        (partial / RESULT).write_text(result.to_json() + "\n")
    folder.publish(cell, partial)


def test_full_runs_once_per_task_and_seed_and_all_cells_have_names_of_their_own() -> None:
    plan = replace(PLAN, tasks=["a", "b"], policies=["full", "snapkv/h2o+caote", "snapkv"])
    cells = plan.cells()
    assert len(cells) == 2 * 2 * (1 + 2 * 2)
    assert {cell.budget for cell in cells if cell.policy == "full"} == {None}
    names = [cell.name for cell in cells]
    assert names[:2] == ["a.full.0", "a.snapkv-h2o+caote.64.0"]
    assert len(set(names)) == len(names)
    assert not any("/" in name for name in names)


def test_the_seed_of_a_cell_is_that_of_a_policy_which_draws() -> None:
    plan = replace(PLAN, policies=["random", "h2o"], budgets=[64])
    assert [dict(cell.options) for cell in plan.cells()] == [{"seed": 0}, {}, {"seed": 1}, {}]
    assert plan.repeating() == ["h2o"]
    given = replace(plan, options={"random": {"seed": 7}})
    assert [dict(cell.options) for cell in given.cells()] == [{"seed": 7}, {}] * 2
    assert given.repeating() == ["random", "h2o"]
    assert replace(plan, gen_kwargs={"do_sample": True}).repeating() == []


def test_options_are_for_all_but_full_or_for_one() -> None:
    plan = replace(PLAN, seeds=1, policies=["full", "h2o", "snapkv"], budgets=[64])
    plan = replace(plan, options={"": {"interval": 8}, "snapkv": {"interval": 4, "window": 9}})
    assert [dict(cell.options) for cell in plan.cells()] == [
        {},
        {"interval": 8},
        {"interval": 4, "window": 9},
    ]


def settings_of(*typed: str) -> list[str]:
    """The settings of a plan in the words of a command line."""
    options, _ = parse([*arguments(Path("out")), *typed])
    asked, problems = command._plan(options)
    assert not problems
    return asked.policies


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("h2o,h2o:recent=16,interval=8,full", ["h2o", "h2o:interval=8,recent=16", "full"]),
        ("h2o:recent=16, h2o:recent=16,", ["h2o:recent=16"]),
        ("h2o:", ["h2o"]),
        ("H2O:recent=16,SnapKVPress", ["h2o:recent=16", "snapkv"]),
    ],
)
def test_a_policy_may_have_several_settings(typed: str, found: list[str]) -> None:
    assert settings_of("--policies", typed) == found


@pytest.mark.parametrize(
    "policies", ["recent=16", "h2o:recent", "h2o:recent=", "h2o:recent=8,x:=3", ":recent=8"]
)
def test_half_a_setting_is_refused(policies: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments(Path("out"), policies=policies))
    assert f"POLICY:OPTION=VALUE,OPTION=VALUE, got {policies!r}" in capsys.readouterr().err


def test_settings_are_cells_and_rows_of_their_own() -> None:
    shared: dict[str, dict[str, Any]] = {"": {"interval": 8}, "h2o": {"sinks": 2}}
    settings = ["full", "h2o", "h2o:interval=4,recent=16", "qfilter:filters=a/b"]
    plan = replace(PLAN, seeds=1, budgets=[64], policies=settings, options=shared)
    cells = plan.cells()
    assert [cell.policy for cell in cells] == ["full", "h2o", "h2o", "qfilter"]
    assert [dict(cell.options) for cell in cells] == [
        {},
        {"interval": 8, "sinks": 2},
        {"interval": 4, "sinks": 2, "recent": 16},
        {"interval": 8, "filters": "a/b"},
    ]
    assert [cell.name for cell in cells] == [
        f"{EASY}.full.0",
        f"{EASY}.h2o.64.0",
        f"{EASY}.h2o,interval=4,recent=16.64.0",
        f"{EASY}.qfilter,filters=a%2Fb.64.0",
    ]


@pytest.mark.parametrize(
    ("grid", "found"),
    [
        (
            ["recent=8,16"],
            ["full", "h2o:recent=8", "h2o:recent=16", "tova:recent=8", "tova:recent=16"],
        ),
        (["h2o:recent=8,16"], ["full", "h2o:recent=8", "h2o:recent=16", "tova"]),
        (
            ["h2o:recent=8,16", "H2O:interval=1,2"],
            [
                "full",
                "h2o:interval=1,recent=8",
                "h2o:interval=2,recent=8",
                "h2o:interval=1,recent=16",
                "h2o:interval=2,recent=16",
                "tova",
            ],
        ),
    ],
)
def test_a_grid_is_a_setting_for_each_combination(grid: list[str], found: list[str]) -> None:
    typed = [f"--grid={one}" for one in grid]
    assert settings_of("--policies=full,h2o,tova", *typed) == found


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["reasoning_shipped"], [EASY, "reasoning_shipped_long"]),
        ([EASY, "reasoning_shipped", EASY], [EASY, "reasoning_shipped_long"]),
        (["reasoning_reading"], ["reasoning_drop", "reasoning_reclor"]),
    ],
)
def test_groups_and_tags_are_taken_apart(names: list[str], found: list[str]) -> None:
    assert tasks.expanded(names) == (found, [])
    assert len(tasks.expanded(["reasoning"])[0]) == 11


# As those of lm_eval, but for the rows.
OTHERS = {
    "sums": {
        "task": "sums",
        "dataset_path": "json",
        "test_split": "train",
        "fewshot_split": "train",
        "num_fewshot": 1,
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "gen_prefix": "plus",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 20, "do_sample": False},
        "filter_list": [
            {"name": "strict", "filter": [{"function": "take_first"}]},
            {"name": "loose", "filter": [{"function": "take_first"}]},
        ],
        "metric_list": [{"metric": "exact_match"}],
    },
    "choices": {
        "task": "choices",
        "dataset_path": "json",
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": 0,
        "doc_to_choice": ["a", "b"],
    },
    "both": {"group": "both", "task": ["sums", "choices"]},
    "changed": {"group": "changed", "task": [{"task": "sums", "num_fewshot": 0}]},
}


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for the folder of tasks of lm_eval."""
    folder = tmp_path / "harness"
    folder.mkdir()
    rows = [{"question": "oil 9p tax 1", "answer": "10"}, {"question": "tin 3p", "answer": "3"}]
    (folder / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    for name, config in OTHERS.items():
        more = {"dataset_kwargs": {"data_files": str(folder / "rows.json")}}
        text = yaml.safe_dump(config | more if "dataset_path" in config else config)
        (folder / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(tasks, "HARNESS", folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("harness")
def test_tasks_of_the_harness_are_taken_too() -> None:
    assert tasks.expanded(["both", EASY]) == (["sums", "choices", EASY], [])
    found, problems = tasks.sizes(replace(PLAN, tasks=["sums", "choices"], limit=1))
    assert found == {"sums": tasks.Size(1, 20)}
    assert problems == [
        "choices must have the model write something, but has multiple_choice: nothing is decoded "
        "in it, so that policies change nothing"
    ]
    assert tasks.expanded(["changed"]) == (
        [],
        ["--tasks: changed changes what is its members'. Name single tasks instead"],
    )
    (problem,) = tasks.expanded(["summs"])[1]
    assert problem.startswith("--tasks: unknown task 'summs', expected one of lm_eval's or of ")
    assert problem.endswith("Did you mean 'sums'?")


def test_groups_and_tags_of_lm_eval_are_found_in_its_folders() -> None:
    ruler, problems = tasks.expanded(["ruler"])
    assert (ruler[0], len(ruler), problems) == ("niah_single_1", 13, [])
    assert set(ruler) == set(tasks.expanded(["longcxt"])[0])
    longbench, problems = tasks.expanded(["longbench", "gsm8k"])
    assert "longbench_2wikimqa" in longbench and longbench[-1] == "gsm8k" and not problems
    (problem,) = tasks.expanded(["niah_singel_1"])[1]
    assert problem.endswith("Did you mean 'niah_single_1'?")


@pytest.mark.slow
@pytest.mark.usefixtures("harness")
def test_a_task_of_the_harness_is_scored_by_its_first_metric_and_filter(tmp_path: Path) -> None:
    plan = replace(PLAN, tasks=["sums"], policies=["h2o"], budgets=[24], seeds=1)
    folder = tmp_path / "cell"
    folder.mkdir()
    assert take(plan, Group(tuple(plan.cells())), [folder]), (folder / "log.txt").read_text()
    row = from_json((folder / RESULT).read_text())
    assert isinstance(row, Result)
    assert (row.task, row.metric, row.documents) == ("sums", "exact_match,strict", 2)
    assert (row.accuracy, set(row.correct.values())) == (0.0, {0.0})
    assert row.accuracy_low == 0 < row.accuracy_high < 1
    assert 0 < row.tokens <= 20 and row.held_tokens <= 24
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    # What is written with agreement goes on from the same prompts, with examples and prefix.
    (found,) = {sample["arguments"][0][0] for sample in samples if sample["doc_id"] == 0}
    texts = list(prompts.load(plan, "sums", loaded.model(plan)).ids.values())
    assert loaded.model(plan).tok_decode(texts[0]).split()[-4:] == found.split()[-4:]
    assert found.count("tax") + found.count("tin") > 1 and found.endswith("plus")


def sample(document: int, filter_: str = "none", **metrics: Any) -> dict[str, Any]:
    found = {"doc_id": document, "doc_hash": "abcdefghij", "filter": filter_}
    return found | {"metrics": list(metrics)} | metrics


def test_a_score_is_a_share_of_every_document() -> None:
    samples = [
        sample(0, errors=0.0, length=70, exact=True),
        sample(1, errors=1.0, length=1, exact=0),
    ]
    samples += [sample(0, "loose", exact=1.0), sample(1, "loose", exact=1.0)]
    metric, found = accuracy.scores(samples, {"errors": False, "length": True, "exact": True})
    assert (metric, found) == ("exact,none", {"0-abcdefgh": 1.0, "1-abcdefgh": 0.0})
    with pytest.raises(ValueError, match=r"must have a metric that is a share .* has 'bleu', 'f1'"):
        accuracy.scores([sample(0, bleu=[1, 2], f1=37.5)], {})


def test_a_single_share_has_every_interval() -> None:
    assert (metrics.low([0.4]), metrics.high([0.4])) == (0, 1)


def test_the_size_of_a_task_counts_its_limit_and_repeats() -> None:
    assert tasks.sizes(PLAN) == ({EASY: tasks.Size(100, 100 * 400)}, [])
    changed = replace(PLAN, limit=3, gen_kwargs={"max_gen_toks": 7}, metadata={"repeats": 2})
    assert tasks.sizes(changed) == ({EASY: tasks.Size(3, 3 * 2 * 7)}, [])


WRONG: dict[str, tuple[dict[str, str | None], list[str]]] = {
    "many names at once": (
        {"tasks": f"reasoning_gsm8,{EASY}", "policies": "h2o,snapvk,full"},
        [
            r"--tasks: unknown task 'reasoning_gsm8', .* Did you mean 'reasoning_gsm8k'",
            r"--policies: unknown policy 'snapvk', .* Did you mean 'snapkv'",
        ],
    ),
    "options and budgets at once": (
        {"policies": "h2o,snapkv", "policy_args": "windw=4", "budgets": "4"},
        [r"h2o at 4: unknown option 'windw'", r"snapkv at 4: .*'windw'.* Did you mean 'window'"],
    ),
    "budgets too small": (
        {"policies": "h2o,tova", "policy_args": "sinks=70", "budgets": "64,80"},
        [r"h2o at 64: budget must be at least .* got 64", r"tova at 64: budget must be"],
    ),
    "a policy that is not swept": (
        {"policy_args": "tova:sinks=1"},
        [r"--policy-args: 'tova' not among --policies 'full', 'h2o'"],
    ),
    "an option that a setting does not have": (
        {"policies": "h2o,h2o:windw=4", "budgets": "64"},
        [r"^h2o:windw=4 at 64: unknown option 'windw'"],
    ),
    "a grid of nobody": ({"grid": "tova:recent=8"}, [r"--grid: 'tova' not among --policies"]),
    "no grid": ({"grid": "recent"}, [r"--grid must be OPTION=VALUE,VALUE,\.\.\., got 'recent'"]),
    "a grid of what is fixed": (
        {"policies": "h2o:recent=8", "grid": "recent=8,16"},
        [r"--grid: 'h2o:recent=8' must be given recent once, got it twice"],
    ),
    "no budgets": ({"budgets": None}, [r"--budgets must be given"]),
    "no model": ({"model": "/nowhere/at/all"}, [r"--model /nowhere/at/all: "]),
    "no data": (
        {"tasks": "reasoning_gsm8k", "metadata": '{"data_dir": "/nowhere"}'},
        [r"--tasks: reasoning_gsm8k: no local rows at /nowhere/gsm8k.jsonl"],
    ),
    "no JSON": ({"metadata": "{"}, [r"--metadata must be a JSON object, got '\{'"]),
    "no pair": ({"gen_kwargs": "sample"}, [r"--gen-kwargs must be NAME=VALUE .* got 'sample'"]),
    "arguments of its own": (
        {"model_args": "kv_budget=3,max_length=9"},
        [r"--model-args must not have kv_budget"],
    ),
    "no seeds": ({"seeds": "0"}, [r"--seeds must be >= 1, got 0"]),
    "no limit": ({"limit": "-1"}, [r"--limit must be >= 1, got -1"]),
    "all options at once": (
        {
            "batch_size": "0",
            "seeds": "0",
            "limit": "-1",
            "gpus_per_cell": "0.5",
            "metadata": "{",
            "gen_kwargs": "sample",
            "model_args": "kv_budget=3",
            "policy_args": "windw=4",
            "policies": "h2o,snapvk",
            "budgets": "64",
            "tasks": "none_such",
            "model": "/nowhere",
        },
        [
            r"^--seeds must be >= 1, got 0$",
            r"^--limit must be >= 1, got -1$",
            r"^--batch-size must be >= 1, got 0$",
            r"^--gpus-per-cell must come with --ray$",
            r"^--gen-kwargs must be NAME=VALUE",
            r"^--model-args must not have kv_budget",
            r"^--metadata must be a JSON object",
            r"^--tasks: unknown task 'none_such'",
            r"^--model /nowhere: there is no folder '/nowhere'$",
            r"^--policies: unknown policy 'snapvk'",
            r"^h2o at 64: unknown option 'windw'",
        ],
    ),
    "prompts that do not fit": (
        {
            "policies": "full,h2o,random",
            "policy_args": "protect_prompt=true",
            "budgets": "32,64",
            "seeds": "2",
        },
        [
            rf"^h2o at 32 on {EASY}: budget must be at least prompt \+ 1 .* got 32",
            rf"^random at 32 on {EASY}: budget must be at least prompt \+ 1 .* got 32",
        ],
    ),
    "a policy that reads twice": (
        {"policies": "kvzip", "budgets": "64"},
        [r"^kvzip at 64: 'kvzip' ranks a prompt by a second pass"],
    ),
    "drafts after a second pass": (
        {"policies": "kvzip:lossless=true", "budgets": "64"},
        [r"^kvzip:lossless=true at 64: 'kvzip' ranks a prompt by a second pass .* leave out"],
    ),
    "lossless that is no switch": (
        {"policies": "h2o:lossless=4", "budgets": "64"},
        [r"^h2o:lossless=4 at 64: lossless must be true or false, got 4 \(int\)$"],
    ),
    "agreement of drafts": (
        {"policies": "full,h2o:lossless=true", "budgets": "64", "measure": "agreement"},
        [r"^h2o:lossless=true: lossless says what the full cache says"],
    ),
    "a dtype that is none": (
        {"dtype": "bf16"},
        [r"^--dtype must be one of 'auto', .*, got 'bf16'\. Did you mean 'bfloat16'\?$"],
    ),
    "a dtype among the others": (
        {"model_args": "dtype=int8"},
        [r"^--dtype must be one of .*, got 'int8'$"],
    ),
    "no time": ({"minutes_per_cell": "0"}, [r"--minutes-per-cell must be > 0, got 0"]),
    "time on a cluster": (
        {"minutes_per_cell": "1", "ray": "auto"},
        [r"--minutes-per-cell must come without --ray"],
    ),
    "a share of no cluster": ({"gpus_per_cell": "0.5"}, [r"--gpus-per-cell must come with --ray"]),
}


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(("changes", "messages"), WRONG.values(), ids=WRONG.keys())
def test_all_that_is_wrong_is_said_before_anything_runs(
    changes: dict[str, str | None],
    messages: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "sweep"
    assert main(arguments(out, **changes)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert re.search(message, line), line
    assert not out.exists()


@pytest.mark.parametrize("separator", [",", " ", ", "])
def test_lists_may_have_spaces(
    separator: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets, policies = separator.join(["64", "80"]), separator.join(["full", "h2o"])
    typed = arguments(tmp_path / "sweep", budgets=budgets, policies=policies)
    assert main([*typed, "--dry-run"]) == 0
    assert f"| {EASY} | h2o | 64,80 | 1 | 2 | 0 | 0 |" in capsys.readouterr().out


def test_policies_are_planned_by_their_own_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = arguments(tmp_path, policies="Full,H2O,h2o", policy_args="H2O:recent=3")
    assert main([*typed, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"| {EASY} | full | - | 1 | 1 | 0 | 0 |" in printed
    assert f"| {EASY} | h2o | 64,80 | 1 | 2 | 0 | 0 |" in printed


def test_what_is_no_number_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments(tmp_path, budgets="128,25x"))
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(
            "argument --budgets: must be whole numbers with commas between, e.g. 128,256, got '25x'"
        )
    )


def test_a_dry_run_prints_the_plan_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(tmp_path / "sweep", seeds="3"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"| {EASY} | full | - | 3 | 3 | 0 | 0 |" in printed
    assert f"| {EASY} | h2o | 64,80 | 3 | 6 | 0 | 0 |" in printed
    assert "to do: 9 of 9 cells, 18 documents, at most 540 generated tokens" in printed
    assert "time: not known before a cell is done" in printed
    assert "seeds after the first repeat the rows of full, h2o" in printed
    assert not (tmp_path / "sweep").exists()


def test_the_estimate_goes_by_cells_of_the_task_and_else_by_tokens() -> None:
    plan = replace(PLAN, tasks=["a", "b"], policies=["h2o"], seeds=1)
    sizes = {"a": tasks.Size(10, 1000), "b": tasks.Size(5, 3000)}
    first, second, *others = plan.cells()
    outcomes: dict[str, Result | str | None] = {cell.name: None for cell in plan.cells()}
    assert estimate.seconds([second, *others], outcomes, sizes) is None
    outcomes[first.name] = row_of(first, seconds=50.0)
    assert estimate.seconds([second, *others], outcomes, sizes) == 50 + 2 * 150
    page = estimate.page(plan, [second, *others], outcomes, sizes, processes=2)
    assert "to do: 3 of 4 cells, 20 documents, at most 7,000 generated tokens" in page
    assert "about 2 min 55 s with 2 processes" in page


def test_a_folder_remembers_what_is_done(tmp_path: Path) -> None:
    folder, (first, second, third, *_) = Folder(tmp_path), PLAN.cells()
    with folder.open(PLAN):
        finish(folder, first, row_of(first))
        finish(folder, second)
        folder.begin(third)
    assert folder.outcome(first) == row_of(first)
    assert folder.outcome(second) == "OSError: no"
    assert folder.outcome(third) is None
    assert read(tmp_path) == [row_of(first)]
    with folder.open(PLAN):
        folder.forget(second)
        finish(folder, second, row_of(second))
    assert sorted(path.name for path in folder.cells.iterdir()) == [first.name, second.name]
    assert read(tmp_path) == [row_of(first), row_of(second)]


def _half(lines: list[str]) -> str:
    return lines[1] + "\n" + lines[0][:300]


MOMENTS: dict[str, Callable[[list[str]], str]] = {
    "before the row was appended": lambda lines: lines[1] + "\n",
    "while it was": _half,
    "before the end of its line": lambda lines: lines[1] + "\n" + lines[0],
    "before there were rows": lambda lines: "",
}


@pytest.mark.usefixtures("harness")
def test_a_lossless_setting_has_the_answers_of_the_full_cache(tmp_path: Path) -> None:
    plan = replace(
        PLAN,
        policies=["full", "h2o", "h2o:lossless=true"],
        budgets=[64],
        seeds=1,
        limit=1,
        gen_kwargs={"max_gen_toks": 80},
    )
    rows: list[Any] = []
    for cell in plan.cells():
        (outcome,) = accuracy.measure(plan, Group((cell,)))
        assert isinstance(outcome, Finished)
        append(tmp_path / FILE, outcome.row)
        rows.append(outcome.row)
    assert read(tmp_path / FILE) == rows
    full, alone, drafted = rows
    assert (drafted.tokens, drafted.correct) == (full.tokens, full.correct)
    assert drafted.options["lossless"] is True and drafted.setting == "h2o:lossless=true"
    assert drafted.drafts["drafted"] and drafted.drafts["tokens"] == full.tokens - 1
    assert full.drafts is None and alone.drafts is None
    assert drafted.cache_bytes == alone.cache_bytes + drafted.drafts["full_bytes"]
    # The full policy has 256 slots here.
    assert drafted.drafts["full_bytes"] >= full.cache_bytes * full.held_tokens / 257
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path / FILE), "--out", str(page)]) == 0
    assert "drafts accepted %" in page.read_text()


@pytest.mark.parametrize("left", MOMENTS.values(), ids=MOMENTS.keys())
def test_rows_are_whole_again_whenever_a_sweep_was_killed(
    left: Callable[[list[str]], str], tmp_path: Path
) -> None:
    folder, (first, second, *_) = Folder(tmp_path), PLAN.cells()
    with folder.open(PLAN):
        for cell in (second, first):
            finish(folder, cell, row_of(cell))
    path = tmp_path / FILE
    lines = [row_of(cell).to_json() for cell in (first, second)]
    path.write_text(left(lines))
    with folder.open(PLAN):
        pass
    assert sorted(path.read_text().splitlines()) == sorted(lines)
    # What was there stays in front, and nothing is written without need.
    if left(lines):
        assert path.read_text().startswith(lines[1])
    before = path.stat().st_mtime_ns
    with folder.open(PLAN):
        pass
    assert path.stat().st_mtime_ns == before


def test_a_cell_whose_folder_is_gone_is_to_do_again(tmp_path: Path) -> None:
    folder, (first, second, *_) = Folder(tmp_path), PLAN.cells()
    with folder.open(PLAN):
        for cell in (first, second):
            finish(folder, cell, row_of(cell))
    folder.forget(first)
    with folder.open(PLAN):
        assert read(tmp_path) == [row_of(second)]


def _spoil(name: str, text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(text)

    return spoil


NEWER = make_result().to_json().replace('"format": 1', '"format": 2')
CELL = f"cells/{PLAN.cells()[0].name}/{RESULT}"
SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "a plan of a newer version": (
        _spoil("sweep.json", '{"format": 2}'),
        r"sweep\.json: format must be 1, got 2\. .*: update, or use another --out",
    ),
    "no plan": (_spoil("sweep.json", "[]"), r"sweep\.json is no plan of a sweep"),
    "half a plan": (_spoil("sweep.json", '{"format": 1}'), r"sweep\.json is no plan of a sweep"),
    "rows of a newer version": (_spoil(FILE, NEWER + "\n"), r"line 1: format must be 1, got 2"),
    "rows of something else": (_spoil(FILE, "my notes"), r"results\.jsonl, line 1: .*half of one"),
    "half a result": (_spoil(CELL, NEWER[:90]), rf"{RESULT}: .*Remove .* to run this cell again"),
    "no result": (lambda folder: (folder / CELL).unlink(), r"Remove .* to run this cell again"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_files_that_are_not_its_own_are_named_and_left_alone(
    spoil: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = replace(PLAN, seeds=1, limit=2, gen_kwargs={"max_gen_toks": 30})
    folder, (first, *_) = Folder(tmp_path), plan.cells()
    with folder.open(plan):
        finish(folder, first, row_of(first))
    spoil(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
    assert main(arguments(tmp_path)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json*")} == before


def test_a_folder_of_another_plan_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Folder(tmp_path).open(replace(PLAN, seeds=1, limit=3)):
        pass
    for arguments_ in (arguments(tmp_path), [*arguments(tmp_path), "--dry-run"]):
        assert main(arguments_) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "holds another plan: " in line
        assert "limit 3 there, 2 here; gen_kwargs {} there, {'max_gen_toks': 30} here" in line
    assert json.loads((tmp_path / "sweep.json").read_text())["limit"] == 3


def test_a_folder_is_extended_by_policies_budgets_and_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = replace(PLAN, seeds=1, limit=2, gen_kwargs={"max_gen_toks": 30})
    folder = Folder(tmp_path)
    with folder.open(first):
        for cell in first.cells():
            finish(folder, cell, row_of(cell))
    rows = read(tmp_path)
    settings = ["h2o", "h2o:recent=16", "tova"]
    more = arguments(tmp_path, policies=",".join(settings), budgets="64,96", seeds="2")
    assert main([*more, "--dry-run"]) == 0
    assert "to do: 11 of 12 cells" in capsys.readouterr().out
    second = replace(first, policies=settings, budgets=[64, 96], seeds=2)
    with folder.open(second):
        assert read(tmp_path) == rows
        finish(folder, second.cells()[-1], row_of(second.cells()[-1]))
    kept = json.loads((tmp_path / "sweep.json").read_text())
    assert kept["policies"] == ["full", *settings]
    assert (kept["budgets"], kept["seeds"]) == ([64, 80, 96], 2)
    assert kept["given"]["h2o:recent=16"] == {"recent": 16}
    # What a sweep does not ask for stays, and what is gone of it is mended.
    (tmp_path / FILE).unlink()
    with folder.open(first):
        assert len(read(tmp_path)) == len(rows) + 1


def test_a_setting_means_the_same_in_all_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Folder(tmp_path).open(replace(PLAN, limit=2, gen_kwargs={"max_gen_toks": 30})):
        pass
    assert main([*arguments(tmp_path, policies="tova,h2o"), "--policy-args=sinks=2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "options of h2o {} there, {'sinks': 2} here" in line
    assert main([*arguments(tmp_path, policies="tova"), "--policy-args=sinks=2", "--dry-run"]) == 0


def test_a_folder_of_before_there_were_settings_goes_on(tmp_path: Path) -> None:
    plan = replace(PLAN, options={"": {"interval": 8}, "h2o": {"sinks": 2}})
    old = {k: v for k, v in plan.to_json().items() if k not in ("given", "measure", "prompts")}
    (tmp_path / "sweep.json").write_text(json.dumps(old | {"options": plan.options}))
    with Folder(tmp_path).open(plan):
        pass
    assert json.loads((tmp_path / "sweep.json").read_text()) == plan.to_json()
    with pytest.raises(ValueError, match="options of h2o"):
        Folder(tmp_path).check(replace(plan, options={}))


def test_two_sweeps_at_once_in_one_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Folder(tmp_path).open(PLAN):
        assert main(arguments(tmp_path)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"another sweep is at work in {tmp_path}" in line


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for dry in ([], ["--dry-run"]):
        assert main([*arguments(tmp_path / "file" / "sweep"), *dry]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"--out {tmp_path}/file/sweep: ")
        assert "Not a directory" in line


def test_a_cluster_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main([*arguments(tmp_path), "--ray=auto"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--ray auto: ")
    assert list((tmp_path / "cells").iterdir()) == []


def test_ray_is_asked_for_where_it_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*arguments(tmp_path / "sweep"), "--ray=auto"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == missing("ray", "cluster")
    assert not (tmp_path / "sweep").exists()


def test_a_cell_says_that_nothing_was_evicted_or_nothing_differed() -> None:
    cell = PLAN.cells()[0]
    warning = ", NOTHING WAS EVICTED, no prompt and text is longer than the budget of 64"
    assert command._told(cell, make_result(evicted_tokens=0.0)).endswith(warning)
    full = make_result(budget=None, evicted_tokens=0.0)
    # As of shadowkv, whose budget is what a step fetches.
    holds_all = make_result(evicted_tokens=0.0, held_tokens=80.0)
    for row in (make_result(), full, holds_all):
        assert "EVICTED" not in command._told(cell, row)
    assert ", first difference after 30 tokens, " in command._told(cell, make_agreement())
    assert ", no difference, " in command._told(cell, make_agreement(identical=1.0))


@pytest.mark.slow
def test_a_bad_cell_is_recorded_with_its_error_and_the_rest_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its prompt leaves no room, which only a look at the tokens tells.
    row = {"question": "tax 9 goods 6 fig 6p 3 " * 40, "answer": "#### 5"}
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps(row))
    typed = arguments(
        tmp_path / "sweep",
        tasks=f"reasoning_gsm8k,{EASY}",
        policies="full",
        model_args="max_length=200",
        metadata=json.dumps({"data_dir": str(tmp_path)}),
    )
    assert main(typed) == 1
    captured = capsys.readouterr()
    (found,) = read(tmp_path / "sweep")
    assert (found.task, found.model, found.documents) == (EASY, "shipped", 2)
    assert (found.tokens, found.truncated, found.evicted_tokens) == (30, 1, 0)
    assert found.tokens_per_s > 0 and found.cache_bytes > 0 and found.machine["dtype"] == "float32"
    assert found.weights == loaded.digest(AutoModelForCausalLM.from_pretrained(MODEL_PATH))
    assert "1 of 2 cells failed" in captured.err
    assert "reasoning_gsm8k.full.0: failed, ValueError: " in captured.out
    failed = tmp_path / "sweep" / "cells" / "reasoning_gsm8k.full.0"
    error = json.loads((failed / "error.json").read_text())["error"]
    assert "the prompt of document 0 has" in error
    assert "Traceback" in (failed / "log.txt").read_text()
    samples = (failed.parent / f"{EASY}.full.0" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 2 and "resps" in json.loads(samples[0])
    # A recorded error is not tried again unless asked for.
    before = failed.stat().st_mtime_ns
    assert main(typed) == 1
    assert failed.stat().st_mtime_ns == before
    capsys.readouterr()
    assert main([*typed, "--retry-failed", "--dry-run"]) == 0
    assert "to do: 1 of 2 cells" in capsys.readouterr().out
