"""The shipped model, its problems, and what the demo claims about them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressed_cache.__main__ import main
from compressed_cache.eval.demo import measure
from compressed_cache.eval.demo.measure import CORE, STEPS, Exam, Row, Setting, settings
from compressed_cache.eval.report.rows import groups, of_demo
from compressed_cache.eval.results.row import Agreement, read
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.reasoner.problems import extract_answer, make_problem, split_of

DEMO = json.loads((Path(__file__).parent.parent / "bench" / "results" / "demo.json").read_text())


def test_the_model_is_small_and_in_the_format_of_transformers() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    assert model.config.model_type == "llama"
    assert sum(parameter.numel() for parameter in model.parameters()) <= 4_000_000
    assert sum(path.stat().st_size for path in MODEL_PATH.iterdir()) <= 8_000_000


def test_traces_are_long_and_prompts_short() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    for seed in range(50):
        problem = make_problem(seed, STEPS)
        prompt, trace = (
            len(tokenizer(text, add_special_tokens=False).input_ids)
            for text in (problem.prompt, problem.trace)
        )
        assert 200 <= trace <= 1000
        assert trace >= 3 * prompt
        assert extract_answer(problem.trace) == problem.answer
        assert (
            tokenizer.unk_token_id not in tokenizer(f"{problem.prompt} {problem.trace}").input_ids
        )


def test_problems_depend_on_the_seed_alone_and_splits_are_disjoint() -> None:
    for seed in range(200):
        held_out = make_problem(seed, STEPS)
        assert held_out == make_problem(seed, STEPS)
        assert split_of(held_out.prompt) == "held_out"
        assert split_of(make_problem(seed, STEPS, split="training").prompt) == "training"


@pytest.mark.parametrize("text", ["", "answer", "the answer is 4", "step one"])
def test_a_missing_answer_is_no_answer(text: str) -> None:
    assert extract_answer(text) is None


def test_the_demo_has_every_row() -> None:
    budgets = sorted({row["budget"] for row in DEMO["rows"] if row["budget"] is not None})
    assert 2 <= len(budgets) <= 3
    wanted = {(s.policy, s.budget, s.protect_prompt) for s in settings(list(CORE), budgets)}
    found = {(r["policy"], r["budget"], r["protect_prompt"]) for r in DEMO["rows"]}
    assert found == wanted


def test_full_cache_accuracy_is_at_least_95_percent() -> None:
    (full,) = [row for row in DEMO["rows"] if row["policy"] == "full"]
    assert full["accuracy"] >= 0.95


@pytest.mark.parametrize("protect_prompt", [False, True])
def test_the_benchmark_discriminates(protect_prompt: bool) -> None:
    (full,) = [row for row in DEMO["rows"] if row["policy"] == "full"]
    length = DEMO["problems"]["mean_prompt_tokens"] + full["mean_tokens"]
    rows = [row for row in DEMO["rows"] if row["policy"] != "full"]
    rows = [row for row in rows if row["protect_prompt"] is protect_prompt]
    discriminating = []
    for budget in {row["budget"] for row in rows if row["budget"] <= length / 2}:
        accuracy = [row["accuracy"] for row in rows if row["budget"] == budget]
        best, worst = max(accuracy), min(accuracy)
        if best >= full["accuracy"] - 0.02 and worst <= full["accuracy"] - 0.20:
            discriminating.append(budget)
    assert discriminating


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 5, 12])
def test_numbers_of_the_demo_are_found_again(number: int) -> None:
    recorded = DEMO["rows"][number]
    problems = DEMO["problems"]
    exam = Exam(problems=problems["count"], seed=problems["first_seed"])
    row = asdict(
        exam.take(Setting(recorded["policy"], recorded["budget"], recorded["protect_prompt"]))
    )
    for name in ("correct", "problems", "accuracy_low", "cache_bytes", "evicted_tokens"):
        assert row[name] == pytest.approx(recorded[name]), name


@pytest.mark.slow
def test_the_command_writes_table_picture_and_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The command takes a thread for each core, and other tests run on these.
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    options = [
        "--problems",
        "4",
        "--policies",
        "full,streaming_llm",
        "--budgets",
        "192",
        "--workers",
        "1",
    ]
    assert main(["demo", *options, "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "demo.json").read_text())
    assert [row["policy"] for row in document["rows"]] == ["full", *["streaming_llm"] * 2]
    assert set(document["versions"]) >= {"torch", "transformers", "compressed_cache"}
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "streaming_llm" in capsys.readouterr().out


def test_the_command_generates_with_another_model(capsys: pytest.CaptureFixture[str]) -> None:
    problem = make_problem(0, STEPS)
    options = ["--policies", "full,h2o", "--budgets", "64", "--max-new-tokens", "20"]
    assert main(["demo", "--model", str(MODEL_PATH), "--prompt", problem.prompt, *options]) == 0
    assert "h2o" in capsys.readouterr().out


@pytest.mark.slow
def test_with_another_model_the_demo_is_agreement_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--policies", "h2o,random", "--budgets", "32", "--max-new-tokens", "40"]
    command = ["demo", "--model", "shipped", *options, "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    rows = {row.policy: row for row in read(tmp_path / "shipped") if isinstance(row, Agreement)}
    assert rows.keys() == {"full", "h2o", "random"}
    for policy in ("h2o", "random"):
        agreement = rows[policy].agreement
        assert agreement is not None and 0.5 < agreement < 1
        assert f"{100 * agreement:.1f} %" in printed
    before = (tmp_path / "shipped" / "results.jsonl").read_bytes()
    assert main(command) == 0
    assert (tmp_path / "shipped" / "results.jsonl").read_bytes() == before
    assert "h2o" in capsys.readouterr().out


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A demo of a moment, as typed."""
    monkeypatch.setattr(measure, "STEPS", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    few = ["--problems", "2", "--workers", "1", "--out", str(tmp_path)]
    return ["demo", *few, "--policies"]


def test_a_row_that_cannot_be_is_a_dash_and_the_others_stay(
    small_demo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small_demo, "full,pyramidkv,kvzip", "--budgets", "80"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "pyramidkv 80 kept - - - - -" in printed and "kvzip 80 - - - - - -" in printed
    assert "- pyramidkv, budget 80 + prompt: budget must be at least prompt + 1" in printed
    assert "- kvzip, budget 80: 'kvzip' ranks a prompt by a second pass" in printed
    document = json.loads((tmp_path / "demo.json").read_text())
    settings = [(row["policy"], row["protect_prompt"]) for row in document["rows"]]
    assert settings == [("full", False), ("pyramidkv", False)]
    assert len(document["refused"]) == 3
    (group,) = groups(of_demo(document, "demo.json"))
    assert len(group) == 2


def test_what_the_demo_has_measured_is_kept_when_it_is_stopped(
    small_demo: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    take = Exam.take

    def take_one(exam: Exam, setting: Setting) -> Row:
        if setting.policy == "full":
            return take(exam, setting)
        # What there is so far is in the file.
        assert len(json.loads((tmp_path / "demo.json").read_text())["rows"]) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(Exam, "take", take_one)
    assert main([*small_demo, "full,h2o", "--budgets", "64"]) == 130
    captured = capsys.readouterr()
    assert captured.err == "stopped after 1 of 3 rows\n"
    assert "full" in captured.out
    assert len(json.loads((tmp_path / "demo.json").read_text())["rows"]) == 1
    assert (tmp_path / "demo.png").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Exam, "__init__", lambda *_, **__: pytest.fail("it began"))
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", f"{tmp_path}/file/demo"]) == 1
    assert capsys.readouterr().err == f"--out {tmp_path}/file/demo: Not a directory\n"


@pytest.mark.slow
def test_ctrl_c_ends_the_processes_of_a_demo_at_once(tmp_path: Path) -> None:
    options = ["--problems", "1", "--workers", "2", "--out", str(tmp_path), "--budgets", "64"]
    command = [sys.executable, "-m", "compressed_cache", "demo", *options]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "demo.json").exists():
        assert running.poll() is None
        time.sleep(0.1)
    # As a terminal does, to all of them.
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert re.fullmatch(r"stopped after \d+ of 17 rows\n", errors)
    assert json.loads((tmp_path / "demo.json").read_text())["rows"]


@pytest.mark.parametrize("prompt", [[], ["--prompt", "two plus two"]])
def test_a_model_that_is_not_there_is_one_line(
    prompt: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--model", "/nope", *prompt])
    assert capsys.readouterr().err == "--model /nope: there is no folder '/nope'\n"


def test_a_policy_that_cannot_serve_a_prompt_is_a_dash_among_texts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--policies", "KVzip,H2O", "--budgets", "8", "--max-new-tokens", "3"]
    assert main(["demo", "--model", str(MODEL_PATH), "--prompt", "tax 9", *options]) == 0
    printed = capsys.readouterr().out
    assert "refused: 'kvzip' ranks a prompt by a second pass" in printed
    assert re.search(r"kvzip +. 8 +. - +. - +. - +. -", printed)
    assert re.search(r"h2o +. 8 +. 3 ", printed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "h3o"], "--policies: unknown policy 'h3o'"),
        (["--problems", "0"], "must be >= 1"),
        (["--budgets", "64,0"], "must be >= 1"),
        (["--prompt", "x"], "--prompt must come with --model"),
        (["--model", "x", "--prompt", "x", "--out", "y"], "--out must come without --prompt"),
    ],
)
def test_bad_options_are_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *options]) == 2
    assert message in capsys.readouterr().err
