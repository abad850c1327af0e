"""What is said about the project in more than one place agrees."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressed_cache import __version__

ROOT = Path(__file__).parent.parent
TEMPLATES = ROOT / ".github" / "ISSUE_TEMPLATE"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def _yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def test_the_workflow_runs_what_ci_and_the_makefile_run() -> None:
    (job,) = _yaml(".github/workflows/ci.yml")["jobs"].values()
    commands = job["strategy"]["matrix"]["command"]
    assert commands == ["make lint", "make quick", "bash .ci/run", "make dist"]
    assert job["steps"][-1] == {"run": "${{ matrix.command }}"}
    (python,) = (step["with"]["python-version"] for step in job["steps"] if "python" in str(step))
    assert PROJECT["requires-python"] == f">={python}"
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec make test"
    assert {"test", *(one.split()[1] for one in commands if one.startswith("make"))} <= TARGETS


def test_what_there_is_to_cite_is_what_gets_installed() -> None:
    cited = _yaml("CITATION.cff")
    assert cited["title"] == PROJECT["name"]
    assert cited["abstract"] == PROJECT["description"]
    assert cited["version"] == __version__
    assert cited["license"] == PROJECT["license"]
    assert cited["authors"] == PROJECT["authors"] == [{"name": "compressed-cache contributors"}]


def test_pyproject_says_what_an_index_shows() -> None:
    assert PROJECT["keywords"] and PROJECT["readme"] == "README.md"
    versions = [one for one in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", one)]
    assert PROJECT["requires-python"].removeprefix(">=") in {one.split()[-1] for one in versions}
    # A licence is an expression now, and an index refuses it beside a classifier.
    assert not [one for one in PROJECT["classifiers"] if one.startswith("License")]


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.yml")))
def test_a_template_of_issues_asks_for_something(name: str) -> None:
    form = _yaml(f".github/ISSUE_TEMPLATE/{name}.yml")
    if name == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert form["name"] and form["description"]
    for field in form["body"]:
        assert field["attributes"]["label"] and field["validations"]["required"] is True


def test_the_changelog_begins_with_what_is_not_released() -> None:
    heads = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == "Unreleased" and heads.count("Unreleased") == 1
