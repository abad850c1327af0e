"""The front door: help, options, completion and what is said where something is missing."""

import argparse
import importlib
import os
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from transformers.utils import logging

import compressed_cache
from compressed_cache import telemetry, wording
from compressed_cache.__main__ import main
from compressed_cache.eval.options import make_parser
from compressed_cache.hf.loading import load, progress_bars, why
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.tasks import PATH

ROOT = Path(__file__).parent.parent
# What talks line by line to a process of ours is no command.
BENCHES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "bench").rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text() and path.stem != "kvpress_process"
]
(COMMANDS,) = (
    action.choices
    for action in make_parser()._actions
    if isinstance(action, argparse._SubParsersAction)
)


def test_the_console_script_is_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (name, value), *_ = scripts.items()
    command = EntryPoint(name, value, "console_scripts").load()
    assert (name, command) == ("compressed-cache", main)
    with pytest.raises(SystemExit, match="0"):
        command(["--version"])
    assert capsys.readouterr().out == f"compressed-cache {compressed_cache.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_describes_itself_its_options_and_their_defaults(name: str) -> None:
    parser = COMMANDS[name]
    assert parser.description
    chosen = [
        one
        for group in parser._mutually_exclusive_groups
        if group.required
        for one in group._group_actions
    ]
    for action in parser._actions:
        where = f"{name} {action.dest}"
        assert action.help, where
        has_default = not (action.required or action in chosen or action.nargs in (0, "+"))
        assert not has_default or "default" in action.help or "needs none" in action.help, where
        # One that is told is told as it is.
        if action.default not in (None, argparse.SUPPRESS, "", []) and action.nargs != 0:
            assert "%(default)s" in action.help, where


def test_the_harness_has_an_explanation_of_ours_before_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["eval", "--help"])
    said = capsys.readouterr().out
    for name in ("press", "budget", "interval", "sinks", "recent", "protect_prompt"):
        assert f"\n  kv_{name}=" in said
    assert "`compressed-cache eval run --help` lists" in said


@pytest.mark.slow
def test_help_comes_at_once() -> None:
    program = (
        "import sys, time\n"
        "from compressed_cache.__main__ import main\n"
        "for command in [[], *([name] for name in sys.argv[1:])]:\n"
        "    try:\n"
        "        main([*command, '--help'])\n"
        "    except SystemExit as ended:\n"
        "        assert ended.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'lm_eval'} & set(sys.modules)\n"
        # Of the processor, whose other users are none of its business.
        "assert time.process_time() < 0.5, time.process_time()\n"
    )
    command = [sys.executable, "-c", program, *COMMANDS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


def test_what_the_first_pages_use_is_imported_from_the_package() -> None:
    from compressed_cache import H2O, PrefillDecode, Recorder, measure

    cache = compressed_cache.CompressedCache(PrefillDecode(prompt=H2O(), decoding=H2O()))
    assert cache.policy.label == "h2o/h2o"
    assert (measure, Recorder) == (telemetry.measure, telemetry.Recorder)


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


def test_nobody_need_read_to_the_end() -> None:
    """As with ``| head``."""
    command = [sys.executable, "-m", "compressed_cache", "policies", "--json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=ROOT) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_a_result_that_is_not_there_is_told_before_anything_is_imported() -> None:
    program = (
        "import sys\n"
        "from compressed_cache.__main__ import main\n"
        "assert main(['report', 'nosuch']) == 2\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", program]
    environment = os.environ | {"COMPRESSED_CACHE_AUTOLOAD": "0"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ran.stderr == "nosuch must be readable, got: No such file or directory\n"
    assert ran.returncode == 0


def test_without_a_network_a_folder_is_asked_for() -> None:
    error = OSError("We couldn't connect to 'https://huggingface.co' to load the files.")
    assert why("some/model", error).endswith("Without a network, name a folder with the model.")
