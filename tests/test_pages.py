"""What the pages show is what the commands produce, and their links lead somewhere."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

import compressed_cache
from bench import pages
from compressed_cache import CompressedCache, policies
from compressed_cache.__main__ import main
from compressed_cache.integrations.harness.arguments import take_press
from tests.conftest import distinct_tokens

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text()
TEXTS = {path: path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS)}
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", pages.PAGES)
def test_parts_are_produced_by_the_command(page: str) -> None:
    text = (ROOT / page).read_text()
    assert pages.filled(page, text) == text


def test_the_readme_is_one_screen_of_what_there_is() -> None:
    assert len(README.encode()) <= 14_000
    counts = f"{len(policies.POLICIES)} policies, {len(policies.MODIFIERS)} modifiers"
    assert counts in README
    assert f"version = {{{compressed_cache.__version__}}}" in README


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for link in re.findall(r"\]\((?!\w+:)(.+?)\)", _prose(TEXTS[path])):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target.read_text()), link


def _prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)


def _anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", _prose(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"\S+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {path.name for path in DOCS}


def test_every_extra_is_told() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = (ROOT / "docs" / "index.md").read_text()
    assert set(re.findall(r'"\.\[(\w+)\]"', told)) == set(project["optional-dependencies"])


def test_the_policy_of_the_readme_runs(model: LlamaForCausalLM) -> None:
    (source,) = [code for code in PYTHON.findall(README) if "Norm(P" in code]
    namespace: dict[str, object] = {"__name__": "readme"}
    exec(source, namespace)
    start = source.index("@dataclass")
    assert len(source[start : source.index("cache =")].strip().splitlines()) <= 15
    cache = namespace["cache"]
    model.generate(distinct_tokens(2, 100), past_key_values=cache, max_new_tokens=60)
    assert cache.evicted_tokens == 159 - 128
    assert cache.policy.power == 1.0


def test_a_combination_is_the_same_in_python_and_in_arguments() -> None:
    utils = pytest.importorskip("lm_eval.utils")
    text = (ROOT / "docs" / "index.md").read_text()
    (source,) = [code for code in PYTHON.findall(text) if "snapkv/h2o" in code]
    (arguments,) = re.findall(r"--model_args pretrained=NAME,(kv_\S*)", text)
    names: dict[str, Any] = {"CompressedCache": CompressedCache}
    exec(source, names)
    press = take_press(utils.simple_parse_args_string(arguments))
    assert press is not None
    cache = press.make_cache()
    assert (cache.policy, cache.rules) == (names["cache"].policy, names["cache"].rules)
    assert cache.policy.label in source


def test_the_plan_of_a_sweep_is_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    section = text[text.index("## Sweeps") : text.index("## Agreement")]
    command, printed, _ = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    assert main([*command.split()[1:], "--dry-run"]) == 0
    assert capsys.readouterr().out == printed


def test_accuracy_beside_chance_is_computed(tmp_path: Path) -> None:
    def row(policy: str, accuracy: float, budget: int | None, protect: bool) -> dict[str, Any]:
        return {
            "policy": policy,
            "accuracy": accuracy,
            "budget": budget,
            "protect_prompt": protect,
        }

    document = json.loads((pages.RESULTS / "demo.json").read_text())
    document["rows"] = [row("full", 1.0, None, False)] + [
        row(policy, accuracy, 180, protect)
        for policy, accuracies in {
            "random": (0.5, 0.25),
            "knorm": (0.25, 0.0),
            "h2o": (0.5, 1.0),
            "tova": (0.75, 0.0),
        }.items()
        for protect, accuracy in zip((False, True), accuracies, strict=True)
    ]
    (tmp_path / "found.json").write_text(json.dumps(document))
    text = pages.accuracy(tmp_path / "found.json")
    assert "| `full` | 100% | 100% |" in text
    assert "| `knorm` | *25%* | *0%* |" in text
    assert "| `tova` | 75% | *0%* |" in text
    assert text.endswith("Worse than `random` in every column: `knorm`. In none: `h2o`.")
