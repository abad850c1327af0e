"""Which module may import which, and how large the parts are that a newcomer reads first."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from compressed_cache import Policy
from compressed_cache.policies import MODIFIERS, Modifier

ROOT = Path(__file__).parent.parent
PACKAGE = "compressed_cache"
FOLDERS = {PACKAGE: ROOT / PACKAGE} | {
    f"{PACKAGE}.{name}": ROOT / name for name in ("integrations", "tasks")
}
# From the lowest up. A module imports those of its own level and of lower ones.
LEVELS = [
    ["versions", "wording", "tensorfile"],
    ["ops"],
    ["reasoner"],
    ["policies"],
    ["step_counter", "stores"],
    ["snapshot", "observers", "hf"],
    ["telemetry.peaks", "telemetry.timestamps", "telemetry.timing", "telemetry.timer"],
    ["drafting"],
    ["layer"],
    ["cache"],
    ["second_pass"],
    ["telemetry", "calibration"],
    ["tasks", "integrations"],
    ["eval"],
    ["__main__"],
]


def _files() -> dict[str, Path]:
    """Every module by its dotted name; a package by that of its ``__init__``."""
    found = {}
    for top, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            if folder == ROOT / PACKAGE and parts[0] in ("integrations", "tasks"):
                continue
            found[".".join([top, *parts]).removesuffix(".__init__")] = file
    return found


FILES = _files()


def _imported(file: Path) -> Iterator[str]:
    """All modules that a file imports, wherever in it, those for the type checker too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in FILES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


GRAPH = {
    name: {one for one in _imported(file) if one in FILES and one not in (name, PACKAGE)}
    for name, file in FILES.items()
    if name != PACKAGE
}


def _level(name: str) -> int:
    own = name.removeprefix(f"{PACKAGE}.")
    found = [
        (len(prefix), level)
        for level, names in enumerate(LEVELS)
        for prefix in names
        if own == prefix or own.startswith(f"{prefix}.")
    ]
    assert found, f"{name} has no level"
    return max(found)[1]


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_point_down() -> None:
    up = {
        f"{name} -> {one}"
        for name, imported in GRAPH.items()
        for one in imported
        if _level(one) > _level(name)
    }
    assert not up


def test_methods_know_nothing_of_where_tokens_are() -> None:
    for name, imported in GRAPH.items():
        if ".policies." in name:
            assert not [one for one in imported if ".stores" in one or ".hf" in one], name


def test_the_root_of_the_package_is_small() -> None:
    modules = [file for file in (ROOT / PACKAGE).glob("*.py") if not file.stem.startswith("__")]
    assert len(modules) <= 10
    small = {
        name
        for name, file in FILES.items()
        if file.name != "__init__.py" and len(file.read_text().splitlines()) < 25
    }
    # Each method has a file, however short, and other packages find these two by name.
    found_by_name = {f"{PACKAGE}.integrations.harness.model", f"{PACKAGE}.tasks.__main__"}
    assert {name for name in small if ".methods." not in name} == found_by_name


def test_a_policy_has_few_members_and_a_modifier_overrides_fewer() -> None:
    members = {name for name in vars(Policy) if not name.startswith("_")}
    assert len(members) <= 15, members
    for kind in MODIFIERS.values():
        forwarded = {name for name in vars(kind) if name in members & set(vars(Modifier))}
        assert forwarded <= {"scores", "scores_attention", "same_for_all_heads"}, kind


def test_a_step_and_a_prompt_are_read_in_one_file_each() -> None:
    for name in ("decode_step", "prefill"):
        assert len(FILES[f"{PACKAGE}.stores.{name}"].read_text().splitlines()) <= 150


def test_the_main_path_is_short() -> None:
    stores = [f"stores.{name}" for name in ("slots", "ranking", "prefill", "decode_step")]
    files = [FILES[f"{PACKAGE}.{name}"] for name in ("cache", "layer", "policies.base", *stores)]
    assert sum(len(file.read_text().splitlines()) for file in files) <= 1500
