"""The README's examples run, and its tables are what the commands produce."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache
from compressed_cache.bench import readme
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
