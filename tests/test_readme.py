"""The README's examples run, and its tables are what the commands produce."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import compressed_cache
from bench import readme
from compressed_cache import CompressedCache, policies, telemetry
from compressed_cache.__main__ import main
from compressed_cache.integrations.harness.arguments import take_press
from tests.conftest import distinct_tokens

TEXT = (Path(__file__).parent.parent / "README.md").read_text()


def test_tables_are_produced_by_the_command() -> None:
    assert readme.filled(TEXT) == TEXT


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`:UserWarning")
def test_what_else_generate_can_do_runs(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = [
        code for code in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "drafter" in code
    ]
    monkeypatch.chdir(tmp_path)
    first, second, context, question = (distinct_tokens(1, n, seed=n) for n in (20, 30, 40, 5))

    names: dict[str, Any] = dict(model=model, torch=torch, CompressedCache=CompressedCache)
    names |= dict(first=first, second=second, context=context, questions=[question, second])
    names |= dict(inputs={"input_ids": first}, drafter=copy.deepcopy(model))
    for use in source.split("\n\n"):
        # Rows and files go on from the snapshots; of the drafts each line is a use of its own.
        for lines in use.splitlines() if "drafter" in use else [use]:
            if "batch_repeat" not in use:
                names["cache"] = CompressedCache("h2o", 16)
            exec(lines.replace("512", "8"), names)
            assert names["cache"].get_seq_length() >= 20 or lines.startswith("#")


def test_the_policy_of_the_readme_runs(model: LlamaForCausalLM) -> None:
    (source,) = [
        code for code in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "Norm(P" in code
    ]
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
    section = TEXT[TEXT.index("### Combine") : TEXT.index("### Coming from kvpress")]
    source, of_objects = re.findall(r"```python\n(.*?)```", section, re.S)
    (arguments,) = re.findall(r"```\n(kv_.*?)\n```", section, re.S)
    names: dict[str, Any] = {"CompressedCache": CompressedCache}
    exec(source, names)
    press = take_press(utils.simple_parse_args_string(arguments))
    assert press is not None
    cache = press.make_cache()
    assert (cache.policy, cache.rules) == (names["cache"].policy, names["cache"].rules)
    assert cache.policy.label in source
    names["MyPolicy"] = policies.POLICIES["knorm"]
    exec(of_objects, names)
    assert names["cache"].policy == policies.make_policy("knorm/h2o")


def test_every_class_that_an_example_calls_is_imported_in_one() -> None:
    code = "".join(re.findall(r"```python\n(.*?)```", TEXT, re.S))
    ours = {*compressed_cache.__all__, *vars(policies), *telemetry.__all__}
    called = {name for name in ours if re.search(rf"\b{name}\(", TEXT)} - {"decode", "compress"}
    assert called >= {"CompressedCache", "PrefillDecode", "H2O"}
    for name in called:
        assert re.search(rf"from compressed_cache\S* import .*\b{name}\b", code), name


def test_the_plan_of_a_sweep_is_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = TEXT[TEXT.index("## Sweeps") : TEXT.index("## Agreement")]
    command, printed, _ = re.findall(r"```\n(.*?)```", section, re.S)
    monkeypatch.chdir(tmp_path)
    assert main([*command.split()[3:], "--dry-run"]) == 0
    assert capsys.readouterr().out == printed


def test_accuracy_beside_chance_is_computed(tmp_path: Path) -> None:
    def row(policy: str, accuracy: float, budget: int | None, protect: bool) -> dict[str, Any]:
        return {
            "policy": policy,
            "accuracy": accuracy,
            "budget": budget,
            "protect_prompt": protect,
        }

    document = json.loads((readme.RESULTS / "demo.json").read_text())
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
    text = readme.accuracy(tmp_path / "found.json")
    assert "| `full` | 100% | 100% |" in text
    assert "| `knorm` | *25%* | *0%* |" in text
    assert "| `tova` | 75% | *0%* |" in text
    assert text.endswith("Worse than `random` in every column: `knorm`. In none: `h2o`.")
