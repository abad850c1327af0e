"""Rotary embeddings told from config and module, against the model's own angles."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from compressed_cache.ops.rotary import Rotary, rotary_of
from tests.families import FAMILIES, LINEAR, VOCABULARY, Family

LENGTH = 200
SCALED = {
    "linear": dict(rope_type="linear", factor=4.0),
    "llama3": dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "yarn": dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=64),
}


def scaled(name: str, **more: Any) -> Family:
    parameters = dict(rope_theta=1e4, **SCALED.get(name, dict(rope_type=name)), **more)
    return Family(name, "LlamaConfig", dict(rope_parameters=parameters))


WITH_OTHERS = (
    *(family for family in FAMILIES if family.turns),
    *map(scaled, SCALED),
    Family("Cohere 2", "Cohere2Config", dict(layer_types=["sliding_attention", "full_attention"])),
)


class Stop(Exception):
    pass


class Probe:
    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> None:
        self.keys = keys
        raise Stop


def keys_of(module: Any, arguments: dict[str, Any], angles: Any) -> Tensor:
    probe = Probe()
    name = next(name for name in ("past_key_values", "cache") if name in arguments)
    with pytest.raises(Stop):
        module(**{**arguments, name: probe, "position_embeddings": angles})
    return probe.keys


@pytest.mark.parametrize("family", WITH_OTHERS, ids=lambda family: family.name)
@torch.no_grad()
def test_keys_are_turned_as_the_model_turns_them(family: Family) -> None:
    model = family.make()
    calls: dict[int, tuple[Any, dict[str, Any]]] = {}

    def note(module: Any, positional: Any, arguments: dict[str, Any]) -> None:
        names = ("hidden_states", "position_embeddings", "attention_mask")
        calls[module.layer_idx] = module, {**dict(zip(names, positional)), **arguments}  # noqa: B905

    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(note, with_kwargs=True)
    model(torch.arange(LENGTH)[None] % VOCABULARY, use_cache=True)
    seen = dict(calls)
    assert sorted(seen) == [i for i, kind in enumerate(family.kinds) if kind != LINEAR]
    for layer, (module, arguments) in seen.items():
        cos, sin = arguments["position_embeddings"]
        straight = keys_of(module, arguments, (torch.ones_like(cos), torch.zeros_like(sin)))
        turned = keys_of(module, arguments, (cos, sin))
        rotary = rotary_of(model.config.get_text_config(), module, layer, straight.shape[-1])
        found = rotary.rotate(straight, torch.arange(LENGTH)) * rotary.scale()
        # transformers multiplies by the scaling in float32.
        exact = family.dtype == torch.float64 and rotary.scaling == 1
        tolerance = 1e-10 if exact else 1e-5
        torch.testing.assert_close(found.to(turned.dtype), turned, rtol=0, atol=tolerance)
        back = rotary.rotate(turned / rotary.scale(), -torch.arange(LENGTH))
        # Squares of a cosine and a sine in float32 do not quite add up to 1.
        torch.testing.assert_close(back.to(turned.dtype), straight, rtol=1e-6, atol=1e-5)
        if not torch.equal(straight, turned):
            assert rotary.frequencies.any()


def attention_of(model: Any) -> Any:
    return model.model.layers[0].self_attn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_of_low_precision_is_told_apart(dtype: torch.dtype) -> None:
    for name in ("Llama 3", "GLM-4", "SmolLM3"):
        model = next(family for family in FAMILIES if family.name == name).make()
        for layer in range(2):
            module = model.model.layers[layer].self_attn
            expected = rotary_of(model.config, module, layer, 8)
            found = rotary_of(model.config, module.to(dtype), layer, 8)
            assert torch.equal(found.partners, expected.partners)
            assert torch.equal(found.frequencies, expected.frequencies)


def test_layers_have_the_angles_of_their_type() -> None:
    model = next(family for family in FAMILIES if family.name == "Gemma 3").make()
    sliding, full = (
        rotary_of(model.config, model.model.layers[i].self_attn, i, 8) for i in range(2)
    )
    assert sliding.frequencies[1] > full.frequencies[1]


def test_float64_positions_have_float64_angles() -> None:
    family = dataclasses.replace(FAMILIES[0], dtype=torch.float32)
    model = family.make()
    rotary = rotary_of(model.config, attention_of(model), 0, 8)
    x, far = torch.randn(8, dtype=torch.float64), torch.tensor(100_003)
    angle = far.double() * rotary.frequencies.double()[:4]
    pair = torch.complex(x[:4], x[4:]) * torch.polar(torch.ones_like(angle), angle)
    precise = rotary.rotate(x, far.double())
    torch.testing.assert_close(precise, torch.cat([pair.real, pair.imag]), rtol=0, atol=1e-12)
    assert (rotary.rotate(x, far) - precise).abs().max() > 1e-5


def test_angles_that_depend_on_the_length_are_refused() -> None:
    model: LlamaForCausalLM = scaled("dynamic", factor=2.0).make()
    with pytest.raises(NotImplementedError, match=r"rope_type must be one of .*, got 'dynamic'"):
        rotary_of(model.config, attention_of(model), 0, 8)
    factors = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    model = scaled("longrope", **factors, original_max_position_embeddings=64, factor=8.0).make()
    with pytest.raises(NotImplementedError, match="got 'longrope'"):
        rotary_of(model.config, attention_of(model), 0, 8)


def test_other_positions_are_refused() -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCABULARY)
    model = GPT2LMHeadModel(config)
    with pytest.raises(NotImplementedError, match="GPT2Attention takes none"):
        rotary_of(config, model.transformer.h[0].attn, 0, 16)
    mixed: Any = scaled("linear", mrope_section=[2, 1, 1]).make()
    with pytest.raises(NotImplementedError, match="mrope_section"):
        rotary_of(mixed.config, attention_of(mixed), 0, 8)


def test_a_pairing_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[0].make()
    from transformers.models.llama import modeling_llama

    def backwards(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([second, -first], dim=-1)

    monkeypatch.setattr(modeling_llama, "rotate_half", backwards)
    with pytest.raises(NotImplementedError, match="neither halves nor neighbouring"):
        rotary_of(model.config, attention_of(model), 0, 8)


def test_a_module_that_cannot_be_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[0].make()
    monkeypatch.setattr(model.config, "hidden_size", 5)
    with pytest.raises(NotImplementedError, match="layer 0: LlamaAttention could not be asked"):
        rotary_of(model.config, attention_of(model), 0, 8)


def test_what_is_not_rotated_is_left_alone() -> None:
    rotary = Rotary(torch.zeros(4), torch.arange(4), torch.zeros(4), 3.0)
    x = torch.randn(5, 4)
    assert torch.equal(rotary.rotate(x, torch.arange(5)), x)
    assert torch.equal(rotary.scale(), torch.ones(4))
