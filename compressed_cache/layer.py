"""One attention layer as transformers calls it: it hands tokens to its store."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from compressed_cache.hf import attention_hook, checks
from compressed_cache.hf.binding import bind_module, rebind
from compressed_cache.hf.columns import Columns
from compressed_cache.hf.first_prompt import attend_first_prompt, implied_mask
from compressed_cache.hf.module_identity import ModuleIdentity
from compressed_cache.hf.module_inputs import ModuleInput
from compressed_cache.observers import Observer
from compressed_cache.ops import gradients, masks
from compressed_cache.ops.tokens import Tokens
from compressed_cache.policies.base import Policy
from compressed_cache.policies.capabilities import needs_of
from compressed_cache.policies.eviction_config import EvictionConfig
from compressed_cache.snapshot import LayerState
from compressed_cache.step_counter import StepCounter
from compressed_cache.stores import store_for
from compressed_cache.stores.bound_policy import BoundPolicy
from compressed_cache.stores.call import read_call
from compressed_cache.stores.decode_step import decode_step
from compressed_cache.stores.inputs import AttentionInputs, NewToken

_AS_IT_IS = nullcontext()


class CompressedLayer(CacheLayerMixin):
    """Keys and values of one attention layer in a fixed number of slots.

    A prompt (the first call) is attended in full, as the model does, then scored and cut to the
    budget. After that, each token overwrites the slot of a victim and attends over the slots. A
    layer with a sliding window has as many slots as its window, and the oldest token is the victim.

    Attributes:
        index: of the layer.
        store: where the tokens are; None before the first prompt, when it is chosen by what the
            attention module is like.
    """

    is_compileable = True
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        policy: Policy,
        eviction: EvictionConfig,
        counter: StepCounter,
        columns: Columns,
        index: int,
        readers: Sequence[Observer] = (),
    ) -> None:
        self.settings = policy, eviction
        self.counter = counter
        self.columns = columns
        self.index = index
        self.readers = readers
        """Those who are told what is read."""
        # Any: None before the first prompt, and the type checker would ask at each use.
        self.store: Any = None
        self.module = ModuleIdentity()
        self.needs_hidden_states = needs_of(policy).hidden_states
        self.is_filled = False
        self._forget_call()

    # What users look at.

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[B, H, S, D]``, ``[B, 1, P, D]`` of a pool; None before the first prompt."""
        return self.store.tokens.keys if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[B, H, S, D]``, in the slots of :attr:`keys`."""
        return self.store.tokens.values if self.is_initialized else None

    @property
    def positions(self) -> Tensor | None:
        """``[B, H, S]`` int64, in the slots of :attr:`keys`; negative where a slot is empty."""
        return self.store.tokens.positions if self.is_initialized else None

    def tensors(self) -> list[Tensor]:
        """Everything in memory."""
        return [] if self.store is None else list(self.store.named_tensors().values())

    def held(self) -> Tokens:
        """What each head holds, ``[B, H, S, ...]``; only after a prompt."""
        return self.store.held()

    @property
    def is_sliding(self) -> bool:
        """Whether this layer sees a window of the text only."""
        return self.store is not None and self.store.bound.window is not None

    @property
    def is_initialized(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether there is memory."""
        return self.store is not None and self.store.sizes is not None

    # What transformers calls.

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes new keys and values ``[B, H, L, D]``.

        Returns:
            Tensors tagged for :meth:`forward`: in a decode step those of the slots, else the same.
        """
        is_eager = not torch.compiler.is_compiling()
        if is_eager:
            self.awaits_attention = True
        if self.is_filled:
            held = self.store.tokens
            if (key_states.dtype, value_states.dtype) != (held.keys.dtype, held.values.dtype):
                key_states, value_states = self.store.cast(key_states, value_states)
                held = self.store.tokens
            if key_states.shape[2] == 1:
                # Written when the query is at hand, so that one kernel can do both.
                self.incoming = key_states, value_states
                self.handed = (held.values,) if is_eager else ()
                return held.keys, held.values
        # That of a step that failed is not of this call.
        self.incoming = None
        self.handed = (value_states,) if is_eager else ()
        attention_hook.Owner(self).tag(key_states)
        return key_states, value_states

    def forward(
        self,
        function: Callable[..., Any],
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the new tokens, in place of the model's ``function``.

        Args:
            function: the model's own attention function, used for the prompt.
            module: the attention module.
            query: ``[B, H * G, L, D]``.
            key: what :meth:`update` returned.
            value: likewise.
            attention_mask: the model's mask. Of a decode step it is read where it says more than
                whether the token itself is padding only outside of compiled graphs.
            scaling: factor of the logits, ``D ** -0.5`` if None.
            kwargs: passed on to ``function``.

        Returns:
            The output ``[B, L, H * G, D]`` and the attention weights, if at hand: of a first prompt
            those of ``function``; later, with ``attn_implementation="eager"``, ``[B, H * G, L, S]``
            float32 over the slots of a decode step, or ``[B, H * G, L, S + L]`` over the slots as
            they were and then the new tokens where several come at once.
        """
        is_eager = not torch.compiler.is_compiling()
        if is_eager:
            (handed,), self.handed = self.handed or (None,), ()
            are_own = value is handed
            checks.check_handed(self.index, awaits=self.awaits_attention, values_are_own=are_own)
        is_single = self.is_filled and query.shape[2] == 1 and not self.counter.in_parts
        if not is_single or masks.is_wide(attention_mask):
            return self._read(function, module, query, key, value, attention_mask, scaling, kwargs)
        if is_eager:
            self.awaits_attention = False
            with self.counter.unless_refused():
                checks.check_module(self.module, module, kwargs)
            self.progress += 1
        assert self.incoming is not None
        (key, value), self.incoming = self.incoming, None
        real = self.columns.real_of_step(attention_mask, query.shape[0])
        token = NewToken(
            *(query, key, value, self.counter.ranks, _wants_weights(module), real),
            hidden_states=self._hidden_states(module, query),
        )
        with _exact(query.device):
            output, weights = decode_step(self.store, token)
        if output.dtype != query.dtype:
            output = output.to(query.dtype)
        if gradients.wants_gradient(key, value):
            self.store.has_gradients = True
        if is_eager:
            self.progress += 1
        if is_eager and self.readers:
            if real is None:
                real = torch.ones(query.shape[0], dtype=torch.bool, device=query.device)
            self._tell(
                AttentionInputs(query, key, value, real[:, None], hidden_states=token.hidden_states)
            )
        return output.transpose(1, 2), None if weights is None else weights.flatten(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask transformers builds: see ``CompressedCache``."""
        return query_length, self.counter.tokens_seen

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.counter.tokens_seen if self.is_filled else 0

    def get_max_length(self) -> int:
        """-1: the text may grow without limit."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Never called: what to allocate depends on the queries too, see :meth:`forward`."""
        raise NotImplementedError("slots are allocated when the prompt is attended")

    def reset(self, *, keeps_module: bool = False) -> None:
        """Forgets the tokens and keeps the memory; any model may come next, unless one is kept."""
        if not keeps_module:
            self.module.reset()
        self._forget_call()
        self.is_filled = False
        if self.store is not None:
            self.store.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become copies of the rows ``beam_idx`` ``[B]``, in place."""
        if self.store is not None:
            self.store.reorder(beam_idx)

    def __getstate__(self) -> dict[str, Any]:
        # Keys that were given and never attended are of a call that failed.
        return vars(self) | {"handed": (), "incoming": None, "shown": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.store is not None:
            self.store.tag = attention_hook.Owner(self).tag
            if self.store.sizes is not None:
                self.store.mark()

    # What the cache calls.

    def check_attended(self) -> None:
        """Raises if the last keys this layer was given were never attended through it."""
        awaits, self.awaits_attention = self.awaits_attention, False
        checks.check_attended(self.index, awaits=awaits)

    def state(self) -> LayerState | None:
        """A copy of what is held, None of nothing."""
        return LayerState.of(self.store) if self.is_filled else None

    def restore(self, state: LayerState) -> None:
        """Holds again what ``state`` says, in place where it fits."""
        shard = None if self.store is None else self.store.bound.shard
        self._bind(rebind(*self.settings, self.index, state, shard))
        store: Any = self.store
        store.load(state.tensors, state.sizes)
        store.has_gradients = False
        self._forget_call()
        self.is_filled = True

    def replay(self, inputs: AttentionInputs) -> None:
        """Reads tokens once more, of a call that was taken back."""
        read_call(self.store, inputs, self.counter, is_filled=self.is_filled)
        self.is_filled = True

    # A prompt, and everything else that is not one token per row.

    @torch.compiler.disable(reason=attention_hook.PROMPTS)
    def _read(
        self,
        function: Callable[..., Any],
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        self.awaits_attention = False
        if self.incoming is not None:
            (key, value), self.incoming = self.incoming, None
        with self.counter.unless_refused():
            seen = self.counter.tokens_seen - key.shape[2]
            attention_mask = implied_mask(module, key, attention_mask, kwargs)
            mask = masks.read_mask(attention_mask, key, seen=seen, is_built=self.columns.is_built)
            real = masks.real_tokens(attention_mask, key)
            count = self.counter.prompt_tokens
            hidden = self._hidden_states(module, query)
            inputs = AttentionInputs(query, key, value, real, mask, hidden)
            if self.is_filled:
                checks.check_module(self.module, module, kwargs)
                before = self.store.next_position
                if count and self.counter.is_first_prompt:
                    self._check_prompt(before + real[:, :count].sum(dim=1))
                self.columns.extend(real, seen=seen, next_position=before)
                if mask is not None:
                    columns = self.columns.until(seen + key.shape[2], before)
                    inputs = inputs._replace(mask=mask._replace(real=columns))
                self.progress += 1
                result = observed = None
            else:
                checks.check_first_prompt(self.settings[0], seen)
                self.columns.begin_text(real)
                checks.check_attention(self.index, module, kwargs)
                checks.check_function(function, module)
                arguments = {"scaling": scaling, **kwargs}
                self._bind(bind_module(*self.settings, self.index, module, inputs, arguments))
                self._check_prompt(real[:, :count].sum(dim=1))
                result, observed = attend_first_prompt(
                    function, module, self.store, inputs, attention_mask, count, **arguments
                )
        with _exact(query.device):
            output, weights = read_call(
                self.store,
                inputs,
                self.counter,
                observed,
                is_filled=self.is_filled,
                wants_weights=_wants_weights(module),
            )
        self.progress += 1 if self.is_filled else 2
        self.is_filled = True
        if output is not None:
            output = output.to(query.dtype)
            result = (output if result is None else torch.cat([result[0], output], dim=1)), weights
        assert result is not None
        self.module.bind(module)
        self.store.has_gradients |= gradients.wants_gradient(key, value)
        if self.readers:
            self._tell(inputs)
        return result

    def _hidden_states(self, module: Any, query: Tensor) -> Tensor | None:
        """What the attention module was given, ``[B, L, E]``, if the policy needs it."""
        shown, self.shown = self.shown, None
        if not self.needs_hidden_states:
            return None
        return checks.hidden_states(self.index, shown, module, query)

    def _check_prompt(self, lengths: Tensor) -> None:
        bound: BoundPolicy = self.store.bound
        if bound.policy.evicts:
            checks.check_prompt(lengths, bound.policy, bound.eviction, bound.budget, bound.place)

    def _tell(self, inputs: AttentionInputs) -> None:
        for reader in self.readers:
            reader.layer_read(self, inputs.detach())

    def _forget_call(self) -> None:
        self.progress = 0
        """Two for each call that is not compiled: one before it is read, one after."""
        self.awaits_attention = False
        # In a tuple: a tensor would be one of those this layer keeps.
        self.handed: tuple[Tensor, ...] = ()
        self.incoming: tuple[Tensor, Tensor] | None = None
        self.shown: ModuleInput | None = None

    def _bind(self, bound: BoundPolicy) -> None:
        store: Any = self.store
        kind, settings = store_for(bound), (bound.policy, bound.eviction)
        if type(store) is kind and (store.bound.policy, store.bound.eviction) == settings:
            store.rebind(bound)
        else:
            self.store = kind(bound, attention_hook.Owner(self).tag)


def _wants_weights(module: Any) -> bool:
    """Whether the model wants attention weights, which only its eager attention gives."""
    return checks.implementation_of(module) == "eager"


def _exact(device: torch.device) -> AbstractContextManager[Any]:
    """Work in the precision written down, also where the model is under autocast."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _AS_IT_IS
