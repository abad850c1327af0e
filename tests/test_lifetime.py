"""What a cache holds is given back at once, and a copy of it works anywhere."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache, decode
from compressed_cache.layer import CompressedLayer
from compressed_cache.policies import Policy
from compressed_cache.policies.view import LayerContext, Slots
from compressed_cache.telemetry import Recorder, measure
from compressed_cache.versions import cache_argument
from tests.compiling import CountingBackend, compiled
from tests.conftest import distinct_tokens
from tests.families import FAMILIES
from tests.grids import slow_but
from tests.test_masks import LAYOUTS

IDS = distinct_tokens(2, 20)
COMPILED = compiled(CountingBackend())


@pytest.fixture
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _generate(model: Any, cache: CompressedCache, ids: Tensor = IDS, **options: Any) -> Tensor:
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    return model.generate(ids, **cache_argument(cache), **options)


def _live_bytes(references: list[weakref.ref[Tensor]]) -> int:
    return sum(tensor.nbytes for one in references if (tensor := one()) is not None)


def _tensors(cache: CompressedCache) -> list[weakref.ref[Tensor]]:
    return [weakref.ref(tensor) for layer in cache.layers for tensor in layer.tensors()]


def _twice(model: Any, cache: CompressedCache, **options: Any) -> None:
    _generate(model, cache, **options)
    cache.restore(cache.snapshot())
    model(IDS[:, :3], **cache_argument(cache))


WAYS: dict[str, Callable[..., Any]] = {
    "generate": _generate,
    "decode": lambda model, cache: _generate(model, cache, custom_generate=decode),
    "compiled": lambda model, cache: _generate(model, cache, compile_config=COMPILED),
    "assisted": lambda model, cache: _generate(
        model, cache, IDS[:1], prompt_lookup_num_tokens=3, max_new_tokens=12
    ),
    "beams": lambda model, cache: _generate(model, cache, num_beams=2),
    "turns": _twice,
}


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize(
    ("policy", "way"),
    slow_but(
        product(("full", "h2o", "snapkv", "shadowkv"), ("generate",)),
        # What a way holds on to is the same for any layout of slots.
        [
            *product(LAYOUTS, ("generate", "compiled", "turns")),
            *product(("h2o", "snapkv+adakv"), ("decode", "assisted", "beams")),
            ("shadowkv", "decode"),
        ],
    ),
)
def test_memory_is_given_back_with_the_last_reference(
    model: LlamaForCausalLM, policy: str, way: str
) -> None:
    torch._dynamo.reset()
    if way == "compiled":
        # Compilation leaves cycles of its own behind, once.
        first = CompressedCache(policy, **LAYOUTS[policy])
        WAYS[way](model, first)
        compiling = _tensors(first)
        del first
        gc.collect()
        assert _live_bytes(compiling) == 0
    cache = CompressedCache(policy, **LAYOUTS[policy], telemetry=way == "generate")
    WAYS[way](model, cache)
    references, layers = _tensors(cache), [weakref.ref(layer) for layer in cache.layers]
    assert _live_bytes(references) > 0
    del cache
    assert _live_bytes(references) == 0
    assert not any(layer() for layer in layers)


@pytest.mark.usefixtures("_no_collection")
def test_memory_of_sliding_windows_is_given_back() -> None:
    model = next(family for family in FAMILIES if family.config == "Gemma2Config").make()
    cache = CompressedCache("h2o", 64)
    _generate(model, cache, IDS % 150 + 1)
    references = _tensors(cache)
    del cache
    assert _live_bytes(references) == 0


@pytest.mark.usefixtures("_no_collection")
def test_those_who_watch_a_cache_keep_it_no_longer_than_themselves(model: LlamaForCausalLM) -> None:
    cache = CompressedCache("h2o", 16)
    recorder = Recorder(cache, shadow=True)
    with measure(model):
        _generate(model, cache)
    references = _tensors(cache)
    del cache
    assert recorder.trace().metadata["steps"] == 5
    assert _live_bytes(references) > 0
    del recorder
    assert _live_bytes(references) == 0


@pytest.mark.usefixtures("_no_collection")
def test_a_cache_does_not_keep_its_model(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model: Any = make_model()
    module, cache = weakref.ref(model.model.layers[0].self_attn), CompressedCache("h2o", 64)
    _generate(model, cache)
    gc.enable()
    del model
    gc.collect()
    assert module() is None and cache.get_seq_length() == 25


@pytest.mark.parametrize("policy", LAYOUTS)
def test_copies_go_on_by_themselves(model: LlamaForCausalLM, policy: str) -> None:
    cache = CompressedCache(policy, **LAYOUTS[policy], telemetry=True)
    text = _generate(model, cache)
    more = torch.cat([text, distinct_tokens(2, 4, seed=4)], dim=1)
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    saved = io.BytesIO()
    torch.save(cache, saved)
    saved.seek(0)
    copies.append(torch.load(saved, weights_only=False))
    expected = _generate(model, cache, more)
    for one in copies:
        held = [layer.tensors() for layer in cache.layers]
        before = [[tensor.clone() for tensor in tensors] for tensors in held]
        assert torch.equal(_generate(model, one, more), expected)
        for tensors, wanted in zip(held, before, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))


@pytest.mark.parametrize("saved", [copy.deepcopy, pickle.dumps], ids=lambda way: way.__name__)
@pytest.mark.parametrize("more", [1, 3])
def test_a_step_that_failed_leaves_nothing_behind(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, saved: Callable[..., Any], more: int
) -> None:
    """With gradients on, what it was given are tensors that cannot be copied."""
    cache, expected = CompressedCache("h2o", 16), CompressedCache("h2o", 16)
    for one in (cache, expected):
        model(IDS, **cache_argument(one))
    clean, nbytes = cache.snapshot(), cache.nbytes
    forward = CompressedLayer.forward

    def failing(layer: CompressedLayer, *args: Any, **options: Any) -> Any:
        if layer.index == 1:
            raise MemoryError
        return forward(layer, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(CompressedLayer, "forward", failing)
        model(IDS[:, :1], **cache_argument(cache))
    assert cache.nbytes == nbytes
    held = saved(cache)
    used = pickle.loads(held) if isinstance(held, bytes) else held
    used.restore(clean)
    tokens = distinct_tokens(2, more, seed=1)
    output = model(tokens, **cache_argument(used)).logits
    assert torch.equal(output, model(tokens, **cache_argument(expected)).logits)


def test_a_copy_is_of_the_same_model(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model, same = make_model(), make_model()
    other = make_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    cache = CompressedCache("h2o", 64)
    text = _generate(model, cache)
    more = torch.cat([text, distinct_tokens(2, 4, seed=4)], dim=1)
    saved = pickle.dumps(cache)
    expected = _generate(model, cache, more)
    assert torch.equal(_generate(same, pickle.loads(saved), more), expected)
    for wrong in (other, make_model(num_key_value_heads=4)):
        with pytest.raises(ValueError, match=r"must be (the one|those of the model) that read"):
            _generate(wrong, pickle.loads(saved), more)
    again = pickle.loads(pickle.dumps(pickle.loads(saved)))
    assert torch.equal(_generate(same, again, more), expected)


SCRIPT = """
import pickle, sys
import torch
with open(sys.argv[1], "rb") as file:
    model, cache, more = pickle.load(file)
argument = {sys.argv[2]: cache}
print(model.generate(more, **argument, max_new_tokens=6, do_sample=False).tolist())
"""


@pytest.mark.slow
def test_another_process_goes_on(
    make_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    model = make_model()
    cache = CompressedCache("snapkv", 24, window=4, interval=4)
    text = _generate(model, cache)
    more = torch.cat([text, distinct_tokens(2, 4, seed=4)], dim=1)
    with open(tmp_path / "cache", "wb") as file:
        pickle.dump((model, cache, more), file)
    name = next(iter(cache_argument(cache)))
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "cache"), name]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == str(_generate(model, cache, more).tolist())


@dataclass(frozen=True, kw_only=True)
class _Shifted(Policy):
    """Its only constant is a buffer of the model."""

    def constants(self, context: LayerContext) -> dict[str, Tensor]:
        return {"shift": context.module.shift}

    def scores(self, slots: Slots) -> Tensor:
        return -slots.keys.float().norm(dim=-1) * slots.constants["shift"]


def test_constants_of_another_model_change_neither_a_model_nor_a_snapshot(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    models = [make_model(), make_model()]
    for shift, model in enumerate(models):
        for layer in model.model.layers:
            layer.self_attn.register_buffer("shift", torch.tensor([float(shift)]))
    cache = CompressedCache(_Shifted(), 16)

    def constants() -> list[float]:
        return [store.bound.constants["shift"].item() for store in cache.stores()]

    with torch.inference_mode():
        _generate(models[0], cache)
    assert constants() == [0.0, 0.0]
    snapshot = cache.snapshot()
    cache.reset()
    _generate(models[1], cache)
    assert constants() == [1.0, 1.0]
    for shift, model in enumerate(models):
        assert [layer.self_attn.shift.item() for layer in model.model.layers] == [shift, shift]
    cache.restore(snapshot)
    assert constants() == [0.0, 0.0]
