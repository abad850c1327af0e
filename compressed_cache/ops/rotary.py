"""The rotary embedding of a layer, as far as it can be told for sure."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compressed_cache.versions import cache_parameter

STATIC = ("default", "linear", "llama3", "yarn")
"""Rope types whose frequencies do not depend on the length of the text."""


_TENSORS = ("frequencies", "partners", "signs")


class Rotary(NamedTuple):
    """Turns vectors to positions: ``x * cos + signs * x[partners] * sin``, per channel.

    Tensors only, so that a policy can keep them among its constants. A channel that is not rotated
    has frequency 0 and is its own partner, which is all there is to partial rotation and to layers
    without it.
    """

    frequencies: Tensor
    """``[D]`` float32, radians per token."""
    partners: Tensor
    """``[D]`` int64, the other channel of the pair."""
    signs: Tensor
    """``[D]`` float32: -1 for the first channel of a pair, 1 for the second."""
    scaling: float = 1.0
    """What the model multiplies the rotated channels with on top (other than 1 with YaRN)."""

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x`` turned by ``positions`` tokens, without the scaling; negative ones turn back.

        Args:
            x: ``[..., D]``.
            positions: broadcasts against ``[...]``. The angles are float32, as in transformers,
                but for positions in float64.

        Returns:
            ``[..., D]`` float32, or float64 where ``x`` or ``positions`` is.
        """
        precise = torch.float64 in (x.dtype, positions.dtype)
        return self.turn(x.double() if precise else x.float(), *self.turns(positions))

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[..., D]`` of positions ``[...]``, float32 but for float64 ones."""
        angles = torch.float64 if positions.dtype == torch.float64 else torch.float32
        angle = positions[..., None].to(angles) * self.frequencies.to(angles)
        return angle.cos(), angle.sin()

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` ``[..., D]`` turned by angles of these cosines and sines, in its dtype."""
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        partners = self.signs.to(x.dtype) * x.index_select(-1, self.partners)
        return torch.addcmul(x * cos, partners, sin)

    def scale(self) -> Tensor:
        """``[D]`` float32, the scaling of rotated channels and 1 for the others."""
        return torch.where(self.partners == _channels(self.partners), 1.0, self.scaling)

    def constants(self) -> dict[str, Tensor]:
        """Its tensors by name, for a policy; :meth:`among` finds them again."""
        return {name: getattr(self, name) for name in _TENSORS}

    @classmethod
    def among(cls, constants: Mapping[str, Tensor]) -> "Rotary":
        """What :meth:`constants` gave, without the scaling."""
        frequencies, partners, signs = (constants[name] for name in _TENSORS)
        return cls(frequencies, partners, signs)

    def to(self, device: torch.device) -> "Rotary":
        """The same on another device."""
        return self._replace(**{name: part.to(device) for name, part in self.constants().items()})


def rotary_of(config: Any, module: Any, layer: int, dim: int) -> Rotary:
    """How an attention module rotates its queries and keys.

    Frequencies are those of the config. Whether this layer rotates at all, and which channels it
    pairs, no config says, so the module itself is asked: it is run on one random token with all
    angles the same, up to the call of its attention function.

    Args:
        config: the model's text config.
        module: the attention module.
        layer: index of the layer.
        dim: ``D`` of queries and keys.

    Raises:
        NotImplementedError: positions that are not rotary, depend on the length of the text or
            rotate in an unknown way.
    """
    kind = type(module).__name__
    if "position_embeddings" not in inspect.signature(module.forward).parameters:
        raise NotImplementedError(
            f"this policy needs rotary position embeddings, but {kind} takes none. Use a policy "
            "that does not know about positions, such as 'snapkv'."
        )
    inverse, scaling = _inverse_frequencies(config, layer, dim)
    device = next(module.parameters()).device
    straight = _keys_at(module, config, layer, inverse, angle=0.0)
    turned = _keys_at(module, config, layer, inverse, angle=1.0)
    for pairs in (_half_split, _interleaved, _unrotated):
        rotary = pairs(inverse, dim, scaling)
        # All frequencies alike, as the module was given them.
        alike = rotary._replace(frequencies=(rotary.signs != 0).float())
        expected = alike.rotate(straight, torch.ones(()))
        # Wide enough for a model in bfloat16; a wrong pairing is off by about the norm.
        if (expected - turned).norm() <= 0.05 * straight.norm():
            return rotary.to(device)
    raise NotImplementedError(
        f"{kind} rotates neither halves nor neighbouring channels, so this policy cannot turn its "
        "keys. Use a policy that does not, such as 'snapkv'."
    )


def _inverse_frequencies(config: Any, layer: int, dim: int) -> tuple[Tensor, float]:
    if hasattr(config, "standardize_rope_params"):
        config.standardize_rope_params()
    parameters = getattr(config, "rope_parameters", None)
    types = getattr(config, "layer_types", None)
    layer_type = types[layer] if types else None
    if parameters and layer_type in parameters:
        parameters = parameters[layer_type]
    else:
        layer_type = None
    if not parameters:
        raise NotImplementedError(
            f"this policy needs rotary position embeddings, but the config of layer {layer} has "
            "no rope_parameters"
        )
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in STATIC:
        raise NotImplementedError(
            f"rope_type must be one of {', '.join(STATIC)}, whose angles depend on the position "
            f"alone, got {rope_type!r}"
        )
    if parameters.get("mrope_section"):
        raise NotImplementedError(
            "positions with several parts (mrope_section) are not the ones this cache counts"
        )
    if rope_type != "default":
        inverse, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, None, layer_type=layer_type)
        return inverse.float().cpu(), float(scaling)
    rotated = int(dim * parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
    return 1.0 / (parameters["rope_theta"] ** exponents), 1.0


def _half_split(inverse: Tensor, dim: int, scaling: float) -> Rotary:
    """Channel ``i`` with ``i + half``, as Llama."""
    first = torch.arange(len(inverse))
    return _paired(inverse, dim, scaling, first, first + len(inverse))


def _interleaved(inverse: Tensor, dim: int, scaling: float) -> Rotary:
    """Channel ``2 * i`` with ``2 * i + 1``, as GLM and Cohere."""
    first = 2 * torch.arange(len(inverse))
    return _paired(inverse, dim, scaling, first, first + 1)


def _unrotated(inverse: Tensor, dim: int, scaling: float) -> Rotary:
    """None, as in some layers of SmolLM3."""
    return Rotary(torch.zeros(dim), torch.arange(dim), torch.zeros(dim))


def _paired(inverse: Tensor, dim: int, scaling: float, first: Tensor, second: Tensor) -> Rotary:
    frequencies, partners, signs = torch.zeros(dim), torch.arange(dim), torch.zeros(dim)
    frequencies[first] = frequencies[second] = inverse
    partners[first], partners[second] = second, first
    signs[first], signs[second] = -1.0, 1.0
    return Rotary(frequencies, partners, signs, scaling)


def _channels(like: Tensor) -> Tensor:
    return torch.arange(like.shape[-1], device=like.device)


class _Seen(Exception):
    """Ends a forward pass as soon as the keys are there."""


class _Probe:
    """A cache that sees the keys of one call."""

    keys: Tensor

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> None:
        self.keys = keys
        raise _Seen


@torch.no_grad()
def _keys_at(module: Any, config: Any, layer: int, inverse: Tensor, *, angle: float) -> Tensor:
    """Keys ``[D]`` of a random token at this angle, float32 on the host."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    dtype = config.dtype if weight is None else weight.dtype
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1, config.hidden_size, generator=generator).to(device, dtype or None)
    name = cache_parameter(module)
    problem: Exception | None = None
    if name is not None:
        # Some models leave it to their attention to repeat the angles for both channels of a pair.
        for length in (2 * len(inverse), len(inverse)):
            probe = _Probe()
            full = torch.full((1, 1, length), angle, dtype=hidden.dtype, device=device)
            try:
                module(
                    hidden_states=hidden,
                    position_embeddings=(full.cos(), full.sin()),
                    attention_mask=None,
                    **{name: probe},
                )
            except _Seen:
                return probe.keys[0, 0, 0].float().cpu()
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                problem = error
    raise NotImplementedError(
        f"layer {layer}: {type(module).__name__} could not be asked how it rotates its keys, so "
        "this policy cannot work with it. Use one that does not turn keys, such as 'snapkv'."
    ) from problem
