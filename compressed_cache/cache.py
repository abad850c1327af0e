"""The public face: a transformers cache with a fixed number of slots per layer."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from compressed_cache import checks, hook
from compressed_cache.clock import Clock
from compressed_cache.layer import CompressedLayer
from compressed_cache.policies import Policy, make_policy
from compressed_cache.rules import Rules, resolve_rules


class CompressedCache(Cache):
    """Keeps the key-value cache of a model inside a fixed budget while it generates.

    Pass a fresh one to ``generate``; nothing else changes::

        model.generate(**inputs, past_key_values=CompressedCache(policy="snapkv", budget=256))

    In each decode step the victim is chosen from what was known before the step, the new token
    takes its slot, attention runs over at most ``budget`` tokens, the new one included, and the
    policy's state is updated. A prompt is attended in full by the model's own kernel, then its best
    ``budget`` tokens per key/value head are kept. Positions count real tokens from the left end of
    each row, so padding shifts nothing.

    Args:
        policy: a name from ``compressed_cache.POLICIES`` or a policy object.
        budget: slots per key/value head and layer, allocated once and never exceeded.
        interval: decode steps between two rankings. The ``interval`` lowest-ranked slots are
            overwritten in order until the next ranking and stay attended until then; where fewer
            are unprotected, the oldest of the recent ones follow. With 1 the victim is chosen anew
            in every step. None: the policy's default.
        sinks: positions below it are never evicted. None: the policy's default.
        recent: so many tokens before the incoming one are never evicted. None: the policy's
            default.
        protect_prompt: never evict a token of the prompt. None: the policy's default.
        config: the model's config, to refuse a model that cannot work before any work is done
            (otherwise the first forward does).
        policy_options: fields of the policy, with a policy given by name.

    Attributes:
        layers: one per attention layer, with ``keys`` and ``values`` ``[B, H, S, D]`` and
            ``positions`` ``[B, H, S]`` int64, ``-1`` where empty or padding. Slots are in no
            particular order.

    Raises:
        ValueError: an unknown policy, a value out of range, or a budget too small for what is
            protected.
        TypeError: an argument of the wrong type, or an unknown option.
        NotImplementedError: with ``config``, a model this cache cannot serve.
    """

    layers: list[CompressedLayer]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        policy: str | Policy = "snapkv",
        budget: int = 256,
        *,
        interval: int | None = None,
        sinks: int | None = None,
        recent: int | None = None,
        protect_prompt: bool | None = None,
        config: PreTrainedConfig | None = None,
        **policy_options: Any,
    ) -> None:
        self.policy = _policy(policy, policy_options)
        self.rules: Rules = resolve_rules(
            self.policy,
            budget=budget,
            interval=interval,
            sinks=sinks,
            recent=recent,
            protect_prompt=protect_prompt,
        )
        if config is not None:
            _check_config(config)
        super().__init__(layers=[])
        self.clock = Clock(self.rules.interval)
        hook.install()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes new keys and values ``[B, H, L, D]`` of one layer; called by the model."""
        while len(self.layers) <= layer_idx:
            self.layers.append(
                CompressedLayer(self.policy, self.rules, self.clock, len(self.layers))
            )
        layer = self.layers[layer_idx]
        if not torch.compiler.is_compiling():
            self.layers[layer_idx - 1].check_attended()
            if layer.is_filled:
                checks.check_batch(layer.keys, key_states)
        if layer_idx == 0:
            self._begin(key_states.shape[2])
        return layer.update(key_states, value_states)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask transformers builds before each step: the new tokens only.

        Which slots are visible is decided by the layers, so the mask is as small as can be. This is
        also where the host counts steps, because transformers asks for it between two of them.
        """
        if torch.compiler.is_compiling() or not self.layers:
            return query_length, 0
        self.layers[-1].check_attended()
        if not self._is_filled:
            return query_length, 0
        self._advance(query_length)
        return query_length, self.clock.tokens_seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included, whether they are still held or not."""
        if not self._is_filled:
            return 0
        if torch.compiler.is_compiling():
            # An int would be compiled in as a constant.
            return self.layers[0].tokens_seen  # pyright: ignore[reportReturnType]
        return self.clock.tokens_seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the text may grow without limit."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """True: ``generate`` may compile the decode step, as it does for its own static cache."""
        return True

    @property
    def evicted_tokens(self) -> int:
        """Tokens seen minus tokens held per head of the first layer; the most of all rows."""
        if not self._is_filled:
            return 0
        layer = self.layers[0]
        held = (layer.positions[:, 0] >= 0).sum(dim=-1)
        return int((layer.next_position - held).max())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, the policy's state included."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors())

    def reset(self) -> None:
        """Makes the cache as new, in place: buffers are kept for the next prompt."""
        self.clock.reset()
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Not supported: what a token overwrote is gone."""
        raise NotImplementedError(
            "CompressedCache cannot crop: the slots of removed tokens held evicted ones. Generate "
            "without assisted decoding or prompt lookup."
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not supported yet."""
        raise NotImplementedError(_FIXED_BATCH)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not supported yet."""
        raise NotImplementedError(_FIXED_BATCH)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not supported: this model has linear-attention layers."""
        raise NotImplementedError(_LINEAR)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not supported: this model has linear-attention layers."""
        raise NotImplementedError(_LINEAR)

    def __repr__(self) -> str:
        rules = ", ".join(f"{name}={value!r}" for name, value in vars(self.rules).items())
        policy = self.policy.name or type(self.policy).__name__
        return f"CompressedCache(policy={policy!r}, {rules}, tokens_seen={self.get_seq_length()})"

    @property
    def _is_filled(self) -> bool:
        return len(self.layers) > 0 and self.layers[0].is_filled

    def _begin(self, tokens: int) -> None:
        if not self.layers[0].is_filled:
            self.clock.prompt = tokens
            return
        if self.clock.running or tokens > 1:
            self._advance(tokens)
        self.clock.running = tokens

    def _advance(self, tokens: int) -> None:
        self.clock.tick()
        if not self.policy.evicts:
            for layer in self.layers:
                layer.grow(self.clock.tokens_seen + tokens)


_FIXED_BATCH = "CompressedCache cannot change its batch size. Repeat the inputs before the prompt."
_LINEAR = "CompressedCache does not support models with linear-attention layers."


def _policy(policy: Any, options: dict[str, Any]) -> Policy:
    if isinstance(policy, str):
        return make_policy(policy, **options)
    if not isinstance(policy, Policy):
        raise TypeError(
            f"policy must be a name or a Policy object, got {policy!r} ({type(policy).__name__})"
        )
    if options:
        raise TypeError(
            "policy options must be given to the policy object itself, got "
            f"{sorted(options)} beside {policy!r}"
        )
    return policy


def _check_config(config: PreTrainedConfig) -> None:
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise NotImplementedError("CompressedCache does not support encoder-decoder models.")
    others = sorted(
        {kind for kind in getattr(text, "layer_types", None) or [] if kind != "full_attention"}
    )
    if others:
        raise NotImplementedError(
            f"CompressedCache supports full-attention layers only, the model also has {others}."
        )
