"""Each modifier over several policies: one graph, padded rows, broken tokens, many processes."""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache, compile_layers_once
from compressed_cache.policies import PrefillDecode, make_policy
from compressed_cache.versions import cache_argument
from tests.compiling import CountingBackend, compiled
from tests.conftest import distinct_tokens, held
from tests.families import EACH_FAMILY, VOCABULARY, Family
from tests.grids import alternating, slow_but

NAMES = (
    "snapkv+chunkkv",
    "h2o+chunkkv",
    "rkv+chunkkv",
    "snapkv+criticalkv",
    "h2o+criticalkv",
    "snapkv+criticalkv+chunkkv",
    "h2o+merging",
    "snapkv+chunk",
    "h2o+ams",
    "gkv+ams",
    "h2o+chunkkv+chunk",
    "snapkv+merging+chunkkv",
    "snapkv+ams+merging",
    "snapkv+criticalkv+merging+think",
    "tova+chunkkv+key_rerotation",
)
NEW = 30
# Several segments in few slots.
_SEGMENTS: dict[str, Any] = {"segment_mass": 0.1, "min_segment_length": 3, "mass_window": 4}
# Where a token with a broken key or value is the first to go.
_GIVEN_UP = (
    ("rkv+chunkkv", "k_proj"),
    ("snapkv+criticalkv", "v_proj"),
    ("h2o+criticalkv", "v_proj"),
    ("gkv+ams", "k_proj"),
    ("snapkv+criticalkv+chunkkv", "v_proj"),
)


@pytest.fixture
def backend() -> Iterator[CountingBackend]:
    torch._dynamo.reset()
    yield CountingBackend()
    torch._dynamo.reset()


def _cache(name: str, interval: int = 3) -> CompressedCache:
    return CompressedCache(name, 16, interval=interval, recent=8, **_options(name))


def _options(name: str) -> dict[str, Any]:
    return _SEGMENTS if "+ams" in name else {}


def _generate(model: Any, ids: torch.Tensor, cache: object, **more: Any) -> torch.Tensor:
    mask = (ids != 0).long()
    more = {"max_new_tokens": NEW, "do_sample": False, **more}
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **more)


def _padded(length: int) -> torch.Tensor:
    ids = distinct_tokens(3, length)
    ids[0, :11] = ids[2, :3] = 0
    return ids


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), alternating(NAMES, [(1, 1), (4, 2)]), ids=str)
def test_generate_compiles_once_and_never_again(
    model: LlamaForCausalLM, backend: CountingBackend, name: str, steps: tuple[int, int]
) -> None:
    """Steps: the interval, and how many graphs it needs."""
    interval, graphs = steps
    for length in (33, 13, 50):
        ids = _padded(length)
        eager, used = _cache(name, interval), _cache(name, interval)
        expected = _generate(model, ids, eager)
        assert torch.equal(_generate(model, ids, used, compile_config=compiled(backend)), expected)
        assert backend.graphs == graphs
        for layer in range(2):
            assert held(used, layer) == held(eager, layer)


# One with each modifier that does something in a step.
@pytest.mark.slow
@pytest.mark.parametrize("name", ("h2o+chunkkv+chunk", "snapkv+ams+merging", *NAMES[-2:]))
def test_layers_are_compiled_once(
    make_model: Callable[..., LlamaForCausalLM], backend: CountingBackend, name: str
) -> None:
    model, ids = make_model(num_hidden_layers=4), _padded(33)
    expected = _generate(model, ids, _cache(name))
    compile_layers_once(model)
    got = _generate(model, ids, _cache(name), compile_config=compiled(backend))
    assert torch.equal(got, expected)
    assert len(backend.regions) == 4
    assert len(set(backend.regions)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_further_prompts_and_chunked_ones_stay_within_the_budget(
    model: LlamaForCausalLM, name: str
) -> None:
    ids = distinct_tokens(2, 60)
    cache = _cache(name)
    with torch.no_grad():
        for start, end in ((0, 25), (25, 26), (26, 50), (50, 60)):
            logits = model(ids[:, start:end], past_key_values=cache).logits
            assert logits.isfinite().all()
    for layer in range(2):
        for head in held(cache, layer):
            assert len(head) == len(set(head)) == 16
            assert set(range(52, 60)) <= set(head)


@pytest.mark.parametrize(
    ("name", "broken", "interval"),
    slow_but(
        ("h2o+chunkkv", "h2o+merging", "snapkv+chunk", "snapkv+criticalkv+merging+think"),
        (
            (name, broken, (1, 4)[(number + own) % 2])
            for number, name in enumerate(NAMES)
            for own, broken in enumerate(("k_proj", "v_proj"))
        ),
    ),
)
def test_what_is_not_a_number_harms_neither_other_rows_nor_what_is_protected(
    model: LlamaForCausalLM, name: str, broken: str, interval: int
) -> None:
    """One token in the prompt of the first row goes wrong in the last layer."""
    ids = distinct_tokens(2, 60)
    rules: dict[str, Any] = dict(budget=24, interval=interval, sinks=2, recent=8)
    caches = [CompressedCache(name, **rules, **_options(name)) for _ in range(2)]

    def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        # key_rerotation asks the module for a single token to see how it rotates.
        if output.shape[1] == 1:
            return output
        output = output.clone()
        output[0, 5] = torch.nan
        return output

    with torch.no_grad():
        for cache, wrong in zip(caches, (False, True), strict=True):
            projection = getattr(model.model.layers[1].self_attn, broken)
            handle = projection.register_forward_hook(spoil) if wrong else None
            model(ids[:, :30], past_key_values=cache)
            if handle is not None:
                handle.remove()
            for token in range(30, 60):
                model(ids[:, token : token + 1], past_key_values=cache)
    good, bad = caches
    assert [held(good, layer, 1) for layer in range(2)] == [held(bad, layer, 1) for layer in (0, 1)]
    for head in held(bad, 1, 0):
        assert len(head) == len(set(head)) == 24
        assert {0, 1, *range(52, 60)} <= set(head)
        assert 5 not in head or (name, broken) not in _GIVEN_UP


def test_all_heads_hold_the_same_chunks(model: LlamaForCausalLM) -> None:
    ids = distinct_tokens(2, 60)
    cache = CompressedCache("snapkv+chunkkv", 20, chunk_length=5, recent=5, window=5)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for layer in range(2):
        first, second = held(cache, layer)
        assert first == second
        assert sorted({position // 5 for position in first}) == sorted(
            position // 5 for position in first[::5]
        )
    assert held(cache, 0) != held(cache, 1)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_criticalkv_finds_the_output_projection_of_every_family(family: Family) -> None:
    model = family.make()
    cache = CompressedCache("h2o+criticalkv", 16)
    _generate(model, distinct_tokens(2, 24) % (VOCABULARY - 1) + 1, cache)
    stores = [getattr(layer, "store", None) for layer in cache.layers]
    weights = [{} if store is None else store.bound.constants for store in stores]
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    for kind, constants in zip(family.kinds, weights, strict=True):
        assert len(constants) == (kind == "full")
        assert all(weight.data_ptr() in parameters for weight in constants.values())


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (None, "has none of o_proj"),
        (torch.nn.Identity(), "of layer 1 is a Identity, which is no linear layer.*Load the model"),
        (torch.nn.Linear(7, 48), r"linear layer of 48 inputs.*Linear in .*\[48, 7\]"),
        (torch.nn.Linear(48, 48, device="meta"), "on cpu, and it is on meta"),
    ],
)
def test_criticalkv_refuses_what_it_cannot_project(
    make_model: Callable[..., LlamaForCausalLM], projection: torch.nn.Module | None, message: str
) -> None:
    model: Any = make_model()
    model.model.layers[1].self_attn.o_proj = projection
    with pytest.raises(NotImplementedError, match=message):
        model(distinct_tokens(1, 20), past_key_values=CompressedCache("h2o+criticalkv", 16))


class _Adapted(torch.nn.Module):
    """A linear layer with adapters, with the attributes that those of peft have."""

    def __init__(self, base: torch.nn.Module, **changes: Any) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = {"one": 0.5, "two": -0.2, "three": 3.0}
        self.lora_variant: dict[str, object] = {}
        self.active_adapters = ["one", "two", "of other layers"]
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
        vars(self).update(changes)

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def get_delta_weight(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        # Some tokens gain and some lose, or the ranking would stay.
        return self.lora_A[name] * torch.randn(48, 48, generator=generator)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(states, self.expected())

    def expected(self) -> torch.Tensor:
        base: Any = self.base_layer
        weight = base.expected() if hasattr(base, "expected") else base.weight
        is_off, is_merged = self.disable_adapters, self.merged
        if is_off and is_merged:
            return weight - sum(self.get_delta_weight(name) for name in self.merged_adapters)
        if is_off or is_merged:
            return weight
        return weight + self.get_delta_weight("one") + self.get_delta_weight("two")


class _Packed(torch.nn.Linear):
    """As bitsandbytes keeps weights in 8 bits: codes, and a scale for each row."""

    def __init__(self, plain: torch.nn.Linear, *, is_called: bool) -> None:
        super().__init__(48, 48, bias=False)
        scale = plain.weight.detach().abs().amax(dim=1)
        codes = (plain.weight.detach() / scale[:, None] * 127).round().to(torch.int8)
        self.weight = torch.nn.Parameter(codes, requires_grad=False)
        self.state = SimpleNamespace(CB=None, SCB=None)
        holder: Any = self.state if is_called else self.weight
        holder.CB, holder.SCB = codes, scale

    def expected(self) -> torch.Tensor:
        holder: Any = self.weight if self.state.CB is None else self.state
        return holder.CB.float() * holder.SCB[:, None] / 127

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(states, self.expected())


class _Codes(torch.Tensor):
    """A tensor that knows how to give its numbers back."""

    def dequantize(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).float() * 2


class _Coded(torch.nn.Linear):
    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__(48, 48, bias=False)
        del self.weight
        self.weight: Any = (plain.weight.detach() * 64).round().to(torch.int8).as_subclass(_Codes)

    def expected(self) -> torch.Tensor:
        return self.weight.dequantize()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(states, self.expected())


@pytest.mark.parametrize(
    "wrap",
    [
        _Adapted,
        lambda plain: _Adapted(plain, merged_adapters=["one", "two"]),
        lambda plain: _Adapted(plain, disable_adapters=True),
        lambda plain: _Adapted(plain, disable_adapters=True, merged_adapters=["three"]),
        lambda plain: _Packed(plain, is_called=False),
        lambda plain: _Packed(plain, is_called=True),
        lambda plain: _Adapted(_Packed(plain, is_called=True)),
        _Coded,
    ],
    ids=["adapted", "merged", "off", "off though merged", "8 bits", "called", "both", "coded"],
)
@pytest.mark.parametrize("is_inference", [False, True])
def test_criticalkv_weighs_by_what_adapters_and_quantization_make_of_the_weight(
    make_model: Callable[..., LlamaForCausalLM], wrap: Callable[..., Any], is_inference: bool
) -> None:
    wrapped, plain = make_model(), make_model()
    for one, other in zip(wrapped.model.layers, plain.model.layers, strict=True):
        one.self_attn.o_proj = wrap(one.self_attn.o_proj)
        weight = one.self_attn.o_proj.expected()
        other.self_attn.o_proj.weight = torch.nn.Parameter(weight.detach().clone())
    caches = [CompressedCache("h2o+criticalkv", 16) for _ in range(2)]
    for model, cache in zip([wrapped, plain], caches, strict=True):
        with torch.inference_mode(is_inference):
            model(distinct_tokens(1, 40), **cache_argument(cache))
    for layer in range(2):
        one, other = (cache.layers[layer] for cache in caches)
        torch.testing.assert_close(
            one.store.bound.constants["output_projection"],
            other.store.bound.constants["output_projection"],
        )
        assert not one.store.bound.constants["output_projection"].is_inference()
        torch.testing.assert_close(
            one.store.tokens.notes[..., -1], other.store.tokens.notes[..., -1]
        )
        assert held(caches[0], layer) == held(caches[1], layer)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda plain: _Adapted(plain, lora_variant={"two": "DoRA"}),
            "is a tests._Adapted whose adapter is not a sum.*Merge it first.*merge_and_unload",
        ),
        (
            lambda plain: _Adapted(plain, get_delta_weight=lambda name: torch.eye(7)),
            "is a tests._Adapted whose adapter is not a sum",
        ),
        (
            lambda plain: _with_weight(torch.zeros(48, 48, dtype=torch.int8)),
            "is a Linear with a quantized weight in int8 .*Load the model without quantization",
        ),
        (
            lambda plain: _with_weight(torch.zeros(48, 48).to(torch.float8_e4m3fn)),
            "is a Linear with a quantized weight in float8_e4m3fn",
        ),
        (
            lambda plain: _Adapted(torch.nn.Identity()),
            "is a Identity, which is no linear layer",
        ),
    ],
)
def test_criticalkv_says_of_which_weight_it_cannot_know(
    make_model: Callable[..., LlamaForCausalLM], wrap: Callable[..., Any], message: str
) -> None:
    model: Any = make_model()
    model.model.layers[1].self_attn.o_proj = wrap(model.model.layers[1].self_attn.o_proj)
    with pytest.raises(NotImplementedError, match=f"^criticalkv needs .* of layer 1 {message}"):
        model(distinct_tokens(1, 20), **cache_argument(CompressedCache("h2o+criticalkv", 16)))


def _with_weight(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(48, 48, bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_policy("snapkv+chunkkv", chunk_length=0), "chunk_length must be >= 1"),
        (lambda: make_policy("h2o+merging", merge_threshold=2), "merge_threshold must be from 0"),
        (lambda: make_policy("h2o+merging", merge_fraction=0), "merge_fraction must be above 0"),
        (
            lambda: PrefillDecode(
                prompt=make_policy("snapkv+merging"), decoding=make_policy("h2o")
            ),
            "must merge in both phases",
        ),
        (lambda: make_policy("knorm+criticalkv"), "scores are attention.*'knorm'"),
        (lambda: make_policy("h2o+criticalkv+caote"), "scores are attention.*criticalkv"),
        (lambda: make_policy("h2o+criticalkv", first_stage_ratio=1.5), "from 0 to 1, got 1.5"),
        (
            lambda: make_policy("h2o+criticalkv", score_offset=-1),
            "score_offset must be finite and >= 0",
        ),
        (lambda: make_policy("h2o+criticalkv", score_offset=math.inf), "finite and >= 0, got inf"),
        (lambda: make_policy("expected_attention", epsilon=math.inf), "finite and >= 0, got inf"),
        (
            lambda: make_policy("snapkv+chunkkv+caote"),
            "caote scores each head on its own.*Write 'caote' before",
        ),
        (lambda: make_policy("tova+criticalkv"), "'tova' decides for all heads at once"),
        (lambda: make_policy("rpc+caote"), "'rpc' decides for all heads at once"),
        (
            lambda: PrefillDecode(
                prompt=make_policy("snapkv+chunkkv"), decoding=make_policy("h2o")
            ),
            "would keep other tokens in each head in one phase and the same in all heads",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_each_block_of_a_prompt_keeps_its_share(model: LlamaForCausalLM) -> None:
    """The last block is half as long as the others; a row with less text has fewer of them."""
    ids = distinct_tokens(2, 56)
    ids[1, :24] = 0
    cache = CompressedCache("h2o+chunk", 14, recent=0, block_length=16)
    with torch.no_grad():
        model(ids, attention_mask=(ids != 0).long(), past_key_values=cache)
    for layer in cache.layers:
        for row, shares in ((0, [4, 4, 4, 2]), (1, [7, 7, 0, 0])):
            for head in layer.positions[row]:
                assert torch.bincount(head // 16, minlength=4).tolist() == shares
