"""The tasks: prompts, rows, grading through the harness, and the form of its results."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressed_cache.__main__ import main
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.tasks import PATH
from compressed_cache.tasks.benchmarks import BENCHMARKS
from compressed_cache.tasks.rows import checked_row, local_rows
from tests.harness import DATA, Scripted, evaluate, manager, replies

STUDY = [name for name in BENCHMARKS if not name.startswith("shipped")]
# Its rows may not be passed on, so this one is made up.
RECLOR = {
    "context": "Whoever reads learns. Ada reads.",
    "question": "Which one follows?",
    "answers": ["Ada teaches.", "Ada learns.", "Ada writes.", "Ada sleeps."],
    "label": 1,
}
SHIPPED = ["compressed_cache", "model"]
EXPECTED = Path(__file__).parent / "expected_results.json"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All eleven datasets as a folder of local rows."""
    if not DATA.exists():
        pytest.skip("the real rows are not here")
    folder = tmp_path_factory.mktemp("rows")
    for path in DATA.glob("*.jsonl"):
        (folder / path.name).write_text(path.read_text())
    (folder / "reclor.jsonl").write_text(json.dumps(RECLOR) + "\n")
    return str(folder)


@pytest.fixture(scope="session")
def prompts(data: str) -> dict[str, dict[str, Any]]:
    """Of every task: the prompts, each with its row."""
    loaded = manager(data_dir=data).load([f"reasoning_{name}" for name in STUDY])["tasks"]
    return {
        name.removeprefix("reasoning_"): {task.doc_to_text(row): row for row in task.eval_docs}
        for name, task in loaded.items()
    }


def _oracle(prompts: dict[str, dict[str, Any]]) -> Callable[[str], str]:
    answers = {
        prompt: BENCHMARKS[name].gold(row)
        for name, rows in prompts.items()
        for prompt, row in rows.items()
    }
    return lambda prompt: f"<think>\\boxed{{no}}</think> So it is $\\boxed{{{answers[prompt]}}}$."


def test_a_model_that_knows_all_answers_scores_one_on_every_real_row(
    data: str, prompts: dict[str, dict[str, Any]]
) -> None:
    results = evaluate(["reasoning"], model=Scripted(_oracle(prompts)), metadata={"data_dir": data})
    summaries = results["results"]
    assert set(summaries) == {"reasoning", *(f"reasoning_{name}" for name in STUDY)}
    for name, summary in summaries.items():
        assert (summary["accuracy,none"], summary["answered,none"]) == (1.0, 1.0), name
    assert summaries["reasoning_drop"]["f1,none"] == 1.0
    sizes = {name: results["n-samples"][f"reasoning_{name}"]["effective"] for name in STUDY}
    assert sizes == {
        name: {"aime24": 30, "aime25": 30, "reclor": 1}.get(name, 100) for name in STUDY
    }


def test_silence_is_wrong_and_counted_apart(data: str) -> None:
    model = Scripted(lambda prompt: "It must be 18.")
    results = evaluate(["reasoning"], model=model, limit=5, metadata={"data_dir": data})
    for summary in results["results"].values():
        assert (summary["accuracy,none"], summary["answered,none"]) == (0.0, 0.0)


def test_the_group_weighs_every_task_alike(data: str, prompts: dict[str, dict[str, Any]]) -> None:
    oracle = _oracle(prompts)
    model = Scripted(lambda text: oracle(text) if text in prompts["aime24"] else r"\boxed{?}")
    results = evaluate(["reasoning"], model=model, metadata={"data_dir": data})
    assert results["results"]["reasoning"]["accuracy,none"] == pytest.approx(1 / 11)


def test_tags_and_groups_name_the_tasks_of_the_study(data: str) -> None:
    known = manager(data_dir=data)
    members = {tag: set(known.task_index[tag].tags) for tag in known.all_tags}
    assert {tag: {name.removeprefix("reasoning_") for name in members[tag]} for tag in members} == {
        "reasoning_math": {"gsm8k", "math500", "aime24", "aime25"},
        "reasoning_logic": {"folio", "strategyqa", "logiqa"},
        "reasoning_reading": {"drop", "reclor"},
        "reasoning_commonsense": {"commonsenseqa", "openbookqa"},
    }
    assert set(known.all_groups) == {"reasoning", "reasoning_shipped"}
    assert len(known.all_subtasks) == 11 + 2


HUB = {
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "folio": ("yale-nlp/FOLIO", None, "validation"),
    "drop": ("ucinlp/drop", None, "validation"),
    "strategyqa": ("ChilleD/StrategyQA", None, "test"),
    "reclor": ("metaeval/reclor", None, "validation"),
    "commonsenseqa": ("tau/commonsense_qa", None, "validation"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
    "logiqa": ("lucasmccabe/logiqa", None, "test"),
    "aime24": ("math-ai/aime24", None, "test"),
    "aime25": ("math-ai/aime25", None, "test"),
}


@pytest.mark.parametrize("name", STUDY)
def test_rows_come_from_the_hub_as_the_study_drew_them(
    name: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*arguments: Any, **keywords: Any) -> Any:
        asked.append((arguments, keywords))
        lines = (Path(data) / f"{name}.jsonl").read_text().splitlines()
        return datasets.Dataset.from_list([json.loads(line) for line in lines])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = manager().load([f"reasoning_{name}"])["tasks"][f"reasoning_{name}"]
    path, config, split = HUB[name]
    revision = {"revision": "refs/convert/parquet"} if name == "logiqa" else {}
    assert asked == [((path, config), {"split": split, **revision})]
    # The study: ds.shuffle(seed=42).select(range(100)).
    column = next(iter(BENCHMARKS[name].columns))
    drawn = load_dataset().shuffle(seed=42)
    assert task.eval_docs[column][:10] == drawn[column][:10]
    assert task.config.num_fewshot == 0
    assert task.config.generation_kwargs == {
        "until": [],
        "max_gen_toks": 2048,
        "do_sample": False,
        "temperature": 0.0,
    }


def test_prompts_are_the_study_s(prompts: dict[str, dict[str, Any]]) -> None:
    expected = json.loads((Path(__file__).parent / "expected_prompts.json").read_text())
    assert set(expected) == set(STUDY)
    for name, (start, end) in expected.items():
        for prompt in prompts[name]:
            assert prompt.startswith(start) and prompt.endswith(end), (name, prompt)
            assert prompt.strip() == prompt
    (reclor,) = prompts["reclor"]
    assert reclor == (
        "Given a context, a question and some options, pick the correct option.\n"
        "Context:\nWhoever reads learns. Ada reads.\n"
        "Question:\nWhich one follows?\n"
        "Options:\n1. Ada teaches.\n2. Ada learns.\n3. Ada writes.\n4. Ada sleeps.\n"
        "Solve the problem step by step. Answer with the option number and wrap your final answer "
        'in "\\boxed{}".'
    )
    choices = next(text for text in prompts["openbookqa"] if "fog around" in text)
    assert "\nChoices:\nA. a marsh\nB. a tundra\nC. the plains\nD. a desert\nSolve" in choices


FOUR = {"label": ["A", "B", "C", "D"], "text": ["w", "x", "y", "z"]}
BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("gsm8k", {"answer": "so #### two"}, "the answer must be a number, got 'two'"),
    ("aime24", {"solution": "18"}, "'solution' has no \\boxed{} answer"),
    ("aime24", {"solution": "\\boxed{x}"}, "the answer must be a number, got 'x'"),
    ("aime25", {"answer": "70"}, "column 'answer' must be int, got str"),
    ("folio", {"label": "Unknown"}, "the label must be True, False or Uncertain, got 'Unknown'"),
    ("strategyqa", {"answer": 1}, "column 'answer' must be bool, got int"),
    (
        "drop",
        {"answers_spans": {"types": []}},
        "'spans' in 'answers_spans' must be texts, got None",
    ),
    (
        "drop",
        {"answers_spans": {"spans": [7]}},
        "'spans' in 'answers_spans' must be texts, got [7]",
    ),
    ("reclor", {"label": 4}, "the key '5' is none of the choices 1, 2, 3, 4"),
    ("logiqa", {"options": "wxyz"}, "column 'options' must be list, got str"),
    ("commonsenseqa", {"answerKey": ""}, "the key '' is none of the choices A, B, C, D, E"),
    ("openbookqa", {"choices": FOUR | {"text": ["w"]}}, "4 choices have labels, 1 texts"),
    (
        "openbookqa",
        {"choices": {"text": ["w"]}},
        "no answer can be read from it (KeyError: 'label')",
    ),
]


@pytest.mark.parametrize(("name", "fault", "message"), BROKEN)
def test_what_is_wrong_with_a_row_is_said(
    name: str, fault: dict[str, Any], message: str, data: str
) -> None:
    line = (Path(data) / f"{name}.jsonl").read_text().splitlines()[0]
    with pytest.raises(ValueError) as caught:
        checked_row(json.loads(line) | fault, BENCHMARKS[name])
    assert str(caught.value) == message


def test_local_rows_may_hold_any_text(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    question = "one\u2028two\u0085three \u00e9"
    row = json.dumps({"question": question, "answer": "#### 3"}, ensure_ascii=False)
    path.write_bytes(f"{row}\r\n\n{row}\n".encode())
    rows = local_rows(path, BENCHMARKS["gsm8k"])
    assert [row["question"] for row in rows] == [question, question]
    path.write_bytes(row.encode() + b"\n" + row.encode("latin-1", "replace"))
    with pytest.raises(ValueError, match=r"gsm8k.jsonl, line 2: 'utf-8' codec can't decode"):
        local_rows(path, BENCHMARKS["gsm8k"])


def _documents(data: str, **metadata: str) -> list[str]:
    tasks: Any = manager(data_dir=data, **metadata).load(["reasoning_gsm8k"])["tasks"]
    return [doc["question"] for doc in tasks["reasoning_gsm8k"].eval_docs]


def test_some_of_the_rows_are_those_of_the_usual_order(data: str) -> None:
    all_of_them = _documents(data)
    assert len(all_of_them) > 3
    assert _documents(data, rows="1:3") == all_of_them[1:3]
    assert _documents(data, rows=":2") == all_of_them[:2]
    assert _documents(data, rows="2:") == all_of_them[2:]


@pytest.mark.parametrize("rows", ["50", "a:b", "3:2", "10000:", "-2:"])
def test_rows_that_are_none_are_refused(data: str, rows: str) -> None:
    with pytest.raises(ValueError, match='rows must be FIRST:END, such as "50:100"'):
        _documents(data, rows=rows)


def test_an_environment_variable_names_the_folder_too(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSED_CACHE_DATA", data)
    task = manager().load(["reasoning_aime25"])["tasks"]["reasoning_aime25"]
    assert len(task.eval_docs) == 30


def test_the_shipped_model_runs_every_task_under_a_press(data: str) -> None:
    # It knows none of these words; what counts is that it runs and that the counts are right.
    names = [f"reasoning_{name}" for name in STUDY]
    results = evaluate(
        names,
        limit=2,
        batch_size=8,
        gen_kwargs={"max_gen_toks": 8},
        model_args={"kv_press": "streaming_llm", "kv_budget": 24},
        metadata={"data_dir": data},
    )
    for name in names:
        summary = results["results"][name]
        assert summary["held_tokens,none"] == 24
        assert summary["evicted_tokens,none"] > 0
        assert 1 <= summary["tokens,none"] <= 8


@pytest.mark.slow
def test_results_are_as_stored(data: str, tmp_path: Path) -> None:
    results = evaluate(
        ["reasoning_shipped", "reasoning_gsm8k"],
        limit=3,
        batch_size=6,
        gen_kwargs={"max_gen_toks": 300},
        model_args={"kv_press": "h2o", "kv_budget": 160, "dtype": "float32"},
        metadata={"data_dir": data},
        stderr=True,
    )
    found = {
        "results": results["results"],
        "compressed_cache": results["config"]["compressed_cache"],
        "higher_is_better": results["higher_is_better"]["reasoning_gsm8k"],
        "n-samples": results["n-samples"],
        "first_reply": replies(results, "reasoning_shipped_easy")[0],
    }
    # Where a change is meant, copy this file over the stored one and read the diff.
    (tmp_path / EXPECTED.name).write_text(json.dumps(found, indent=1) + "\n")
    assert json.loads(json.dumps(found)) == json.loads(EXPECTED.read_text()), tmp_path


@pytest.mark.parametrize("option", [["--include_path", "mine"], ["--include_path=mine"]])
def test_the_command_fills_in_the_include_path_itself(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--tasks", "reasoning", *option]) == 2
    assert capsys.readouterr().err.startswith("--include_path must be left out")


@pytest.mark.slow
def test_the_commands_that_print_paths() -> None:
    for arguments, path in ((["compressed_cache.tasks"], PATH), (SHIPPED, MODEL_PATH)):
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        (line,) = done.stdout.splitlines()
        assert Path(line).samefile(path)
