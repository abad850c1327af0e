"""What gets installed, and what importing it costs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from compressed_cache import __version__

ROOT = Path(__file__).parent.parent
MAPPED = ("integrations", "tasks")


def test_links_lead_to_their_folders() -> None:
    for folder in MAPPED:
        link = ROOT / "compressed_cache" / folder
        assert link.is_symlink() and link.resolve() == ROOT / folder


@pytest.mark.slow
def test_folders_on_top_are_the_known_ones() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    folders = {path.split("/")[0] for path in tracked if "/" in path}
    assert folders == {
        "compressed_cache",
        "integrations",
        "tasks",
        "bench",
        "docs",
        "examples",
        "tests",
        ".ci",
        ".github",
    }


@pytest.mark.slow
def test_importing_the_package_loads_nothing_heavy() -> None:
    program = (
        "import sys, time\n"
        "before = time.process_time()\n"
        "import compressed_cache\n"
        "assert time.process_time() - before < 0.1\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets', 'scipy', 'matplotlib', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "compressed_cache.CompressedCache('snapkv', 8)\n"
        "late = {'lm_eval', 'datasets', 'matplotlib'}\n"
        "assert not late & set(sys.modules), late & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.slow
def test_tests_are_collected_without_the_harness(tmp_path: Path) -> None:
    """As where a machine with a GPU has what the core needs and no more."""
    (tmp_path / "without.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Finder(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        found = name.partition('.')[0] == 'lm_eval'\n"
        "        return None if found else PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = Finder\n"
    )
    command = "-m", "pytest", "-p", "without", "-q", "--collect-only", "-m", "gpu", "tests"
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what ``make dist`` builds, without a network."""
    if int(metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools 77 or later must be installed to build without a network")
    # A copy, as two processes cannot build in one folder.
    source = tmp_path_factory.mktemp("source") / "copy"
    left_out = shutil.ignore_patterns(
        ".git", ".venv*", "*.egg-info", "build", "dist", "__pycache__"
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    out = tmp_path_factory.mktemp("dist")
    # The wheel is built from what the source distribution has.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_the_wheel_puts_only_compressed_cache_on_top_of_site_packages(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"compressed_cache"}
    for folder in MAPPED:
        assert f"compressed_cache/{folder}/__init__.py" in names
    assert "compressed_cache/py.typed" in names
    assert "compressed_cache/eval/catalogue/entries.json" in names
    assert "compressed_cache/reasoner/model/model.safetensors" in names


@pytest.mark.slow
def test_the_source_distribution_carries_the_tests_and_what_they_read(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    # Links are followed, so that their files are there twice.
    links = {f"compressed_cache/{folder}" for folder in MAPPED}
    assert not set(tracked) - names - links - {".gitignore"}
    assert "tests/reference/comparison.py" in names


@pytest.mark.slow
def test_a_wheel_that_is_installed_in_an_empty_environment_works_from_another_folder(
    dist: Path, tmp_path: Path
) -> None:
    (wheel,) = dist.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    bin = tmp_path / "venv" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(bin / "python"), "install", "--quiet"]
    done = subprocess.run(
        [*pip, "--no-index", "--no-deps", str(wheel)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Its dependencies are those of this environment, whose own links to this checkout, in .pth
    # files, Python does not follow from there.
    (site,) = (tmp_path / "venv").glob("lib/*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    def run(name: str, *arguments: str) -> str:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        environment = {"PATH": "", "HOME": str(elsewhere)}
        done = subprocess.run(
            [str(bin / name), *arguments],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("compressed-cache", "--version") == f"compressed-cache {__version__}\n"
    model = Path(run("compressed-cache", "model").strip())
    assert model == site / "compressed_cache" / "reasoner" / "model"
    assert "snapkv" in run("compressed-cache", "policies")
    program = (
        "import compressed_cache, compressed_cache.integrations, compressed_cache.tasks\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from compressed_cache.reasoner import MODEL_PATH\n"
        "tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)\n"
        "model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)\n"
        "inputs = tokenizer('tax 9 goods 6', return_tensors='pt')\n"
        "cache = compressed_cache.CompressedCache('h2o', 8, recent=4)\n"
        "model.generate(**inputs, past_key_values=cache, max_new_tokens=20, min_new_tokens=20)\n"
        "print(compressed_cache.__file__, cache.evicted_tokens > 0)"
    )
    expected = f"{site / 'compressed_cache' / '__init__.py'} True\n"
    assert run("python", "-W", "ignore", "-c", program) == expected
