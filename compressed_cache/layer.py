"""One attention layer as transformers calls it: it hands tokens to its store."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from compressed_cache.hf import attention_hook, checks
from compressed_cache.hf.columns import Columns
from compressed_cache.hf.module_identity import ModuleIdentity
from compressed_cache.observers import Observer
from compressed_cache.ops import gradients, masks
from compressed_cache.ops.attention import LogitTransform
from compressed_cache.ops.tensor_parallel import Shard
from compressed_cache.ops.tokens import Tokens
from compressed_cache.policies.base import Policy
from compressed_cache.policies.budgets import is_per_head
from compressed_cache.policies.capabilities import SharesBudget, find, find_store
from compressed_cache.policies.eviction_config import EvictionConfig, share_budget
from compressed_cache.policies.methods.streaming_llm import StreamingLLM
from compressed_cache.policies.view import LayerContext
from compressed_cache.snapshot import LayerState
from compressed_cache.step_counter import StepCounter
from compressed_cache.stores import STORES
from compressed_cache.stores.bound_policy import BoundPolicy
from compressed_cache.stores.decode_step import decode_step
from compressed_cache.stores.inputs import AttentionInputs, NewToken
from compressed_cache.stores.prefill import prefill, prefill_chunk
from compressed_cache.stores.slots import SlotStore

_AS_IT_IS = nullcontext()


class CompressedLayer(CacheLayerMixin):
    """Keys and values of one attention layer in a fixed number of slots.

    A prompt (the first call) is attended by the model's own function, then scored and cut to the
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
        self.is_filled = False
        self._forget_call()

    # What users look at.

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[B, H, S, D]``, ``[B, 1, P, D]`` of a pool; None before the first prompt."""
        return None if self.store is None else self.store.tokens.keys

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[B, H, S, D]``, in the slots of :attr:`keys`."""
        return None if self.store is None else self.store.tokens.values

    @property
    def positions(self) -> Tensor | None:
        """``[B, H, S]`` int64, in the slots of :attr:`keys`; negative where a slot is empty."""
        return None if self.store is None else self.store.tokens.positions

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
        return self.store is not None

    # What transformers calls.

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes new keys and values ``[B, H, L, D]``; returns them tagged for :meth:`forward`."""
        is_eager = not torch.compiler.is_compiling()
        if is_eager:
            self.awaits_attention = True
        if self.is_filled:
            held = self.store.tokens
            if (key_states.dtype, value_states.dtype) != (held.keys.dtype, held.values.dtype):
                key_states, value_states = self._cast(key_states, value_states)
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
        is_step = self.is_filled and query.shape[2] == 1 and not masks.is_wide(attention_mask)
        if not is_step:
            return self._read(function, module, query, key, value, attention_mask, scaling, kwargs)
        if is_eager:
            self.awaits_attention = False
            checks.check_module(self.module, module)
            self.calls += 1
        assert self.incoming is not None
        (key, value), self.incoming = self.incoming, None
        real = self.columns.real_of_step(attention_mask, query.shape[0])
        token = NewToken(query, key, value, self.counter.ranks, _wants_weights(module), real)
        with _exact(query.device):
            output, weights = decode_step(self.store, token)
        if output.dtype != query.dtype:
            output = output.to(query.dtype)
        if gradients.wants_gradient(key, value):
            self.store.has_gradients = True
        if is_eager and self.readers:
            if real is None:
                real = torch.ones(query.shape[0], dtype=torch.bool, device=query.device)
            self._tell(AttentionInputs(query, key, value, real[:, None]))
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

    def reset(self) -> None:
        """Forgets the tokens and keeps the memory; any model may come next."""
        self.module.clear()
        self.empty()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become copies of the rows ``beam_idx`` ``[B]``, in place."""
        if self.store is not None:
            self.store.reorder(beam_idx)

    def __getstate__(self) -> dict[str, Any]:
        # Keys that were given and never attended are of a call that failed.
        return vars(self) | {"handed": (), "incoming": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.store is not None:
            self.store.tag = attention_hook.Owner(self).tag
            self.store.mark()

    # What the cache calls.

    def check_attended(self) -> None:
        """Raises if the last keys this layer was given were never attended through it."""
        awaits, self.awaits_attention = self.awaits_attention, False
        checks.check_attended(self.index, awaits=awaits)

    def check_states(self, keys: Tensor, values: Tensor) -> None:
        """Raises ``ValueError`` if new keys and values do not fit those held."""
        if self.is_filled:
            checks.check_states(self.store.sizes, keys, values)

    def tensors(self) -> list[Tensor]:
        """Everything in memory."""
        return [] if self.store is None else list(self.store.named_tensors().values())

    @property
    def is_fused(self) -> bool:
        """Whether one kernel takes a whole step."""
        return self.store is not None and self.store.is_fused

    @property
    def slots_per_head(self) -> int:
        """Slots of a head, on average."""
        return self.store.slots_per_head

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        if self.store is None:
            return 0
        return sum(tensor.nbytes for tensor in self.tensors()) - self.store.offloaded_bytes

    @property
    def offloaded_bytes(self) -> int:
        """Bytes held off the device."""
        return 0 if self.store is None else self.store.offloaded_bytes

    def grow(self, tokens: int) -> None:
        """Makes room for so many tokens where nothing is evicted."""
        if self.store is not None and not self.store.bound.policy.evicts:
            self.store.grow(tokens)

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows, in new memory where their number is another."""
        if self.store is not None:
            self.store.select(rows)

    def state(self) -> LayerState | None:
        """A copy of what is held, None of nothing."""
        if not self.is_filled:
            return None
        store: SlotStore = self.store
        assert store.sizes is not None
        copies = {name: tensor.clone() for name, tensor in store.named_tensors().items()}
        bound = store.bound
        budget = bound.head_budgets or bound.budget
        return LayerState(
            store.sizes, copies, bound.transform, bound.window, budget, bound.constants
        )

    def restore(self, state: LayerState) -> None:
        """Holds again what ``state`` says, in place where it fits."""
        shard = Shard() if self.store is None else self.store.bound.shard
        self._bind(state.transform, state.window, state.budget, state.constants, shard)
        store: Any = self.store
        store.load(state.tensors, state.sizes)
        store.has_gradients = False
        self._forget_call()
        self.is_filled = True

    def empty(self) -> None:
        """Holds nothing."""
        self._forget_call()
        self.is_filled = False
        if self.store is not None:
            self.store.reset()

    def read(self, inputs: AttentionInputs, prompt_tokens: int) -> None:
        """Reads tokens once more, of a call that was taken back."""
        self._attend(inputs, prompt_tokens, wants_weights=False)

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
        seen = self.counter.tokens_seen - key.shape[2]
        mask = masks.read_mask(attention_mask, key, seen=seen, is_built=self.columns.is_built)
        real = masks.real_tokens(attention_mask, key)
        count = self.counter.prompt_tokens
        if self.is_filled:
            checks.check_module(self.module, module)
            self.columns.extend(real, seen=seen, next_position=self.store.next_position)
            if mask is not None:
                columns = self.columns.until(seen + key.shape[2], self.store.next_position)
                mask = mask._replace(real=columns)
            inputs = AttentionInputs(query, key, value, real, mask)
            with _exact(query.device):
                output, weights = self._attend(inputs, count, wants_weights=_wants_weights(module))
            assert output is not None
            result = output.to(query.dtype), weights
        else:
            masks.check_left(real)
            checks.check_attention(self.index, module, kwargs)
            checks.check_function(function, module)
            inputs = AttentionInputs(query, key, value, real, mask)
            self._bind_module(module, inputs, scaling, kwargs)
            self._check_prompt(real[:, :count].sum(dim=1))
            self.columns.extend(real, seen=0, next_position=real.sum(dim=1))
            prompt = (tensor[:, :, :count] for tensor in (query, key, value))
            own = masks.first_tokens(attention_mask, count, of=key.shape[2])
            result = function(module, *prompt, own, scaling=scaling, **kwargs)
            with _exact(query.device):
                drafted, _ = self._attend(inputs, count, wants_weights=False)
            if drafted is not None:
                result = torch.cat([result[0], drafted], dim=1), None
        self.module.bind(module)
        self.calls += 1
        if gradients.wants_gradient(key, value):
            self.store.has_gradients = True
        if self.readers:
            self._tell(inputs)
        return result

    def _attend(
        self, inputs: AttentionInputs, prompt_tokens: int, *, wants_weights: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Reads so many tokens as a prompt and the others one by one.

        Returns:
            The output ``[B, L, H * G, D]``, but of an empty layer only that of the tokens after the
            prompt, None if there are none: the model itself computes that of the prompt. And the
            weights ``[B, H * G, L, S + L]`` over what was held before and then the new tokens; None
            unless all of them were read together.
        """
        prompt, steps = inputs.split(prompt_tokens)
        if not steps.real.shape[1]:
            return self._attend_prompt(inputs, wants_weights=wants_weights)
        if not prompt_tokens:
            return self._attend_steps(inputs, wants_weights=wants_weights)
        first, _ = self._attend_prompt(prompt, wants_weights=False)
        rest, _ = self._attend_steps(steps, wants_weights=False)
        return rest if first is None else torch.cat([first, rest], dim=1), None

    def _attend_prompt(
        self, inputs: AttentionInputs, *, wants_weights: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if not self.is_filled:
            prefill(self.store, inputs.detach())
            self.is_filled = True
            return None, None
        is_first_prompt = self.counter.is_first_prompt
        if is_first_prompt:
            self._check_prompt(self.store.next_position + inputs.real.sum(dim=1))
        return prefill_chunk(
            self.store, inputs, is_first_prompt=is_first_prompt, wants_weights=wants_weights
        )

    def _attend_steps(
        self, inputs: AttentionInputs, *, wants_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Drafted tokens one by one: exactly what decoding them would give."""
        outputs, kept = [], []
        for token in range(inputs.real.shape[1]):
            # What a mask says of drafted tokens is that they follow one another.
            mask = inputs.mask if inputs.real.shape[1] == 1 else None
            query, key, value, real, _ = inputs.part(slice(token, token + 1))
            ranks = self.counter.ranks_at(token)
            output, weights = decode_step(
                self.store, NewToken(query, key, value, ranks, wants_weights, real[:, 0], mask)
            )
            outputs.append(output)
            if weights is not None:
                kept.append(weights.flatten(1, 2))
        weights = torch.cat(kept, dim=2) if len(kept) == len(outputs) else None
        return torch.cat(outputs, dim=2).transpose(1, 2), weights

    def _check_prompt(self, lengths: Tensor) -> None:
        bound: BoundPolicy = self.store.bound
        if bound.policy.evicts:
            checks.check_prompt(lengths, bound.eviction, bound.budget)

    def _tell(self, inputs: AttentionInputs) -> None:
        for reader in self.readers:
            reader.layer_read(self, inputs.detach())

    def _forget_call(self) -> None:
        self.calls = 0
        self.awaits_attention = False
        # In a tuple: a tensor would be one of those this layer keeps.
        self.handed: tuple[Tensor, ...] = ()
        self.incoming: tuple[Tensor, Tensor] | None = None

    # What the model is like at this layer.

    def _bind_module(
        self, module: Any, inputs: AttentionInputs, scaling: float | None, kwargs: dict[str, Any]
    ) -> None:
        """Chooses the store by the attention module of a first prompt."""
        query, key, value = inputs[:3]
        factor = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
        transform = LogitTransform(factor, kwargs.get("softcap"), kwargs.get("s_aux"))
        shard = Shard.of(module, query)
        heads = key.shape[1]
        context = LayerContext(
            config=_text_config(module),
            module=module,
            layer=self.index,
            first_head=shard.rank * heads,
            heads=heads,
            groups=query.shape[1] // heads,
            dim=key.shape[3],
            value_dim=value.shape[3],
            device=key.device,
        )
        window = kwargs.get("sliding_window", _window(context.config, self.index))
        budget = self._budget(context) if window is None else window
        constants: dict[str, Tensor] = {}
        if window is None:
            for part in self.settings[0].parts:
                constants |= part.constants(context)
        self._bind(transform, window, budget, constants, shard)

    def _bind(
        self,
        transform: LogitTransform,
        window: int | None,
        budget: int | tuple[int, ...],
        constants: dict[str, Tensor],
        shard: Shard,
    ) -> None:
        policy, eviction = self.settings
        if window is not None:
            policy = StreamingLLM()
            eviction = EvictionConfig(window, 1, sinks=0, recent=0, protect_prompt=False)
        bound = BoundPolicy(
            policy,
            eviction,
            layer=self.index,
            budget=budget,
            transform=transform,
            constants=constants,
            window=window,
            shard=shard,
        )
        name = find_store(policy)
        if policy.evicts and is_per_head(eviction.budget):
            name = "pool"
        if self.store is not None and self.store.bound.policy == policy:
            self.store.bound = bound
        else:
            self.store = STORES[name](bound, attention_hook.Owner(self).tag)

    def _budget(self, context: LayerContext) -> int | tuple[int, ...]:
        """Slots of every head of this layer, or of each."""
        policy, eviction = self.settings
        if isinstance(eviction.budget, int) and not find(policy, SharesBudget):
            return eviction.budget
        share = share_budget(eviction, policy, context.config)[context.layer]
        return share if isinstance(share, int) else share[context.first_head :][: context.heads]

    def _cast(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values in the dtypes of the slots, or the slots in theirs where these are
        wider: autocast brings both about."""
        store: SlotStore = self.store
        assert store.sizes is not None
        dtype = torch.promote_types(store.sizes.dtype, keys.dtype)
        value_dtype = torch.promote_types(store.sizes.value_dtype, values.dtype)
        if (dtype, value_dtype) != (store.sizes.dtype, store.sizes.value_dtype):
            sizes = store.sizes._replace(dtype=dtype, value_dtype=value_dtype)
            store.load(store.named_tensors(), sizes)
        return keys.to(dtype), values.to(value_dtype)


def _window(config: Any, layer: int) -> int | None:
    """The window of a layer by its config, as transformers' own caches read it.

    Some attention is not told of it: its mask has it.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds and (layer >= len(kinds) or kinds[layer] != "sliding_attention"):
        return None
    layers = getattr(config, "per_layer_config", None)
    return getattr(layers[layer] if layers else config, "sliding_window", None)


def _wants_weights(module: Any) -> bool:
    """Whether the model wants attention weights, which only its eager attention gives."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == "eager"


def _exact(device: torch.device) -> AbstractContextManager[Any]:
    """Work in the precision written down, also where the model is under autocast."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _AS_IT_IS


def _text_config(module: Any) -> Any:
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
