"""What gets installed, and what importing it costs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_the_wheel_puts_only_compressed_cache_on_top_of_site_packages(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"compressed_cache"}
    for folder in MAPPED:
        assert f"compressed_cache/{folder}/__init__.py" in names
    assert "compressed_cache/py.typed" in names
    assert "compressed_cache/eval/catalogue/entries.json" in names
    assert "compressed_cache/reasoner/model/model.safetensors" in names
    # Used from elsewhere, with the dependencies of this environment and nothing of this checkout.
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import compressed_cache, compressed_cache.integrations, compressed_cache.tasks\n"
        "from transformers import AutoModelForCausalLM\n"
        "from compressed_cache.reasoner import MODEL_PATH\n"
        "AutoModelForCausalLM.from_pretrained(MODEL_PATH)\n"
        "print(compressed_cache.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(site / "compressed_cache" / "__init__.py")
