"""The stock ``lm_eval`` command, in processes of its own."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compressed_cache.integrations.harness import autoload
from compressed_cache.integrations.harness.autoload import install
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.tasks import PATH

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.tasks import TaskManager

from tests.harness import leave_out_their_tasks

BIN = Path(sys.executable).parent
TASK = "reasoning_shipped_easy"
MODEL = f"pretrained={MODEL_PATH}"
H2O = f"{MODEL},kv_press=h2o,kv_budget=140"


def _environment(**extra: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | extra


def _run(*command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=_environment(**environment),
    )


@pytest.fixture(scope="module")
def few_tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which lm_eval is the installed one but for all but one folder of its tasks:
    a process that has some 14,000 files of them to read takes half a minute for that."""
    own = Path(lm_eval.__file__).parent
    copy = tmp_path_factory.mktemp("few_tasks") / "lm_eval"
    shutil.copytree(own / "tasks" / "gsm8k", copy / "tasks" / "gsm8k")
    for part in (*own.iterdir(), *own.glob("tasks/*.py")):
        if part.name not in ("tasks", "__pycache__"):
            (copy / part.relative_to(own)).symlink_to(part)
    paths = [str(copy.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def _results(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text())


def _arguments(folder: Path, model_arguments: str, *more: Any) -> list[Any]:
    return [
        "--model_args",
        model_arguments,
        "--tasks",
        TASK,
        "--limit",
        2,
        "--device",
        "cpu",
        "--output_path",
        folder,
        *more,
    ]


def test_the_entry_points_are_declared() -> None:
    declared = importlib.metadata.distribution("compressed-cache").entry_points
    groups = {entry.group: entry for entry in declared}
    others = {"torch.backends", "lm_eval.models", "lm_eval.tasks"}
    assert set(groups) == {"console_scripts"} | others
    assert callable(groups["torch.backends"].load())
    from lm_eval.models.huggingface import HFLM

    assert issubclass(groups["lm_eval.models"].load(), HFLM)
    assert list(Path(groups["lm_eval.tasks"].load().__path__[0]).glob("*.yaml"))


def test_tasks_are_known_without_a_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave_out_their_tasks(monkeypatch)
    install()
    known = TaskManager().all_tasks
    assert {TASK, "reasoning", "reasoning_math"} <= set(known)
    assert TaskManager(include_path=str(PATH)).all_tasks == known
    assert not caplog.messages
    assert TaskManager(include_defaults=False).all_tasks == []
    # A folder of the user's has the last word.
    (tmp_path / "mine.yaml").write_text(f"task: {TASK}\ndataset_path: json\n")
    mine = TaskManager(include_path=[str(tmp_path)])
    assert mine.task_index[TASK].yaml_path == tmp_path / "mine.yaml"
    assert mine.all_tasks == known


def test_another_index_of_tasks_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    autoload._add_tasks(SimpleNamespace())
    assert "tasks are known by --include_path only with this lm_eval" in caplog.text


@pytest.mark.slow
def test_the_stock_command_takes_kv_arguments(tmp_path: Path) -> None:
    # This one reads all tasks of lm_eval, among which those of this package must fit.
    done = _run(
        BIN / "lm_eval",
        "--model",
        "hf",
        *_arguments(tmp_path, H2O, "--include_path", PATH, "--batch_size", 1),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = _results(tmp_path)
    assert results["results"][TASK]["evicted_tokens,none"] > 0
    assert results["config"]["compressed_cache"]["policy"] == "h2o"
    assert f"|{TASK}" in done.stdout
    assert "FutureWarning" not in done.stderr


@pytest.mark.slow
def test_the_stock_command_ends_with_one_clear_error(
    tmp_path: Path, few_tasks: dict[str, str]
) -> None:
    done = _run(
        BIN / "lm_eval",
        "--model",
        "hf",
        *_arguments(tmp_path, f"{H2O},kv_recnt=3", "--include_path", PATH),
        **few_tasks,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "TypeError: unknown model argument 'kv_recnt' for kv_press='h2o', expected one of "
        "'kv_budget', 'kv_interval', 'kv_lossless', 'kv_press', 'kv_protect_prompt', 'kv_recent', "
        "'kv_sinks'. Did you mean 'kv_recent'?"
    )
    assert done.stderr.count("Traceback") == 1
    assert "Loading weights" not in done.stderr


@pytest.mark.slow
def test_as_a_module_by_an_alias_without_seeds_in_automatic_batches(
    tmp_path: Path, few_tasks: dict[str, str]
) -> None:
    # Without seeds the model's own module is the first to import torch.
    done = _run(
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "huggingface",
        *_arguments(tmp_path, H2O, "--include_path", PATH, "--batch_size", "auto"),
        "--max_batch_size",
        4,
        "--seed",
        "None",
        **few_tasks,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert _results(tmp_path)["results"][TASK]["evicted_tokens,none"] > 0


@pytest.mark.slow
def test_two_cpu_processes_share_the_documents(tmp_path: Path, few_tasks: dict[str, str]) -> None:
    done = _run(
        BIN / "accelerate",
        "launch",
        # accelerate starts several local processes under this name only.
        "--multi_gpu",
        "--num_processes",
        2,
        "--num_machines",
        1,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
        "compressed_cache",
        "eval",
        "--model",
        "hf",
        *_arguments(tmp_path, H2O, "--log_samples", "--limit", 5),
        ACCELERATE_USE_CPU="true",
        **few_tasks,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = _results(tmp_path)
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    numbers = [json.loads(line)["doc_id"] for line in samples.read_text().splitlines()]
    assert sorted(numbers) == [0, 1, 2, 3, 4]
    assert results["n-samples"][TASK]["effective"] == 5
    # Each process answered its half, three with the one that evens them out.
    assert results["config"]["compressed_cache"]["replies"] == 3
    assert results["results"][TASK]["evicted_tokens,none"] > 0


PROGRAM = """
import json, logging, sys
{first}
import lm_eval
from lm_eval.tasks import TaskManager
found = []
for arguments in {arguments!r}:
    results = lm_eval.simple_evaluate(
        model="hf", model_args=arguments, tasks=[{task!r}], limit=1, batch_size=4, device="cpu",
        task_manager=TaskManager(include_path={path!r}, include_defaults=False),
        bootstrap_iters=0, gen_kwargs="max_gen_toks=80",
    )
    tokens = results["results"][{task!r}].get("tokens,none")
    found.append([tokens, "compressed_cache.integrations.harness.meter" in sys.modules])
print(json.dumps(found))
"""


ORDERS = (
    "",
    "from lm_eval.models.huggingface import HFLM",
    "import lm_eval.api.registry",
    "import compressed_cache.integrations.harness.model",
)
SWITCH = "COMPRESSED_CACHE_AUTOLOAD"


def _program(*arguments: str, first: str = "", **environment: str) -> Any:
    """What each evaluation gives, one after the other in a new process."""
    program = PROGRAM.format(arguments=arguments, task=TASK, path=str(PATH), first=first)
    done = _run(sys.executable, "-c", program, **environment)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """Of one program under many conditions, two at a time because each takes long to start."""
    with ThreadPoolExecutor(2) as pool:
        running = {first: pool.submit(_program, H2O, first=first) for first in ORDERS}
        running["no arguments"] = pool.submit(_program, MODEL, H2O, first="import torch")
        running[SWITCH] = pool.submit(_program, H2O, **{SWITCH: "0"})
        return {condition: program.result() for condition, program in running.items()}


@pytest.mark.slow
@pytest.mark.parametrize("first", ORDERS)
def test_called_from_python_in_any_order_of_imports(outcomes: dict[str, Any], first: str) -> None:
    assert outcomes[first] == [[80, True]]


@pytest.mark.slow
def test_inert_without_kv_arguments_and_ready_for_them(outcomes: dict[str, Any]) -> None:
    assert outcomes["no arguments"] == [[None, False], [80, True]]


@pytest.mark.slow
def test_can_be_switched_off(outcomes: dict[str, Any]) -> None:
    assert "unexpected keyword argument 'kv_press'" in outcomes[SWITCH]


@pytest.mark.slow
def test_never_raises_while_torch_is_imported(tmp_path: Path) -> None:
    # A harness that has changed beyond recognition.
    package = tmp_path / "lm_eval"
    for name in ("__init__", "api/__init__", "api/registry", "models/__init__"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text("")
    broken = "import lm_eval.api.registry, torch; print('alive')"
    for program in (broken, f"import torch; {broken}", "import torch; print('alive')"):
        done = _run(sys.executable, "-c", program, PYTHONPATH=str(tmp_path))
        assert done.stdout == "alive\n", done.stderr
    (package / "models/huggingface.py").write_text(
        "import torch\nfrom lm_eval.api.registry import register_model\n"
        "@register_model('hf')\nclass HFLM: pass\n"
    )
    (package / "api/registry.py").write_text(
        "def register_model(*names):\n    return lambda model_class: model_class\n"
    )
    program = "from lm_eval.models.huggingface import HFLM; print('alive')"
    done = _run(sys.executable, "-c", program, PYTHONPATH=str(tmp_path))
    assert done.stdout == "alive\n"
    assert "kv_ arguments are not available with this lm_eval" in done.stderr


def test_importing_torch_loads_one_small_module_and_nothing_where_torch_is_told_so() -> None:
    program = (
        "import sys, torch\n"
        "print(*sorted(name for name in sys.modules if name.startswith('compressed_cache')))"
    )
    loaded = _run(sys.executable, "-c", program).stdout.split()
    assert loaded == [
        "compressed_cache",
        "compressed_cache.integrations",
        "compressed_cache.integrations.harness",
        "compressed_cache.integrations.harness.autoload",
    ]
    # So nothing of ours is there to change the harness.
    done = _run(sys.executable, "-c", program, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert (done.returncode, done.stdout) == (0, "\n")
