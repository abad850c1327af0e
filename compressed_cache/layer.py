"""One layer's slots: allocate once, write, attend, ask the policy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from compressed_cache import attention, hook, slots
from compressed_cache.clock import Clock
from compressed_cache.padding import real_tokens
from compressed_cache.policies import Policy, Slots
from compressed_cache.rules import Rules

_SMALLEST_CAPACITY = 256
_UNSUPPORTED = {
    "sliding_window": "sliding-window attention",
    "softcap": "soft-capped attention logits",
    "s_aux": "learned attention sinks",
    "position_bias": "a learned position bias",
}


class CompressedLayer(CacheLayerMixin):
    """Keys and values of one attention layer in a fixed number of slots.

    Attributes:
        keys, values: ``[B, H, S, D]`` in the dtype of the model.
        positions: ``[B, H, S]`` int64, position of the token in each slot, ``-1`` where empty.

    All tensors are allocated at the first prompt and changed only in place, so that their addresses
    hold until :meth:`reset` meets another batch size (CUDA graphs rely on it).
    """

    is_compileable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, policy: Policy, rules: Rules, clock: Clock, index: int) -> None:
        super().__init__()
        self.policy = policy
        self.rules = rules
        self.clock = clock
        self.index = index
        self.awaits_attention = False
        self.is_filled = False
        self.scaling = 1.0
        self.positions: Tensor | None = None
        self.attention: Tensor | None = None
        self.queries: Tensor | None = None
        self.query_positions: Tensor | None = None

    # --- what transformers calls -------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes new keys and values ``[B, H, L, D]``; returns tensors tagged for :meth:`attend`."""
        if not torch.compiler.is_compiling():
            self._check_batch(key_states)
            self.awaits_attention = True
        if self.is_filled and key_states.shape[2] == 1:
            self._write(key_states, value_states, ranks=self.clock.ranks)
            return self.keys, self.values
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
            attention_mask: the model's mask, used for the prompt only.
            scaling: factor of the logits, ``D ** -0.5`` if None.
            kwargs: passed on to ``function``.

        Returns:
            The output ``[B, L, H * G, D]`` and the attention weights, if at hand.
        """
        if not torch.compiler.is_compiling():
            self.awaits_attention = False
        if self.is_filled and query.shape[2] == 1:
            output, weights = self._observe(query)
            return output.transpose(1, 2), weights.flatten(1, 2)
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self.is_filled:
            return self._extend(query, key, value, attention_mask), None
        self._refuse(module, kwargs)
        real = real_tokens(attention_mask, key)
        self._check_prompt(real)
        output = function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        self._fill(query, key, value, real)
        return output

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Never called: what to allocate depends on the queries, see :meth:`attend`."""
        raise NotImplementedError("slots are allocated when the prompt is attended")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask transformers builds: only the new tokens once filled.

        The mask is then as small as can be; which slots are visible is decided here, not there.
        """
        return query_length, self.clock.tokens_seen

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        if torch.compiler.is_compiling():
            return self.tokens_seen  # a tensor: an int would be compiled in as a constant
        return self.clock.tokens_seen if self.is_filled else 0

    def get_max_length(self) -> int:
        """-1: the text may grow without limit."""
        return -1

    def reset(self) -> None:
        """Forgets the tokens and keeps the memory."""
        self.is_filled = False
        self.awaits_attention = False
        for tensor in self.tensors():
            tensor.zero_()
        for tensor in (self.positions, self.query_positions):
            if tensor is not None:
                tensor.fill_(-1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become copies of the rows ``beam_idx`` ``[B]``, in place."""
        for tensor in self.tensors():
            if tensor.dim() and tensor is not self.phase:
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    # --- what the cache reads ----------------------------------------------------------------

    def check_attended(self) -> None:
        """Raises if the last keys this layer was given were never attended through it."""
        if self.awaits_attention:
            self.awaits_attention = False
            raise NotImplementedError(
                f"layer {self.index}: the model's attention never reached the cache. It must call "
                "what transformers' AttentionInterface.get_interface returns, with the keys that "
                "cache.update returned; this model's code does something else."
            )

    def tensors(self) -> list[Tensor]:
        """Everything this layer keeps in memory."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def grow(self, tokens: int) -> None:
        """Doubles the slots until so many more tokens fit (policies that do not evict)."""
        capacity = _capacity(self.clock.tokens_seen + tokens)
        old = {name: getattr(self, name) for name in ("keys", "values", "positions")}
        if capacity <= old["keys"].shape[2]:
            return
        kept = {name: getattr(self, name) for name in ("next_position", "protected_prefix")}
        self._allocate(old["keys"], old["values"], capacity, num_queries=0)
        for name, tensor in old.items():
            getattr(self, name)[:, :, : tensor.shape[2]].copy_(tensor)
        for name, tensor in kept.items():
            getattr(self, name).copy_(tensor)
        self.tokens_seen.fill_(self.clock.tokens_seen)

    # --- the prompt --------------------------------------------------------------------------

    def _fill(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor) -> None:
        """Scores the prompt and keeps its best tokens."""
        self._provide(query, key, value)
        batch, heads, length = key.shape[:3]
        rows = torch.where(real, real.cumsum(dim=1) - 1, -1)
        positions = rows[:, None].expand(batch, heads, length)
        self.next_position.copy_(real.sum(dim=1))
        self.protected_prefix.fill_(self.rules.sinks)
        if self.rules.protect_prompt:
            self.protected_prefix.clamp_(min=self.next_position)
        self.tokens_seen.fill_(length)
        remembered = None
        if self.policy.observes == "attention":
            remembered = self._prompt_attention(query, key, rows)
        elif self.policy.observes == "queries":
            self._record_queries(query, rows)
        kept = min(length, self.keys.shape[2])
        chosen = None
        if length > kept:
            seen = self._view(key, value, positions, remembered)
            chosen = slots.keep_best(self._scores(seen), positions, count=kept)
        contents = [(self.keys, key), (self.values, value), (self.positions, positions)]
        if remembered is not None:
            contents.append((self.attention, remembered))
        for slot_tensor, token_tensor in contents:
            if chosen is not None:
                index = chosen if token_tensor.dim() == 3 else chosen.unsqueeze(-1)
                token_tensor = token_tensor.gather(
                    2, index.expand(*chosen.shape, *token_tensor.shape[3:])
                )
            slot_tensor[:, :, :kept].copy_(token_tensor)
        self.is_filled = True

    def _provide(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Allocates the slots, or keeps those of an earlier prompt that fit."""
        batch, heads, length, dim = key.shape
        capacity = self.rules.budget if self.policy.evicts else _capacity(length + 1)
        if self.is_initialized and self.keys.shape == (batch, heads, capacity, dim):
            if (self.keys.dtype, self.keys.device) == (key.dtype, key.device):
                return
        self._allocate(key, value, capacity, num_queries=query.shape[1])

    def _prompt_attention(self, query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
        remembered = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
        for weights in attention.prompt_attention(
            query, key, rows, scaling=self.scaling, last=self.policy.prompt_queries
        ):
            remembered = self.policy.accumulate(remembered, weights)
        return remembered

    def _record_queries(self, query: Tensor, rows: Tensor) -> None:
        """Writes the last ``W`` prompt queries where the ring will overwrite the oldest first."""
        window, length = self.query_positions.shape[1], query.shape[2]
        columns = torch.arange(max(0, length - window), length, device=query.device)
        grouped = attention.group_queries(query[:, :, columns], self.keys.shape[1])
        self.queries.index_copy_(3, columns % window, grouped)
        self.query_positions.index_copy_(1, columns % window, rows[:, columns])

    # --- one token ---------------------------------------------------------------------------

    def _write(self, key: Tensor, value: Tensor, *, ranks: bool) -> None:
        """Puts one token ``[B, H, 1, D]`` into the slot of the victim."""
        slot = self._victim(ranks)
        wide = slot.unsqueeze(-1).expand(-1, -1, -1, key.shape[-1])
        self.keys.scatter_(2, wide, key)
        self.values.scatter_(2, wide, value)
        self.positions.scatter_(2, slot, self.next_position[:, None, None].expand_as(slot))
        if self.attention is not None:
            self.attention.scatter_(2, slot, 0.0)

    def _victim(self, ranks: bool) -> Tensor:
        """The slot to overwrite, ``[B, H, 1]``, from what is known before the step."""
        if not self.policy.evicts:
            return self.tokens_seen.expand(*self.positions.shape[:2], 1)
        if self.rules.interval == 1:
            return slots.lowest_slot(self._scores(self._held()), self.positions)
        if ranks:
            order = slots.rank(self._scores(self._held()), self.positions)
            self.victims.copy_(order[..., : self.rules.interval])
            self.phase.zero_()
        slot = self.victims.index_select(2, self.phase)
        self.phase.add_(1)
        return slot

    def _observe(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Attends with one query ``[B, H * G, 1, D]`` and remembers what the policy asked for."""
        output, weights = attention.attend(
            query, self.keys, self.values, self.positions >= 0, scaling=self.scaling
        )
        if self.attention is not None:
            self.attention.copy_(self.policy.accumulate(self.attention, weights))
        if self.queries is not None:
            place = (self.tokens_seen % self.query_positions.shape[1]).view(1)
            self.queries.index_copy_(3, place, attention.group_queries(query, self.keys.shape[1]))
            self.query_positions.index_copy_(1, place, self.next_position[:, None])
        self.next_position.add_(1)
        self.tokens_seen.add_(1)
        return output, weights

    def _extend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any) -> Tensor:
        """A further prompt, token by token: slow, and exactly what decoding it would give."""
        if not bool(real_tokens(attention_mask, key).all()):
            raise NotImplementedError(
                "a further prompt must have no padding, got a padded attention_mask. Run rows of "
                "different length one by one."
            )
        outputs = []
        for token in range(query.shape[2]):
            here = slice(token, token + 1)
            self._write(key[:, :, here], value[:, :, here], ranks=self.clock.ranks_at(token))
            outputs.append(self._observe(query[:, :, here])[0])
        return torch.cat(outputs, dim=2).transpose(1, 2)

    # --- helpers -----------------------------------------------------------------------------

    def _held(self) -> Slots:
        return self._view(self.keys, self.values, self.positions, self.attention)

    def _view(
        self, keys: Tensor, values: Tensor, positions: Tensor, remembered: Tensor | None
    ) -> Slots:
        return Slots(
            keys=keys,
            values=values,
            positions=positions,
            next_position=self.next_position,
            layer=self.index,
            scaling=self.scaling,
            queries=self.queries,
            query_positions=self.query_positions,
            attention=remembered,
        )

    def _scores(self, seen: Slots) -> Tensor:
        scores = self.policy.scores(seen)
        if scores.shape != seen.positions.shape or scores.dtype != torch.float32:
            raise ValueError(
                f"{type(self.policy).__name__}.scores must return float32 of shape [B, H, S] = "
                f"{list(seen.positions.shape)}, got {scores.dtype} of shape {list(scores.shape)}"
            )
        return slots.protect(
            scores,
            seen.positions,
            next_position=self.next_position,
            protected_prefix=self.protected_prefix,
            recent=self.rules.recent,
        )

    def _allocate(
        self, keys: Tensor, values: Tensor, capacity: int, *, num_queries: int
    ) -> None:
        batch, heads, _, dim = keys.shape
        device = keys.device

        def empty(*shape: int, dtype: torch.dtype, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        self.keys = empty(batch, heads, capacity, dim, dtype=keys.dtype)
        self.values = empty(batch, heads, capacity, values.shape[-1], dtype=values.dtype)
        self.positions = empty(batch, heads, capacity, dtype=torch.int64, fill=-1)
        self.next_position = empty(batch, dtype=torch.int64)
        self.protected_prefix = empty(batch, dtype=torch.int64)
        self.tokens_seen = empty(dtype=torch.int64)
        self.phase = empty(1, dtype=torch.int64)
        if self.policy.evicts and self.rules.interval > 1:
            self.victims = empty(batch, heads, self.rules.interval, dtype=torch.int64)
        if self.policy.observes == "attention":
            self.attention = empty(batch, heads, capacity, dtype=torch.float32)
        if self.policy.observes == "queries":
            window = self.policy.num_queries
            group = num_queries // heads
            self.queries = empty(batch, heads, group, window, dim, dtype=keys.dtype)
            self.query_positions = empty(batch, window, dtype=torch.int64, fill=-1)
        hook.tag(self.keys, self)
        if not torch.compiler.is_compiling():
            for tensor in self.tensors():
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def _check_batch(self, key_states: Tensor) -> None:
        if self.is_filled and key_states.shape[0] != self.keys.shape[0]:
            raise ValueError(
                f"batch size must stay {self.keys.shape[0]} until the cache is reset, got "
                f"{key_states.shape[0]}. Call cache.reset() or use a new CompressedCache."
            )

    def _check_prompt(self, real: Tensor) -> None:
        if not self.rules.protect_prompt or not self.policy.evicts:
            return
        longest = int(real.sum(dim=1).max())
        room = self.rules.recent + self.rules.interval
        if longest + room > self.rules.budget:
            raise ValueError(
                "budget must be at least prompt + recent + interval with protect_prompt=True "
                f"({longest} + {self.rules.recent} + {self.rules.interval} = {longest + room}), got "
                f"{self.rules.budget}. Raise budget, lower recent or interval, or set "
                "protect_prompt=False."
            )

    def _refuse(self, module: Any, kwargs: dict[str, Any]) -> None:
        for name, meaning in _UNSUPPORTED.items():
            if kwargs.get(name) is not None:
                raise NotImplementedError(
                    f"layer {self.index} ({type(module).__name__}) uses {meaning}, which "
                    "CompressedCache does not support"
                )


def _capacity(tokens: int) -> int:
    """The smallest power of two, at least 256, that holds so many tokens."""
    return max(_SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())
