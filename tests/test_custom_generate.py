"""``generate(custom_generate=FOLDER)`` with the folder that a hub could have."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, LlamaForCausalLM, dynamic_module_utils

from compressed_cache import POLICIES, CompressedCache, Policy
from compressed_cache.policies import MODIFIERS, make_policy, option_names
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.versions import CACHE, cache_argument
from tests.conftest import distinct_tokens

FOLDER = Path(__file__).parents[1] / "examples" / "hub"


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers copies the code there, and would import an older copy.
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))


def generated(model: LlamaForCausalLM, **arguments: Any) -> Any:
    return model.generate(  # pyright: ignore[reportCallIssue]
        distinct_tokens(1, 40),
        custom_generate=str(FOLDER),
        trust_remote_code=True,
        max_new_tokens=30,
        return_dict_in_generate=True,
        **arguments,
    )


@pytest.mark.parametrize("policy", ["h2o", make_policy("h2o")])
def test_a_folder_generates_what_a_cache_generates(
    policy: str | Policy, model: LlamaForCausalLM
) -> None:
    options: dict[str, Any] = dict(policy=policy, budget=16, recent=4, sinks=1)
    found = generated(model, **options)
    cache = CompressedCache(**options)
    expected = model.generate(distinct_tokens(1, 40), max_new_tokens=30, **cache_argument(cache))
    assert torch.equal(found.sequences, expected)
    held = found[CACHE]
    assert isinstance(held, CompressedCache)
    assert held.evicted_tokens == cache.evicted_tokens == 69 - 16
    assert (held.eviction.recent, held.eviction.sinks) == (4, 1)


def test_options_of_a_policy_are_its_own(model: LlamaForCausalLM) -> None:
    held = generated(model, policy="snapkv", budget=16, window=4)[CACHE]
    assert held.policy.options["window"] == 4


def test_what_nobody_knows_and_a_second_cache_are_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="windw"):
        generated(model, policy="snapkv", budget=16, windw=4)
    with pytest.raises(ValueError, match=f"^{CACHE} must be left out, a compressed cache takes"):
        generated(model, **cache_argument(CompressedCache()))


def test_no_option_of_a_policy_is_one_of_generate() -> None:
    known = set(vars(GenerationConfig()))
    known |= set(inspect.signature(GenerationMixin.generate).parameters)
    for name in [*POLICIES, *(f"h2o+{modifier}" for modifier in MODIFIERS)]:
        assert not known & {"policy", "budget", *option_names(name)}, name


def test_its_readme_runs_as_typed(capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.S)
    for name, value in {
        "Qwen/Qwen3-0.6B": str(MODEL_PATH),
        "PATH_OR_REPO": str(FOLDER),
        "How many primes are below 100?": "tax 9 goods 6",
        "2048": "20",
    }.items():
        assert name in source
        source = source.replace(name, value)
    exec(source, {})
    assert capsys.readouterr().out.startswith("<bos> tax 9 goods 6 ")
