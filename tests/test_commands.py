"""The front door: help, options, completion and what is said where something is missing."""

import importlib
import runpy
import shutil
from pathlib import Path

import pytest
from transformers.utils import logging

import compressed_cache
from compressed_cache import wording
from compressed_cache.hf.loading import load, progress_bars
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.tasks import PATH

ROOT = Path(__file__).parent.parent
# What talks line by line to a process of ours is no command.
BENCHES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "bench").rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text() and path.stem != "kvpress_process"
]


def test_every_benchmark_with_options_is_known() -> None:
    assert set(BENCHES) >= {"bench.harness", "bench.pages", "bench.catalogue"}


@pytest.mark.parametrize("name", BENCHES)
def test_a_benchmark_explains_itself_and_refuses_what_it_does_not_know(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(name)
    command = f"python -m {name.removesuffix('.__main__')}"
    monkeypatch.setattr("sys.argv", ["x", "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: {command}")
    assert module.__doc__.splitlines()[0] in printed
    monkeypatch.setattr("sys.argv", ["x", "--hepl"])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_the_folder_of_tasks_is_printed_unless_something_else_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["x"])
    runpy.run_module("compressed_cache.tasks.__main__")
    assert capsys.readouterr().out == f"{PATH}\n"
    monkeypatch.setattr("sys.argv", ["x", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("compressed_cache.tasks.__main__")
    assert "usage: python -m compressed_cache.tasks" in capsys.readouterr().out


def test_completion_offers_the_public_names_and_no_others() -> None:
    assert set(dir(compressed_cache)) == set(compressed_cache.__all__)
    for name in dir(compressed_cache):
        assert getattr(compressed_cache, name) is not None


@pytest.mark.parametrize("is_checkout", [True, False])
def test_the_command_for_what_is_missing_works(
    is_checkout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pip knows the extras of what is installed; a checkout need not be.
    expected = f"-e '{ROOT}[demo]'" if is_checkout else "'compressed-cache[demo]'"
    if not is_checkout:
        monkeypatch.setattr(wording, "_ROOT", tmp_path)
    assert wording.missing("rich", "demo") == f"rich is missing: pip install {expected}"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_are_shown_where_somebody_waits_for_a_model(
    is_terminal: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    load(MODEL_PATH)
    assert capsys.readouterr().err == ""
    shutil.copytree(MODEL_PATH, tmp_path / "mine")
    load(tmp_path / "mine")
    assert ("Loading weights" in capsys.readouterr().err) is is_terminal
    # Whoever has switched them off has them off.
    assert logging.is_progress_bar_enabled()
    with progress_bars(False):
        assert not logging.is_progress_bar_enabled()
        with progress_bars(True):
            assert not logging.is_progress_bar_enabled()
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()
