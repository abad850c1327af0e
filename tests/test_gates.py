"""Gates of a file: trained on the shipped model, of other models, and how inputs reach them."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from compressed_cache import CompressedCache
from compressed_cache.hf import checks
from compressed_cache.hf.module_inputs import ModuleInput
from compressed_cache.policies import LayerContext, PrefillDecode, gate_file
from compressed_cache.policies.methods import learned_gate
from compressed_cache.policies.methods.learned_gate import LearnedGate
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.reasoner.problems import make_problem
from tests.compiling import CountingBackend, compiled
from tests.conftest import distinct_tokens, held
from tests.families import EACH_FAMILY, VOCABULARY, Family

HEADS, WIDTH = 2, 48


def _gate(layer: int, *, width: int = WIDTH, heads: int = HEADS) -> dict[str, Tensor]:
    """Linear in even layers, an MLP in odd ones."""
    generator = torch.Generator().manual_seed(layer)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    name = f"module_list.{layer}."
    if layer % 2 == 0:
        return {f"{name}weight": normal(heads, width), f"{name}bias": normal(heads)}
    return {
        f"{name}0.weight": normal(5, width),
        f"{name}0.bias": normal(5),
        f"{name}2.weight": normal(heads, 5),
        f"{name}2.bias": normal(heads),
    }


def _hooks(model: torch.nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) for part in model.modules())


def _generate(model: Any, ids: Tensor, cache: CompressedCache, **more: Any) -> Tensor:
    more = {"max_new_tokens": 20, "do_sample": False, **more}
    return model.generate(ids, past_key_values=cache, **more)


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = tmp_path / "gates.safetensors"
    save_file(_gate(0) | _gate(1), path)
    return str(path)


def test_what_is_noted_is_the_gate_of_what_the_module_was_given(
    make_model: Callable[..., LlamaForCausalLM], path: str
) -> None:
    """In chunks, in steps and with padding; nothing is evicted."""
    model, ids = make_model(), distinct_tokens(2, 20)
    given: dict[int, list[Tensor]] = {0: [], 1: []}
    for layer, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: given[layer].append(kwargs["hidden_states"]),
            with_kwargs=True,
        )
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    cache = CompressedCache("learned_gate", 64, weights=path)
    with torch.no_grad():
        for start, end in ((0, 9), (9, 16), (16, 17), (17, 18), (18, 20)):
            model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
    gates = _gate(0) | _gate(1)
    for layer in range(2):
        hidden = torch.cat(given[layer], dim=1).double()
        name, last = f"module_list.{layer}.", "2." if layer else ""
        if layer:
            hidden = hidden @ gates[f"{name}0.weight"].double().T + gates[f"{name}0.bias"]
            hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        expected = hidden @ gates[f"{name}{last}weight"].double().T + gates[f"{name}{last}bias"]
        tokens = cache.layers[layer].held()
        for row, padding in enumerate((0, 6)):
            for head in range(HEADS):
                positions = tokens.positions[row, head]
                found = torch.full((20 - padding,), torch.nan).index_put(
                    (positions[positions >= 0],), tokens.notes[row, head, positions >= 0, 0]
                )
                wanted = expected[row, padding:, head].float()
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("decay", [False, True])
def test_equal_hidden_states_have_equal_ratings_in_calls_of_every_shape(
    layer: int, decay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy: Any = LearnedGate(decay=decay)
    gate = {f"gate.{name.split('.', 2)[2]}": part.double() for name, part in _gate(layer).items()}
    states = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(5))

    def ratings(hidden: Tensor) -> Tensor:
        return policy.note(SimpleNamespace(constants=gate, hidden_states=hidden))[..., 0]

    expected = ratings(states[None])
    assert expected.dtype == torch.float32
    assert torch.equal(ratings(states.expand(3, -1, -1)), expected.expand(3, -1, -1))
    for token in range(50):
        assert torch.equal(ratings(states[None, token : token + 1])[..., 0], expected[..., token])
    monkeypatch.setattr(learned_gate, "_BLOCK_ELEMENTS", 7 * WIDTH)
    assert torch.equal(ratings(states[None]), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gates: {}, "got none"),
        (lambda gates: gates | {"gate.0": torch.ones(2)}, "got gate.0"),
        (lambda gates: {"module_list.0.weight": torch.ones(2, 48)}, "got weight of layer 0"),
    ],
)
def test_a_file_of_something_else_is_refused_at_once(
    tmp_path: Path, change: Callable[..., dict[str, Tensor]], message: str
) -> None:
    path = str(tmp_path / "other.safetensors")
    save_file(change(_gate(0)), path)
    with pytest.raises(ValueError, match=rf"must have tensors module_list.LAYER.*{message}$"):
        CompressedCache("learned_gate", 16, weights=path)


def test_other_arguments_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file of gates 'nowhere'"):
        CompressedCache("learned_gate", 16, weights="nowhere")
    with pytest.raises(FileNotFoundError, match="is a folder, not a file of gates"):
        CompressedCache("learned_gate", 16, weights=str(tmp_path))
    with pytest.raises(TypeError, match="weights must be a str or None, got 3"):
        CompressedCache("learned_gate", 16, weights=3)
    with pytest.raises(ValueError, match="activation must be one of 'gelu', 'relu', 'silu'"):
        CompressedCache("learned_gate", 16, activation="tanh")


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (_gate(0), "gates of a model of 2 layers, got none of layers .1."),
        (_gate(0) | _gate(1) | _gate(2), "gates of a model of 2 layers, got one of layer 2"),
        (_gate(0, heads=4) | _gate(1), "for 2 key/value heads and hidden states of 48, but weight"),
        (_gate(0) | _gate(1, heads=4), r"but 2.weight of layer 1 is \[4, 5\], not \[2, 5\]"),
        (
            _gate(0) | _gate(1) | {"module_list.0.bias": torch.tensor([0, torch.inf])},
            r"infinity in .*list.0.bias",
        ),
        (
            _gate(0) | _gate(1) | {"module_list.1.2.weight": torch.full((2, 5), torch.nan)},
            r"in .*list.1.2.weight",
        ),
        (
            _gate(0) | _gate(1) | {"module_list.1.0.bias": torch.tensor(1.0)},
            r"0.bias of layer 1 is \[\], not \[1\]",
        ),
        (_gate(0, width=32) | _gate(1), r"but weight of layer 0 is \[2, 32\], not \[2, 48\]"),
    ],
)
def test_gates_of_another_model_are_refused_at_the_first_prompt(
    model: LlamaForCausalLM, tmp_path: Path, gates: dict[str, Tensor], message: str
) -> None:
    path = str(tmp_path / "gates.safetensors")
    save_file(gates, path)
    cache = CompressedCache("learned_gate", 16, weights=path)
    with pytest.raises(ValueError, match=message):
        model(distinct_tokens(1, 20), past_key_values=cache)


@pytest.mark.real_statistics
def test_no_gates_are_refused_at_the_first_prompt(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="Pass weights=FILE"):
        model(distinct_tokens(1, 20), past_key_values=CompressedCache("learned_gate", 16))


def test_hooks_are_there_as_long_as_a_cache_wants_them(
    make_model: Callable[..., LlamaForCausalLM], path: str
) -> None:
    model, ids = make_model(), distinct_tokens(1, 30)
    _generate(model, ids, CompressedCache("h2o", 16))
    assert _hooks(model) == 0
    expected = [_generate(model, ids + n, CompressedCache("learned_gate", 16)) for n in range(2)]
    gc.collect()
    assert _hooks(model) == 0
    caches = [CompressedCache("learned_gate", 16) for _ in range(2)]
    texts = [_generate(model, ids + n, cache, max_new_tokens=10) for n, cache in enumerate(caches)]
    # The other one goes on, as does a copy that outlives what it is a copy of.
    caches[0] = copy.deepcopy(caches[0])
    gc.collect()
    for text, cache, whole in zip(texts, caches, expected, strict=True):
        assert torch.equal(_generate(model, text, cache, max_new_tokens=10), whole)
    del caches, cache
    gc.collect()
    assert _hooks(model) == 0


def test_a_cache_that_is_not_given_by_name_is_refused(model: LlamaForCausalLM) -> None:
    cache = CompressedCache("learned_gate", 16)
    with pytest.raises(NotImplementedError, match="layer 0 did not show its own: the cache must"):
        model.model(distinct_tokens(1, 20), None, None, cache)


@pytest.mark.slow
def test_new_caches_need_no_new_graph(make_model: Callable[..., LlamaForCausalLM]) -> None:
    torch._dynamo.reset()
    model, ids, backend = make_model(), distinct_tokens(2, 30), CountingBackend()
    expected = _generate(model, ids, CompressedCache("learned_gate", 16))
    caches = []
    for number in range(4):
        caches.append(CompressedCache("learned_gate", 16))
        got = _generate(model, ids, caches[-1], compile_config=compiled(backend))
        assert torch.equal(got, expected)
        if number == 1:
            caches.clear()
            gc.collect()
    assert backend.graphs == 1
    other = CompressedCache("h2o", 16)
    _generate(model, ids, other, compile_config=compiled(backend))
    assert backend.graphs == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_every_family_shows_its_inputs(family: Family) -> None:
    """A row with padding is what it is alone, in a prompt and in steps."""
    model = family.make()
    ids = torch.randperm(VOCABULARY - 1, generator=torch.Generator().manual_seed(1))[:24] + 1
    padded = torch.stack([ids, torch.cat([torch.zeros(9, dtype=torch.int64), ids[9:]])])
    caches = [CompressedCache("learned_gate", 16, decay=True) for _ in range(2)]
    together = _generate(model, padded, caches[0], attention_mask=(padded != 0).long())
    alone = _generate(model, ids[None, 9:], caches[1])
    assert torch.equal(together[1, 24:], alone[0, 15:])
    for layer, kind in enumerate(family.kinds):
        if kind == "full":
            assert caches[0].layers[layer].store.tokens.notes.abs().sum() > 0
            assert held(caches[0], layer, 1) == held(caches[1], layer)


def test_gradients_end_at_the_notes(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model, ids, cache = make_model(), distinct_tokens(1, 20), CompressedCache("learned_gate", 16)
    for part in (ids[:, :12], ids[:, 12:19], ids[:, 19:]):
        model(part, past_key_values=cache)
    assert not cache.layers[0].store.tokens.notes.requires_grad


def test_what_another_module_was_given_is_refused() -> None:
    modules, query = [torch.nn.Linear(1, 1) for _ in range(2)], torch.zeros(2, 4, 3, 8)
    shown = ModuleInput(modules[0], torch.zeros(2, 3, 16))
    checks.hidden_states(5, shown, modules[0], query)
    with pytest.raises(NotImplementedError, match="layer 5 did not show its own"):
        checks.hidden_states(5, shown, modules[1], query)
    with pytest.raises(NotImplementedError, match=r"2 rows and 3 tokens, layer 5 was given \[2, 1"):
        shown = ModuleInput(modules[0], torch.zeros(2, 1, 16))
        checks.hidden_states(5, shown, modules[0], query)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.real_statistics
def test_a_process_with_some_of_the_heads_has_their_gates(path: str, layer: int) -> None:
    context: Any = LayerContext(
        *(LlamaConfig(num_hidden_layers=2), None, layer, 1, 1, 1, 8, 8, torch.device("cpu")),
        total_heads=2,
        hidden_size=WIDTH,
    )
    loaded, gate = gate_file.load(path, context), _gate(layer)
    last = "2." if layer else ""
    for name in ("weight", "bias"):
        own = gate[f"module_list.{layer}.{last}{name}"][1:]
        assert torch.equal(loaded[f"{last}{name}"], own)
    if layer:
        assert torch.equal(loaded["0.weight"], gate["module_list.1.0.weight"])


def test_in_one_phase_gates_rate_as_alone(model: LlamaForCausalLM) -> None:
    ids = distinct_tokens(1, 30)
    mixed, alone = (
        CompressedCache(policy, 16, recent=0) for policy in ("h2o/learned_gate", "learned_gate")
    )
    with torch.no_grad():
        for cache in (mixed, alone):
            for token in (slice(0, 12), *(slice(n, n + 1) for n in range(12, 30))):
                model(ids[:, token], past_key_values=cache)
    assert [held(mixed, n) for n in range(2)] == [held(alone, n) for n in range(2)]


def test_gates_of_two_files_cannot_be_mixed(path: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other.safetensors")
    save_file(_gate(0) | _gate(1), other)
    with pytest.raises(ValueError, match="weights must be the same in both parts"):
        PrefillDecode(prompt=LearnedGate(weights=path), decoding=LearnedGate(weights=other))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Tensor], str]:
    """The shipped model, held-out texts and gates for it: least squares, from what attention
    modules are given to the logarithm of the attention that tokens receive per later query."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, attn_implementation="eager").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_PATH)
    texts = []
    for seed in range(24):
        problem = make_problem(seed, 10, split="training")
        texts.append(torch.tensor([tokenizer(f"{problem.prompt} {problem.trace}").input_ids]))
    inputs, wanted = _attended(model, texts[:18])
    gates = {}
    for layer, (x, y) in enumerate(zip(inputs, wanted, strict=True)):
        ones = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        solved = torch.linalg.solve(ones.T @ ones + 1e-2 * torch.eye(ones.shape[1]), ones.T @ y)
        gates[f"module_list.{layer}.weight"] = solved[:-1].T.contiguous()
        gates[f"module_list.{layer}.bias"] = solved[-1].contiguous()
    path = tmp_path_factory.mktemp("gates") / "gates.safetensors"
    save_file(gates, path)
    return model, texts[18:], str(path)


@torch.no_grad()
def _attended(model: Any, texts: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Of each layer what attention was given ``[N, E]`` and what tokens received ``[N, H]``."""
    layers = model.config.num_hidden_layers
    inputs: list[list[Tensor]] = [[] for _ in range(layers)]
    wanted: list[list[Tensor]] = [[] for _ in range(layers)]
    hooks = [
        block.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, own=own: own.append(kwargs["hidden_states"][0]),
            with_kwargs=True,
        )
        for block, own in zip(model.model.layers, inputs, strict=True)
    ]
    for ids in texts:
        weights = model(ids, output_attentions=True, use_cache=False).attentions
        later = ids.shape[1] - torch.arange(ids.shape[1])
        for own, rows in zip(wanted, weights, strict=True):
            received = rows[0].unflatten(0, (model.config.num_key_value_heads, -1)).sum(dim=2)
            own.append((received.mean(dim=1) / later).clamp(min=1e-6).log().T)
    for hook in hooks:
        hook.remove()
    return [torch.cat(own) for own in inputs], [torch.cat(own) for own in wanted]


def test_trained_gates_keep_what_is_attended(trained: tuple[Any, list[Tensor], str]) -> None:
    """On texts they have not seen they keep far more of the attention than chance."""
    model, texts, path = trained
    shares: dict[str, list[float]] = {"learned_gate": [], "random": []}
    for ids in texts:
        budget = ids.shape[1] // 4
        _, received = _attended(model, [ids])
        for policy, own in shares.items():
            options = {"weights": path} if policy == "learned_gate" else {}
            cache = CompressedCache(policy, budget, recent=0, **options)
            with torch.no_grad():
                model(ids, past_key_values=cache)
            for layer, wanted in zip(cache.layers, received, strict=True):
                attended = wanted.exp().T / wanted.exp().sum(dim=0)[:, None]
                own.append(float(attended.gather(1, layer.positions[0]).sum(dim=1).mean()))
    mean = {policy: sum(own) / len(own) for policy, own in shares.items()}
    assert mean["learned_gate"] > 2 * mean["random"]
