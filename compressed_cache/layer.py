"""One attention layer: choose a victim, write, attend, let the policy observe."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from compressed_cache.hf import attention_hook as hook
from compressed_cache.hf import checks
from compressed_cache.hf.columns import Columns, See
from compressed_cache.hf.module_identity import Reader
from compressed_cache.observers import Listener
from compressed_cache.ops import eviction as slots
from compressed_cache.ops import gradients, masks
from compressed_cache.ops.attention import Form
from compressed_cache.ops.kernels import operators
from compressed_cache.ops.masks import Mask
from compressed_cache.ops.rerotation import closed_up
from compressed_cache.ops.tensor_parallel import Shard
from compressed_cache.policies import Policy, Rows, Site, Slots, budgets
from compressed_cache.policies.eviction_config import Rules
from compressed_cache.policies.methods.streaming_llm import StreamingLLM
from compressed_cache.step_counter import Clock
from compressed_cache.stores import prefill as reading
from compressed_cache.stores.decode_step import NewToken, step
from compressed_cache.stores.prefill import States, read
from compressed_cache.stores.slots import Sizes, SlotMemory

_AS_IT_IS = nullcontext()


class LayerState(NamedTuple):
    """What one layer holds, apart from where."""

    sizes: Sizes
    tensors: dict[str, Tensor]
    form: Form
    window: int | None
    budget: int | tuple[int, ...]
    """Slots of every head, or of each."""
    constants: dict[str, Tensor]


class Call(NamedTuple):
    """Tokens that were read at once, kept until it is known which of them stay."""

    states: States
    prompt_tokens: int


class CompressedLayer(SlotMemory, CacheLayerMixin):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Keys and values of one attention layer in a fixed number of slots.

    A prompt (the first call) is attended by the model's own function, then scored and cut to the
    budget. After that, each token overwrites the slot of a victim and attends over the slots. A
    layer with a sliding window has as many slots as its window, and the oldest token is the victim.
    """

    is_compileable = True
    is_croppable = True
    supports_early_init = False

    def __init__(
        self, policy: Policy, rules: Rules, clock: Clock, columns: Columns, index: int
    ) -> None:
        CacheLayerMixin.__init__(self)
        SlotMemory.__init__(self, policy, rules)
        self.settings = policy, rules
        self.clock = clock
        self.columns = columns
        self.index = index
        self.form = Form(1.0)
        self.window: int | None = None
        self.shard = Shard()
        self.reader = Reader()
        self.constants: dict[str, Tensor] = {}
        self.calls = 0
        self.is_filled = False
        self.is_fused = False
        self.has_gradients = False
        """Whether a token was read with gradients, which then end at it."""
        self.awaits_attention = False
        # In a tuple: a tensor would be one of those this layer keeps.
        self.handed: tuple[Tensor, ...] = ()
        self.incoming: tuple[Tensor, Tensor] | None = None
        self.last_call: Call | None = None
        self.listener: Listener | None = None

    # What transformers calls.

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes new keys and values ``[B, H, L, D]``; returns tensors tagged for :meth:`attend`."""
        if not torch.compiler.is_compiling():
            self.awaits_attention = True
        given = key_states.dtype, value_states.dtype
        if self.is_filled and given != (self.keys.dtype, self.values.dtype):
            key_states, value_states = self._alike(key_states, value_states)
        if self.is_filled and key_states.shape[2] == 1:
            # Written when the query is at hand, so that one kernel can do both.
            self.incoming = key_states, value_states
            self.handed = () if torch.compiler.is_compiling() else (self.values,)
            return self.keys, self.values
        # That of a step that failed is not of this call.
        self.incoming = None
        self.handed = () if torch.compiler.is_compiling() else (value_states,)
        hook.tag(key_states, self)
        return key_states, value_states

    def attend(
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
            checks.check_module(self.reader, module)
            self.calls += 1
            self.last_call = None
        assert self.incoming is not None
        (key, value), self.incoming = self.incoming, None
        real = self.columns.real_of_step(attention_mask, query.shape[0])
        token = NewToken(query, key, value, self.clock.ranks, _weighs(module), real)
        with _exact(query.device):
            output, weights = self.step(token)
        if output.dtype != query.dtype:
            output = output.to(query.dtype)
        if gradients.wants_gradient(key, value):
            self.has_gradients = True
        if is_eager and self.listener is not None:
            if real is None:
                real = torch.ones(query.shape[0], dtype=torch.bool, device=query.device)
            states = States(query, key, value, real[:, None])
            self.listener(self, states.detached())
        return output.transpose(1, 2), None if weights is None else weights.flatten(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask transformers builds: see ``CompressedCache``."""
        return query_length, self.clock.tokens_seen

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.clock.tokens_seen if self.is_filled else 0

    def get_max_length(self) -> int:
        """-1: the text may grow without limit."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Never called: what to allocate depends on the queries too, see :meth:`attend`."""
        raise NotImplementedError("slots are allocated when the prompt is attended")

    def reset(self) -> None:
        """Forgets the tokens and keeps the memory."""
        self.reader.clear()
        self.empty()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become copies of the rows ``beam_idx`` ``[B]``, in place."""
        self.reorder(beam_idx)

    @property
    def is_sliding(self) -> bool:
        """Whether this layer sees a window of the text only."""
        return self.window is not None

    def __getstate__(self) -> dict[str, Any]:
        # Keys that were given and never attended are of a call that failed.
        return vars(self) | {"handed": (), "incoming": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.sizes is not None:
            self.mark()

    # What the cache calls.

    def check_attended(self) -> None:
        """Raises if the last keys this layer was given were never attended through it."""
        awaits, self.awaits_attention = self.awaits_attention, False
        checks.check_attended(self.index, awaits=awaits)

    def state(self) -> LayerState:
        """A copy of what is held."""
        assert self.sizes is not None
        copies = {name: tensor.clone() for name, tensor in self.named_tensors().items()}
        budget = self.head_budgets or self.budget
        return LayerState(self.sizes, copies, self.form, self.window, budget, self.constants)

    def restore(self, state: LayerState) -> None:
        """Holds again what ``state`` says, in place where it fits."""
        self.form = state.form
        self.constants = state.constants
        self._see(state.window, state.budget)
        self.load(state.tensors, state.sizes)
        self.calls = 0
        self.is_filled = self.is_initialized = True
        self.awaits_attention = self.has_gradients = False
        self.handed, self.incoming, self.last_call = (), None, None

    def empty(self) -> None:
        """Holds nothing."""
        self.calls = 0
        self.is_filled = self.awaits_attention = self.has_gradients = False
        self.handed, self.incoming, self.last_call = (), None, None
        self.clear()

    def repeat(self, call: Call | None, tokens: int) -> None:
        """Reads the first tokens of a call that was taken back."""
        if call is not None:
            read(self, call.states.split(tokens)[0], min(call.prompt_tokens, tokens))

    # How tokens come in: what another layout does in its own way.

    def step(self, token: NewToken) -> tuple[Tensor, Tensor | None]:
        """See :func:`compressed_cache.stores.decode_step.step`."""
        return step(self, token)

    def fill(self, states: States) -> None:
        """See :func:`compressed_cache.stores.prefill.fill`."""
        reading.fill(self, states)

    def read_block(self, states: States, *, weighs: bool = False) -> tuple[Tensor, Tensor | None]:
        """See :func:`compressed_cache.stores.prefill.read_block`."""
        return reading.read_block(self, states, weighs=weighs)

    def keep_best(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        seen: Tensor,
        notes: Tensor,
        scores: Tensor | None = None,
    ) -> None:
        """See :func:`compressed_cache.stores.prefill.keep_best`."""
        reading.keep_best(self, keys, values, positions, seen, notes, scores)

    # A prompt.

    @torch.compiler.disable(reason=hook.PROMPTS)
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
        seen = self.clock.tokens_seen - key.shape[2]
        mask = masks.read_mask(attention_mask, key, seen=seen, is_built=self.columns.is_built)
        real = masks.real_tokens(attention_mask, key)
        states = States(query, key, value, real, mask)
        count = self.clock.prompt_tokens
        if self.is_filled:
            checks.check_module(self.reader, module)
            self.columns.extend(real, seen=seen, next_position=self.next_position)
            with _exact(query.device):
                output, weights = read(self, states, count, weighs=_weighs(module))
            assert output is not None
            result = output.to(query.dtype), weights
        else:
            masks.check_left(real)
            checks.check_attention(self.index, module, kwargs)
            checks.check_function(function, module)
            self._adopt(module, query, key, value, scaling, kwargs)
            if self.policy.evicts:
                checks.check_prompt(real[:, :count].sum(dim=1), self.rules, self.budget)
            self.columns.extend(real, seen=0, next_position=real.sum(dim=1))
            prompt = (tensor[:, :, :count] for tensor in (query, key, value))
            own = masks.first_tokens(attention_mask, count, of=key.shape[2])
            result = function(module, *prompt, own, scaling=scaling, **kwargs)
            with _exact(query.device):
                drafted, _ = read(self, states, count)
            if drafted is not None:
                result = torch.cat([result[0], drafted], dim=1), None
        self.reader.bind(module)
        self.last_call = Call(states.detached(), count) if self.clock.records else None
        self.calls += 1
        if gradients.wants_gradient(key, value):
            self.has_gradients = True
        if self.listener is not None:
            self.listener(self, states.detached())
        return result

    def _adopt(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        kwargs: dict[str, Any],
    ) -> None:
        """Notes what the model is like at this layer."""
        factor = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
        self.form = Form(factor, kwargs.get("softcap"), kwargs.get("s_aux"))
        self.shard = Shard.of(module, query)
        heads = key.shape[1]
        site = Site(
            config=_text_config(module),
            module=module,
            layer=self.index,
            first_head=self.shard.rank * heads,
            heads=heads,
            groups=query.shape[1] // heads,
            dim=key.shape[3],
            value_dim=value.shape[3],
            device=key.device,
        )
        window = kwargs.get("sliding_window", _window(site.config, self.index))
        self._see(window, self._share(site) if window is None else window)
        self.constants = self.policy.constants(site)

    def _share(self, site: Site) -> int | tuple[int, ...]:
        """Slots of every head of this layer, or of each."""
        policy, rules = self.settings
        if isinstance(rules.budget, int) and not policy.shares_budget:
            return rules.budget
        share = budgets.resolve(rules, policy, site.config)[site.layer]
        return share if isinstance(share, int) else share[site.first_head :][: site.heads]

    def _see(self, window: int | None, budget: int | tuple[int, ...]) -> None:
        """Keeps so many of the last tokens, or what the policy wants where there is no window."""
        self.window = window
        self.head_budgets = () if isinstance(budget, int) else budget
        self.budget = budget if isinstance(budget, int) else min(budget)
        self.policy, self.rules = self.settings
        if window is not None:
            self.policy = StreamingLLM()
            self.rules = Rules(window, interval=1, sinks=0, recent=0, protect_prompt=False)

    def _alike(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values in the dtypes of the slots, or the slots in theirs where these are
        wider: autocast brings both about."""
        assert self.sizes is not None
        dtype = torch.promote_types(self.sizes.dtype, keys.dtype)
        value_dtype = torch.promote_types(self.sizes.value_dtype, values.dtype)
        if (dtype, value_dtype) != (self.sizes.dtype, self.sizes.value_dtype):
            sizes = self.sizes._replace(dtype=dtype, value_dtype=value_dtype)
            self.load(self.named_tensors(), sizes)
        return keys.to(dtype), values.to(value_dtype)

    def _allocate(self, sizes: Sizes) -> None:
        super()._allocate(sizes)
        alters = self.policy.contiguous or self.policy.prunes_channels
        self.is_fused = self.policy.evicts and not alters and operators.serves(sizes)

    def mark(self) -> None:
        """Says what these tensors are to attention and to the compiler."""
        super().mark()
        hook.tag(self.keys, self)

    def attended(
        self, query: Tensor, keys: Tensor, query_positions: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries ``[B, H * G, L, D]`` and keys ``[B, H, S, D]`` as attention is to see them.

        Args:
            query: of tokens that follow one another.
            keys: of all they may see, themselves included.
            query_positions: ``[B, L]`` int64, ``-1`` at padding.
            positions: ``[B, H, S]`` int64, ``-1`` where there is no token.
        """
        if not self.policy.contiguous:
            return query, keys
        return closed_up(
            query,
            keys,
            query_positions=query_positions,
            positions=positions,
            constants=self.constants,
        )

    # What the policy sees and says.

    def held(self) -> Slots:
        """What the policy is shown of the slots."""
        return self.view(self.keys, self.values, self.positions, self.attention, self.notes)

    def held_positions(self) -> Tensor:
        """``[B, H, S]`` int64, the token of each slot for each head, negative where none is."""
        return self.positions

    def revised(self, real: Tensor | None = None) -> Slots:
        """The same, right before a ranking; in rows ``[B]`` bool only, where given."""
        if self.policy.revises:
            notes = self.policy.revise(self.held())
            self.notes.copy_(slots.where_real(real, notes, self.notes))
        return self.held()

    def see(self, mask: Mask | None, positions: Tensor) -> See | None:
        """What a mask of this call shows, see :meth:`Columns.see`."""
        assert self.sizes is not None
        return self.columns.see(
            mask,
            positions,
            next_position=self.next_position,
            groups=self.sizes.groups,
            window=self.window,
        )

    def constant(self, held: Tensor, *traced: Tensor) -> Tensor:
        """What is held of earlier calls, as a constant of one with gradients through ``traced``."""
        is_past = self.has_gradients and gradients.wants_gradient(*traced)
        return gradients.constant(held, *traced) if is_past else held

    def drop(self, gone: Tensor) -> None:
        """Empties slots, ``[B, H, S]`` bool."""
        self.positions.masked_fill_(gone, -1)

    def note(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """What the policy writes down of new tokens ``[B, H, L, ...]``."""
        nothing = self.attention[:, :, :0]
        return self.policy.note(self.view(keys, values, positions, nothing, self.notes[:, :, :0]))

    def view(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        seen: Tensor,
        notes: Tensor,
        *,
        is_prompt: bool = False,
    ) -> Slots:
        """What the policy is shown of these tokens."""
        return Slots(
            keys=keys,
            values=values,
            positions=positions,
            next_position=self.next_position,
            layer=self.index,
            first_head=self.shard.rank * keys.shape[1],
            form=self.form,
            queries=self.queries,
            query_positions=self.query_positions,
            attention=seen,
            notes=notes,
            prompt_length=self.prompt_length,
            protected_prefix=self.protected_prefix,
            recent=self.rules.recent,
            budget=self.budget,
            is_prompt=is_prompt,
            constants=self.constants,
        )

    def scores(self, held: Slots) -> Tensor:
        """Scores ``[B, H, S]`` of the policy."""
        scores = self.policy.scores(held)
        if scores.shape != held.positions.shape or scores.dtype != torch.float32:
            raise ValueError(
                f"{type(self.policy).__name__}.scores must return float32 of shape [B, H, S] = "
                f"{list(held.positions.shape)}, got {scores.dtype} of shape {list(scores.shape)}"
            )
        return self.shard.mean(scores) if self.policy.mixes_scores else scores

    def rank_prompt(
        self, keys: Tensor, values: Tensor, positions: Tensor, seen: Tensor, notes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores of tokens of a prompt, protection applied, and their revised notes."""
        prompt = self.view(keys, values, positions, seen, notes, is_prompt=True)
        prompt = prompt._replace(notes=self.policy.revise(prompt))
        return self.protected_scores(prompt), prompt.notes

    def choose(self, scores: Tensor, count: int) -> Tensor:
        """The slots to overwrite in so many steps, ``[B, H, count]``, by scores ``[B, H, S]``."""
        if count == 1:
            return slots.lowest_slot(scores, self.positions)
        return slots.next_victims(
            scores, self.positions, protected_prefix=self.protected_prefix, count=count
        )

    def protected_scores(self, held: Slots) -> Tensor:
        """Scores ``[B, H, S]`` with protection applied."""
        return self.protect(self.scores(held), held.positions)

    def protect(self, scores: Tensor, positions: Tensor) -> Tensor:
        """The same of scores ``[B, H, S]`` at hand."""
        return slots.protect(
            scores,
            positions,
            next_position=self.next_position,
            protected_prefix=self.protected_prefix,
            recent=self.rules.recent,
        )

    def accumulate(
        self, seen: Tensor, weights: Tensor, query_positions: Tensor, positions: Tensor
    ) -> Tensor:
        """What the policy remembers once it saw these weights ``[B, H, G, Q, S]``."""
        rows = Rows(weights.float(), query_positions, positions)
        seen = self.policy.accumulate(seen, rows)
        return self.shard.mean(seen) if self.policy.mixes_heads else seen


def _window(config: Any, layer: int) -> int | None:
    """The window of a layer by its config, as transformers' own caches read it.

    Some attention is not told of it: its mask has it.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds and (layer >= len(kinds) or kinds[layer] != "sliding_attention"):
        return None
    layers = getattr(config, "per_layer_config", None)
    return getattr(layers[layer] if layers else config, "sliding_window", None)


def _weighs(module: Any) -> bool:
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
