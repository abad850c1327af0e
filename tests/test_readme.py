"""The README's examples run, and its tables are what the commands produce."""

import re
from pathlib import Path

from transformers import LlamaForCausalLM

from compressed_cache.bench import readme
from tests.conftest import distinct_tokens

TEXT = (Path(__file__).parent.parent / "README.md").read_text()


def test_tables_are_produced_by_the_command() -> None:
    assert readme.filled(TEXT) == TEXT


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
