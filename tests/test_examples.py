"""The scripts in ``examples`` run, at small sizes, and draw their pictures."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.reasoner.problems import make_problem

FOLDER = Path(__file__).parents[1] / "examples"
FEW = "--policies h2o --budgets 60 --questions 2 --max-new-tokens 8"
RUNS = {
    f"long_text {FEW}": (
        r" +full cache: 0 of 2 right, \d+ KiB\n +h2o, 60: 0 of 2 right, \d+ KiB\n"
    ),
    # Its words are not those of this model, but as many as it can read.
    f"long_text {FEW} --model {MODEL_PATH}": (
        r" +full cache: 0 of 2 right, [\d,]+ KiB\n +h2o, 60: 0 of 2 right, \d+ KiB\n"
    ),
    "own_policy --problems 2 --steps 1 --budget 300": (
        r"random: 2 of 2 right\nh2o: 2 of 2 right\nBreadth: 2 of 2 right\n"
    ),
    "speed_and_memory --policies h2o --budget 16 --lengths 32,64 --tokens 3": (
        r"( +\d+ tokens, +(transformers' DynamicCache|h2o): +[\d.]+ ms per token, +[\d.]+ MiB\n){4}"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS)
def test_an_example_prints_what_it_found_and_draws_it(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--out", str(tmp_path / "pictures")])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert re.fullmatch(RUNS[command], capsys.readouterr().out)
    (picture,) = (tmp_path / "pictures").iterdir()
    assert picture.name == f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_every_example_is_run() -> None:
    assert {command.split()[0] for command in RUNS} == {path.stem for path in FOLDER.glob("*.py")}


def test_the_walks_of_the_long_text_end_as_the_problems_do() -> None:
    walk = runpy.run_path(str(FOLDER / "long_text.py"))["walk"]
    for problem in (make_problem(seed, steps=12) for seed in range(20)):
        market, _, asked = problem.prompt.partition(" start ")
        assert walk(market, int(asked[0])) == problem.answer
