"""Every family of models: the tokens of its own cache, exact padded batches, one graph."""

import pytest
import torch

from compressed_cache import CompressedCache, compile_layers_once
from tests.compiling import CountingBackend, compiled
from tests.conftest import held
from tests.families import EACH_FAMILY, FAMILIES, VOCABULARY, Family
from tests.grids import slow_but

PADDING = (9, 2, 0)
# One of each kind, and those whose layers cannot be compiled once.
_COMPILED_WHOLE = [
    pytest.param(one, id=one.name, marks=[] if one.name == "Gemma 3" else pytest.mark.slow)
    for one in FAMILIES
    if one.name in ("Llama 3", "Gemma 3", "Qwen3-Next")
    or (one.compiles and not one.compiles_layers)
]
NEW = 30


@pytest.fixture(params=EACH_FAMILY, scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def model(family: Family) -> object:
    return family.make()


def _prompts() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randperm(VOCABULARY - 1, generator=generator)[:24] + 1 for _ in PADDING]
    ids = torch.stack(rows)
    for row, padding in enumerate(PADDING):
        ids[row, :padding] = 0
    return ids, (ids != 0).long()


def _generate(model: object, cache: object, *, sample: bool = False, **more: object):
    ids, mask = _prompts()
    torch.manual_seed(5)
    arguments = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": sample, **more}
    return model.generate(ids, past_key_values=cache, **arguments)


def test_a_budget_for_everything_gives_the_tokens_of_the_own_cache(model: object) -> None:
    # Drawn, which tells of logits that differ too little for another token to be the likeliest.
    expected = _generate(model, None, sample=True)
    for policy in ("h2o", "rkv"):
        got = _generate(model, CompressedCache(policy, 24 + NEW), sample=True)
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("policy", "budget"),
    slow_but(("h2o",), [("h2o", 16), ("snapkv", 40)]),
    ids=["prompt above", "prompt below"],
)
def test_rows_of_a_padded_batch_are_what_they_are_alone(
    model: object, family: Family, policy: str, budget: int
) -> None:
    batch = CompressedCache(policy, budget, interval=3, protect_prompt=False)
    together = _generate(model, batch)
    ids, _ = _prompts()
    for row, padding in enumerate(PADDING):
        alone = CompressedCache(policy, budget, interval=3, protect_prompt=False)
        one = model.generate(
            ids[row : row + 1, padding:],
            past_key_values=alone,
            max_new_tokens=NEW,
            do_sample=False,
        )
        assert torch.equal(one[0, -NEW:], together[row, -NEW:])
        for layer, kind in enumerate(family.kinds):
            if kind != "linear":
                assert held(batch, layer, row) == held(alone, layer)


@pytest.mark.parametrize("budget", slow_but((16,), (16, 40)))
@pytest.mark.parametrize("family", _COMPILED_WHOLE, indirect=True)
def test_compiled_gives_what_eager_samples_in_one_graph(model: object, budget: int) -> None:
    torch._dynamo.reset()
    backend = CountingBackend()
    expected = _generate(model, CompressedCache("h2o", budget), sample=True)
    for _ in range(2):
        got = _generate(
            model,
            CompressedCache("h2o", budget),
            sample=True,
            compile_config=compiled(backend),
        )
        assert torch.equal(got, expected)
    assert backend.graphs == 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_layers_compiled_once_give_the_tokens_of_eager_in_one_graph(family: Family) -> None:
    if not family.compiles_layers:
        pytest.skip("its layers differ in what they are given")
    torch._dynamo.reset()
    model, backend = family.make(repeats=2), CountingBackend()
    expected = _generate(model, CompressedCache("h2o", 16))
    compile_layers_once(model)
    for _ in range(2):
        got = _generate(model, CompressedCache("h2o", 16), compile_config=compiled(backend))
        assert torch.equal(got, expected)
    assert backend.graphs == 1
    assert len(backend.regions) == 4
    assert len(set(backend.regions)) <= 2
    torch._dynamo.reset()


def test_only_full_attention_is_compressed_and_windows_are_kept_exactly(
    model: object, family: Family
) -> None:
    cache = CompressedCache("h2o", 16)
    _generate(model, cache)
    seen = 24 + NEW - 1
    assert [_kind(layer) for layer in cache.layers] == list(family.kinds)
    for layer, kind in enumerate(family.kinds):
        if kind == "linear":
            continue
        for row, padding in enumerate(PADDING):
            for head in held(cache, layer, row):
                if kind == "sliding":
                    assert head == list(range(seen - padding - family.window, seen - padding))
                else:
                    assert len(head) == 16
    first = family.kinds.index("full" if "full" in family.kinds else "sliding")
    assert cache.compressed_layer is cache.layers[first]
    smallest = 16 if "full" in family.kinds else family.window
    assert cache.evicted_tokens == seen - smallest


def test_after_a_reset_another_model_may_use_a_cache() -> None:
    models = {family.name: family.make() for family in FAMILIES if family.name in _CHANGES}
    cache = CompressedCache("h2o", 16)
    for name in _CHANGES:
        cache.reset()
        fresh = CompressedCache("h2o", 16)
        assert torch.equal(_generate(models[name], cache), _generate(models[name], fresh))
        assert [_kind(layer) for layer in cache.layers] == [_kind(layer) for layer in fresh.layers]
    cache.reset()
    hybrid = next(family for family in FAMILIES if family.name == "Qwen3-Next").make()
    # Older releases ask first whether the layer has a state, and refuse in their own words.
    refusal = "layer 0 held keys and values|has_previous_state. on layer index 0"
    with pytest.raises(ValueError, match=refusal):
        _generate(hybrid, cache)


# Sliding and full, full, sliding, full again.
_CHANGES = ("Gemma 3", "Llama 3", "Mistral", "Qwen3")


def _kind(layer: object) -> str:
    if not isinstance(getattr(layer, "keys", None), torch.Tensor):
        return "linear"
    return "sliding" if layer.is_sliding else "full"
