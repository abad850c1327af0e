"""One attention layer: choose a victim, write, attend, let the policy observe."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from compressed_cache import attention, checks, hook, slots
from compressed_cache.clock import Clock
from compressed_cache.memory import SlotMemory
from compressed_cache.padding import real_tokens
from compressed_cache.policies import Policy, Slots
from compressed_cache.rules import Rules


class CompressedLayer(SlotMemory, CacheLayerMixin):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Keys and values of one attention layer in a fixed number of slots.

    A prompt (the first call) is attended by the model's own function, then scored and cut to the
    budget. After that, each token overwrites the slot of a victim and attends over the slots.
    """

    is_compileable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, policy: Policy, rules: Rules, clock: Clock, index: int) -> None:
        CacheLayerMixin.__init__(self)
        SlotMemory.__init__(self, policy, rules)
        self.clock = clock
        self.index = index
        self.scaling = 1.0
        self.is_filled = False
        self.awaits_attention = False

    # What transformers calls.

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes new keys and values ``[B, H, L, D]``; returns tensors tagged for :meth:`attend`."""
        if not torch.compiler.is_compiling():
            self.awaits_attention = True
        if self.is_filled and key_states.shape[2] == 1:
            # Detached everywhere: a graph through the slots would live as long as the cache.
            self._write(key_states.detach(), value_states.detach(), ranks=self.clock.ranks)
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
            attention_mask: the model's mask, read for the prompt only.
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
        real = real_tokens(attention_mask, key)
        if self.is_filled:
            return self._extend(query, key.detach(), value.detach(), real), None
        checks.check_attention(self.index, module, kwargs)
        if self.policy.evicts:
            checks.check_prompt(real, self.rules)
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        result = function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        self._fill(query.detach(), key.detach(), value.detach(), real)
        return result

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
        self.is_filled = False
        self.awaits_attention = False
        self.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become copies of the rows ``beam_idx`` ``[B]``, in place."""
        self.reorder(beam_idx)

    def check_attended(self) -> None:
        """Raises if the last keys this layer was given were never attended through it."""
        if self.awaits_attention:
            self.awaits_attention = False
            raise NotImplementedError(
                f"layer {self.index}: the model's attention never reached the cache. It must call "
                "what transformers' AttentionInterface.get_interface returns, with the keys that "
                "cache.update returned; this model's code does something else."
            )

    # The prompt.

    def _fill(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor) -> None:
        """Scores the prompt and keeps its best tokens."""
        self.provide(query, key, value)
        rows = torch.where(real, real.cumsum(dim=1) - 1, -1)
        positions = rows[:, None].expand(key.shape[:3])
        self.next_position.copy_(real.sum(dim=1))
        self.protected_prefix.fill_(self.rules.sinks)
        if self.rules.protect_prompt:
            self.protected_prefix.clamp_(min=self.next_position)
        self.tokens_seen.fill_(key.shape[2])
        contents = [(self.keys, key), (self.values, value), (self.positions, positions)]
        seen = self.attention
        if self.policy.observes == "queries":
            self._record_prompt(query, rows)
        if self.policy.observes == "attention":
            seen = self._prompt_attention(query, key, rows)
            contents.append((self.attention, seen))

        count = min(key.shape[2], self.keys.shape[2])
        kept = None
        if count < key.shape[2]:
            scores = self._scores(self._view(key, value, positions, seen))
            kept = slots.keep_best(scores, positions, count=count)
        for memory, prompt in contents:
            if kept is not None:
                index = kept.reshape(*kept.shape, *[1] * (prompt.dim() - 3))
                prompt = prompt.gather(2, index.expand(*kept.shape, *prompt.shape[3:]))
            memory[:, :, :count].copy_(prompt)
        self.is_filled = self.is_initialized = True

    def _prompt_attention(self, query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
        """What the policy makes of the prompt's attention to itself, ``[B, H, L]`` float32."""
        seen = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
        for weights in attention.prompt_attention(
            query, key, rows, scaling=self.scaling, last=self.policy.prompt_queries
        ):
            seen = self.policy.accumulate(seen, weights)
        return seen

    def _record_prompt(self, query: Tensor, rows: Tensor) -> None:
        """Writes the last ``W`` prompt queries where the ring will overwrite the oldest first."""
        window, length = self.query_positions.shape[1], query.shape[2]
        columns = torch.arange(max(0, length - window), length, device=query.device)
        grouped = attention.group_queries(query[:, :, columns], self.keys.shape[1])
        self.queries.index_copy_(3, columns % window, grouped)
        self.query_positions.index_copy_(1, columns % window, rows[:, columns])

    # One token.

    def _write(self, key: Tensor, value: Tensor, *, ranks: bool) -> None:
        """Puts one token ``[B, H, 1, D]`` into the slot of the victim."""
        slot = self._victim(ranks)
        self.keys.scatter_(2, slot.unsqueeze(-1).expand_as(key), key)
        self.values.scatter_(2, slot.unsqueeze(-1).expand_as(value), value)
        self.positions.scatter_(2, slot, self.next_position[:, None, None].expand_as(slot))
        if self.policy.observes == "attention":
            self.attention.scatter_(2, slot, 0.0)

    def _victim(self, ranks: bool) -> Tensor:
        """The slot to overwrite, ``[B, H, 1]``, from what is known before the step."""
        if not self.policy.evicts:
            return self.tokens_seen.expand(*self.positions.shape[:2], 1)
        if self.rules.interval == 1:
            return slots.lowest_slot(self._scores(self._held()), self.positions)
        if ranks:
            victims = slots.next_victims(
                self._scores(self._held()),
                self.positions,
                protected_prefix=self.protected_prefix,
                count=self.rules.interval,
            )
            self.victims.copy_(victims)
            self.phase.zero_()
        slot = self.victims.index_select(2, self.phase)
        self.phase.add_(1)
        return slot

    def _observe(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Attends with one query ``[B, H * G, 1, D]`` and remembers what the policy asked for."""
        output, weights = attention.attend(
            query, self.keys, self.values, self.positions >= 0, scaling=self.scaling
        )
        query, weights = query.detach(), weights.detach()
        if self.policy.observes == "attention":
            self.attention.copy_(self.policy.accumulate(self.attention, weights))
        if self.policy.observes == "queries":
            place = (self.tokens_seen % self.query_positions.shape[1]).view(1)
            self.queries.index_copy_(3, place, attention.group_queries(query, self.keys.shape[1]))
            self.query_positions.index_copy_(1, place, self.next_position[:, None])
        self.next_position.add_(1)
        self.tokens_seen.add_(1)
        return output, weights

    def _extend(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor) -> Tensor:
        """A further prompt, token by token: slow, and exactly what decoding it would give."""
        if not bool(real.all()):
            self.clock.running = 0
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

    def _allocate(self, keys: Tensor, values: Tensor, capacity: int, *, num_groups: int) -> None:
        super()._allocate(keys, values, capacity, num_groups=num_groups)
        hook.tag(self.keys, self)

    # What the policy sees and says.

    def _held(self) -> Slots:
        return self._view(self.keys, self.values, self.positions, self.attention)

    def _view(self, keys: Tensor, values: Tensor, positions: Tensor, seen: Tensor) -> Slots:
        return Slots(
            keys=keys,
            values=values,
            positions=positions,
            next_position=self.next_position,
            layer=self.index,
            scaling=self.scaling,
            queries=self.queries,
            query_positions=self.query_positions,
            attention=seen,
        )

    def _scores(self, held: Slots) -> Tensor:
        scores = self.policy.scores(held)
        if scores.shape != held.positions.shape or scores.dtype != torch.float32:
            raise ValueError(
                f"{type(self.policy).__name__}.scores must return float32 of shape [B, H, S] = "
                f"{list(held.positions.shape)}, got {scores.dtype} of shape {list(scores.shape)}"
            )
        return slots.protect(
            scores,
            held.positions,
            next_position=self.next_position,
            protected_prefix=self.protected_prefix,
            recent=self.rules.recent,
        )
