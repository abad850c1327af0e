"""The public face: a transformers cache with a fixed number of slots per layer."""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from compressed_cache.drafting import Drafts
from compressed_cache.hf import attention_hook, checks
from compressed_cache.hf.announced_calls import AnnouncedCalls
from compressed_cache.hf.columns import Columns
from compressed_cache.hf.module_inputs import ModuleInput
from compressed_cache.layer import CompressedLayer
from compressed_cache.observers import Observer
from compressed_cache.policies.base import Policy
from compressed_cache.policies.capabilities import needs_of
from compressed_cache.policies.eviction_config import (
    EvictionConfig,
    resolve_eviction,
    share_budget,
)
from compressed_cache.policies.registry import as_policy
from compressed_cache.policies.relative_budget import UNKNOWN, relative_budget
from compressed_cache.step_counter import StepCounter
from compressed_cache.stores.slots import SlotStore

if TYPE_CHECKING:
    from compressed_cache.telemetry.timing import Timing


class CompressedCache(Drafts, AnnouncedCalls):
    """Keeps the key-value cache of a model inside a fixed budget while it generates.

    Pass a fresh one to ``generate``; nothing else changes::

        model.generate(**inputs, cache=CompressedCache(policy="snapkv", budget=256))

    Every release takes it as ``cache`` and as ``past_key_values``, which transformers deprecates
    from 5.24 on.

    In each decode step the victim is chosen from what was known before the step, the new token
    takes its slot, attention runs over at most ``budget`` tokens, the new one included, and the
    policy's state is updated. A prompt is attended in full by the model's own kernel, then its best
    ``budget`` tokens per key/value head are kept. Positions count real tokens from the left end of
    each row, so padding shifts nothing.

    Args:
        policy: a name from ``compressed_cache.POLICIES`` or a policy object.
        budget: slots per key/value head and layer, allocated once and never exceeded; 256 if None.
            A list has one number for each layer of full attention, or a list with one number for
            each key/value head. Policies may share out a single number, which then is the mean.
        compression_ratio: in place of ``budget``, the share of the prompt that goes, 0 to below 1:
            of ``n`` tokens, the longest row of a batch, ``int(n * (1 - compression_ratio))`` slots.
        interval: decode steps between two rankings. The ``interval`` lowest-ranked slots are
            overwritten in order until the next ranking and stay attended until then; where fewer
            are unprotected, the oldest of the recent ones follow. With 1 the victim is chosen anew
            in every step. None: the policy's default.
        sinks: positions below it are never evicted. None: the policy's default.
        recent: how many tokens before the incoming one are never evicted. None: the policy's
            default.
        protect_prompt: never evict a token of the prompt, and refuse one that leaves no room. None:
            the policy's default; where that is True, of a prompt that does not fit the first
            ``budget // 2`` tokens are protected.
        config: the model's config, to refuse a model that cannot work before any work is done
            (otherwise the first forward does).
        telemetry: whether :meth:`timing` can tell what a run took.
        policy_options: fields of the policy, with a policy given by name.

    Attributes:
        layers: one per layer of the model, attention layers with ``keys`` and ``values``
            ``[B, H, S, D]`` and ``positions`` ``[B, H, S]`` int64, ``-1`` where empty or padding.
            Slots are in no particular order. Sliding-window layers have ``S = window`` and keep
            their window; linear-attention layers are transformers' own. Where heads have different
            numbers of slots, a layer has one pool of slots for all heads, ``[B, 1, P, ...]``, see
            :class:`~compressed_cache.stores.pool.PoolStore`.

    Raises:
        ValueError: an unknown policy, a value out of range, or a budget too small for what is
            protected.
        TypeError: an argument of the wrong type, or an unknown option.
        NotImplementedError: with ``config``, a model this cache cannot serve.
    """

    def __init__(
        self,
        policy: str | Policy = "snapkv",
        budget: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        compression_ratio: float | None = None,
        interval: int | None = None,
        sinks: int | None = None,
        recent: int | None = None,
        protect_prompt: bool | None = None,
        config: PreTrainedConfig | None = None,
        telemetry: bool = False,
        **policy_options: Any,
    ) -> None:
        self.policy = as_policy(policy, policy_options)
        rules = dict(interval=interval, sinks=sinks, recent=recent, protect_prompt=protect_prompt)
        resolve = functools.partial(resolve_eviction, self.policy, **rules)
        self.relative = relative_budget(self.policy, compression_ratio, budget, resolve)
        most = 256 if self.relative is None else UNKNOWN
        self.eviction: EvictionConfig = resolve(budget=most if budget is None else budget)
        if config is not None:
            checks.check_config(config)
            if (model := checks.class_of(config)) is not None:
                checks.check_class(model)
            if not isinstance(self.eviction.budget, int):
                share_budget(self.eviction, self.policy, config.get_text_config())
        super().__init__(layers=[])
        self.needs_hidden_states = needs_of(self.policy).hidden_states
        self.shown: ModuleInput | None = None
        self.counter = StepCounter(self.eviction.interval)
        self.columns = Columns()
        self.observers: list[Observer] = []
        self.readers: list[Observer] = []
        self._timer: Any = None
        if telemetry:
            from compressed_cache.telemetry.timer import Timer

            self._timer = Timer()
            self.add_observer(self._timer)
        # Any: None before the first call, and the type checker would ask at each use.
        self._first: Any = None
        attention_hook.install()

    # What transformers calls.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes new keys and values ``[B, H, L, D]`` of one layer; called by the model."""
        layer = self.attention_layer(layer_idx)
        is_eager = not torch.compiler.is_compiling()
        if is_eager:
            checks.check_order(self.layers, layer, self.layers[self._first])
            if layer.is_filled:
                checks.check_states(layer.store.sizes, key_states, value_states)
        if layer_idx == self._first:
            self.columns.begin_call()
            tokens = key_states.shape[2]
            if is_eager:
                self.tell_call(tokens)
            steps = tokens if self.takes_step(tokens) else self.counter.drafted
            if self.relative is not None and not layer.is_filled:
                self.settle(self.announced or tokens - steps)
            self.begin_call(tokens - steps, steps)
        if self.needs_hidden_states:
            layer.shown, self.shown = self.shown, None
        return layer.update(key_states, value_states)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask transformers builds before each step: the new tokens only.

        Which slots are visible is decided by the layers, so the mask is as small as can be. This is
        also where the host counts steps, because transformers asks for it between two of them.
        """
        if torch.compiler.is_compiling():
            # The mask of a step is not read then: as an int the offset would be compiled in.
            is_step = self.takes_step(query_length)
            self.columns.is_asked = not is_step
            return query_length, 0 if is_step else self.get_seq_length()
        self.columns.is_asked = True
        for layer in self._attention_layers():
            layer.check_attended()
        if self._is_filled:
            self._end_step(query_length)
        for observer in self.observers:
            observer.call_announced(self, query_length)
        return query_length, self.get_seq_length()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included, whether they are still held or not."""
        if not self._is_filled:
            return 0
        if torch.compiler.is_compiling():
            # An int would be compiled in as a constant.
            self.counter.is_read = True
            return self.layers[self._first].store.tokens_seen
        return self.counter.tokens_seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the text may grow without limit."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the decode step, as it does for its own static cache.

        Not while somebody is told what each layer reads, which compiled code does not do; nor while
        it drafts, where another number of drafted tokens would be another graph each time; nor
        while a prompt is read, which is done eagerly.
        """
        return not self.readers and not self.counter.in_parts

    def reset(self) -> None:
        """Makes the cache as new, in place: buffers are kept for the next prompt."""
        self.notify("reset")
        self.counter.reset()
        self.columns.reset()
        self.stop_drafting()
        self._first = None
        self.shown = None
        super().reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows become copies of the rows ``beam_idx`` ``[B]``, in place; beam search calls it."""
        self.notify("reorder_cache")
        rows: Any = self.columns.select(beam_idx, all_stay=self._is_filled)
        super().reorder_cache(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, one copy beside the other, in new memory."""
        positions = self._check_filled("batch_repeat_interleave").store.next_position
        rows = torch.arange(len(positions), device=positions.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows ``indices``, in new memory where their number is another."""
        self._check_filled("batch_select_indices")
        self.notify("batch_select_indices")
        indices = self.columns.select(indices)
        for store in self.stores():
            store.select(indices)
        self.reorder_linear_layers(indices)

    # What users look at and do.

    @property
    def rules(self) -> EvictionConfig:
        """Deprecated name of :attr:`eviction`."""
        return self.eviction

    @property
    def compressed_layer(self) -> CompressedLayer | None:
        """The layer with fewest slots that the policy works on, the first of equals, or where all
        have a sliding window one of these; None before the first prompt."""
        layers = [layer for layer in self._attention_layers() if layer.is_filled]
        return min(layers, key=lambda one: (one.is_sliding, one.store.slots_per_head), default=None)

    @property
    def evicted_tokens(self) -> int:
        """Tokens seen minus tokens held per head of :attr:`compressed_layer`, on average; the most
        of all rows."""
        layer = self.compressed_layer
        if layer is None or not layer.store.bound.policy.evicts:
            return 0
        held = (layer.store.held_positions() >= 0).sum(dim=-1).float().mean(dim=-1)
        return int((layer.store.next_position - held).max())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on the device, the policy's state included."""
        return sum(store.nbytes for store in self.stores()) + self.linear_nbytes

    @property
    def offloaded_bytes(self) -> int:
        """Bytes held off the device (``shadowkv``; 0 for the others)."""
        return sum(store.offloaded_bytes for store in self.stores())

    def timing(self) -> "Timing":
        """What it took so far, or since :meth:`reset` or :meth:`restore`, with ``telemetry=True``.

        A context that :func:`compressed_cache.compress` has read is counted, both passes over it.

        A cache sees steps begin. So the last step of a text counts as one of ``tokens_out`` but
        not in seconds, and the last token, which it is never given, not at all;
        :func:`compressed_cache.telemetry.measure` sees the end too.

        Raises:
            ValueError: without telemetry, or before the first decode step.
            NotImplementedError: a model compiled by hand.
        """
        if self._timer is None:
            raise ValueError("telemetry must be True for timing, got False")
        return self._timer.timing(self)

    def __repr__(self) -> str:
        rules = self.eviction.described()
        if self.relative is not None and not self._is_filled:
            rules = {"compression_ratio": self.relative.ratio}
        eviction = ", ".join(f"{name}={value!r}" for name, value in rules.items())
        seen = self.get_seq_length()
        return f"CompressedCache(policy={self.policy.label!r}, {eviction}, tokens_seen={seen})"

    def __getstate__(self) -> dict[str, Any]:
        # What a module was given that then failed is of no text, and would bring the model along.
        return super().__getstate__() | {"shown": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # It may be the first of this process.
        attention_hook.install()

    # What the parts of a cache call.

    def attention_layer(self, index: int) -> CompressedLayer:
        """The layer of this index, made where there is none yet."""
        if self._first is None:
            self._first = index
        self.make_layers(index + 1)
        layer = self.layers[index]
        if not isinstance(layer, CompressedLayer):
            raise ValueError(
                f"layer {index} held the state of linear attention, got keys and values. Use a new "
                "CompressedCache for another model."
            )
        return layer

    def make_layers(self, count: int) -> None:
        """Makes layers up to this number; one that never asks for a cache stays empty."""
        shared = self.counter, self.columns
        for index in range(len(self.layers), count):
            layer = CompressedLayer(self.policy, self.eviction, *shared, index, self.readers)
            self.layers.append(layer)

    def takes_step(self, tokens: int) -> bool:
        """Whether a call with ``tokens`` tokens is a decode step."""
        return tokens == 1 and self._is_filled and not self.counter.in_parts

    def begin_call(self, prompt_tokens: int, steps: int) -> None:
        """Counts a call that begins: tokens read as a prompt, then tokens read one by one."""
        is_told = self.counter.running or prompt_tokens or steps > 1
        # A model that is given its masks does not announce a step.
        if self._is_filled and (is_told or not torch.compiler.is_compiling()):
            self._end_step(prompt_tokens + steps)
        self.counter.begin(prompt_tokens, steps)

    @torch.compiler.disable(reason=attention_hook.PROMPTS)
    def settle(self, tokens: int) -> None:
        """Says how long the prompt is, whose share the budget may be."""
        if self.relative is not None:
            self.go_by(self.relative.of(tokens))

    def go_by(self, eviction: EvictionConfig) -> None:
        """Takes these numbers for the text that begins."""
        self.eviction, self.counter.interval = eviction, eviction.interval
        for layer in self._attention_layers():
            layer.settings = self.policy, eviction

    def first_filled(self) -> Any:
        """The layer that a call meets first, None while it holds nothing."""
        return self.layers[self._first] if self._is_filled else None

    @property
    def _is_filled(self) -> bool:
        return self._first is not None and self.layers[self._first].is_filled

    def _attention_layers(self) -> Iterator[CompressedLayer]:
        return (layer for layer in self.layers if isinstance(layer, CompressedLayer))

    def stores(self) -> Iterator[SlotStore]:
        """Those of all layers that have one."""
        return (one.store for one in self._attention_layers() if one.store is not None)

    def _check_filled(self, method: str) -> Any:
        first = self.first_filled()
        if first is None:
            raise ValueError(f"{method} needs a cache that holds a prompt, got an empty one")
        return first

    def _end_step(self, tokens: int) -> None:
        """Ends the step that is running, before ``tokens`` tokens come."""
        self.counter.end_step()
        if not self.policy.evicts:
            for store in self.stores():
                store.grow(self.counter.tokens_seen + tokens)
