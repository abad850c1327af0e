"""The public face: a transformers cache with a fixed number of slots per layer."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from compressed_cache.hf import attention_hook as hook
from compressed_cache.hf import checks
from compressed_cache.hf.columns import Columns, positions_without
from compressed_cache.hf.drafting import Drafts
from compressed_cache.hf.linear_attention import LinearLayers, states
from compressed_cache.layer import CompressedLayer
from compressed_cache.observers import Listener, Watcher
from compressed_cache.policies import Policy, budgets, make_policy
from compressed_cache.policies.eviction_config import Rules, resolve_rules
from compressed_cache.snapshot import Snapshot
from compressed_cache.step_counter import Clock
from compressed_cache.stores.lazy import LazyLayer
from compressed_cache.stores.offloaded import OffloadedLayer
from compressed_cache.stores.pool import PoolLayer

if TYPE_CHECKING:
    from compressed_cache.telemetry import Timing

_LAYERS = {
    "slots": CompressedLayer,
    "offloaded": OffloadedLayer,
    "pool": PoolLayer,
    "lazy": LazyLayer,
}


class CompressedCache(LinearLayers):
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
        budget: slots per key/value head and layer, allocated once and never exceeded. A list has
            one number for each layer of full attention, or a list with one number for each
            key/value head. Policies may share out a single number, which then is the mean.
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
        telemetry: whether :meth:`timing` can tell what a run took.
        policy_options: fields of the policy, with a policy given by name.

    Attributes:
        layers: one per layer of the model, attention layers with ``keys`` and ``values``
            ``[B, H, S, D]`` and ``positions`` ``[B, H, S]`` int64, ``-1`` where empty or padding.
            Slots are in no particular order. Sliding-window layers have ``S = window`` and keep
            their window; linear-attention layers are transformers' own. Where heads have different
            numbers of slots, a layer is a :class:`~compressed_cache.stores.pool.PoolLayer`, with one pool
            of slots for all heads; ``layer.held()`` shows them head by head.

    Raises:
        ValueError: an unknown policy, a value out of range, or a budget too small for what is
            protected.
        TypeError: an argument of the wrong type, or an unknown option.
        NotImplementedError: with ``config``, a model this cache cannot serve.
    """

    def __init__(
        self,
        policy: str | Policy = "snapkv",
        budget: int | Sequence[int] | Sequence[Sequence[int]] = 256,
        *,
        interval: int | None = None,
        sinks: int | None = None,
        recent: int | None = None,
        protect_prompt: bool | None = None,
        config: PreTrainedConfig | None = None,
        telemetry: bool = False,
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
            checks.check_config(config)
            if (model := checks.class_of(config)) is not None:
                checks.check_class(model)
            if not isinstance(self.rules.budget, int):
                budgets.resolve(self.rules, self.policy, config.get_text_config())
        super().__init__(layers=[])
        self.clock = Clock(self.rules.interval)
        self.columns = Columns()
        self.watchers: list[Watcher] = []
        self._timer: Any = None
        if telemetry:
            from compressed_cache.telemetry.timer import Timer

            self._timer = Timer()
            self.watchers.append(self._timer)
        self._drafts = Drafts()
        # Any: None before the first call, and the type checker would ask at each use.
        self._first: Any = None
        self.listener: Listener | None = None
        hook.install()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes new keys and values ``[B, H, L, D]`` of one layer; called by the model."""
        layer = self.attention_layer(layer_idx)
        if not torch.compiler.is_compiling():
            self._check(layer, key_states, value_states)
        if layer_idx == self._first:
            self.columns.begin_call()
            self._begin(key_states.shape[2])
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
            self._tick(query_length)
        for watcher in self.watchers:
            watcher.call_begins(self, query_length)
        return query_length, self.get_seq_length()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included, whether they are still held or not."""
        if not self._is_filled:
            return 0
        if torch.compiler.is_compiling():
            # An int would be compiled in as a constant.
            self.clock.is_read = True
            return self.layers[self._first].tokens_seen
        return self.clock.tokens_seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the text may grow without limit."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the decode step, as it does for its own static cache.

        Not while it drafts: another number of drafted tokens would be another graph each time. Nor
        while somebody is told what each layer reads, which compiled code does not do.
        """
        return not self._drafts.active and self.listener is None

    @property
    def compressed_layer(self) -> CompressedLayer | None:
        """The layer with fewest slots that the policy works on, the first of equals, or where all
        have a sliding window one of these; None before the first prompt."""
        layers = [layer for layer in self._attention_layers() if layer.is_filled]
        return min(layers, key=lambda one: (one.is_sliding, one.slots_per_head), default=None)

    @property
    def evicted_tokens(self) -> int:
        """Tokens seen minus tokens held per head of :attr:`compressed_layer`, on average; the most
        of all rows."""
        layer = self.compressed_layer
        if layer is None or not layer.policy.evicts:
            return 0
        held = (layer.held().positions >= 0).sum(dim=-1).float().mean(dim=-1)
        return int((layer.next_position - held).max())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on the device, the policy's state included."""
        held = sum(tensor.nbytes for layer in self.layers for tensor in _tensors(layer))
        return held - self.offloaded_bytes

    @property
    def offloaded_bytes(self) -> int:
        """Bytes held off the device (policies of the layout ``offloaded``; 0 for the others)."""
        return sum(layer.offloaded_bytes for layer in self._attention_layers())

    def timing(self) -> "Timing":
        """What it took so far, or since :meth:`reset` or :meth:`restore`, with ``telemetry=True``.

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

    def reset(self) -> None:
        """Makes the cache as new, in place: buffers are kept for the next prompt."""
        self._tell("reset")
        self.clock.reset()
        self.columns.reset()
        self._drafts.stop()
        self._first = None
        super().reset()

    def snapshot(self) -> Snapshot:
        """A copy of what is held, for :meth:`restore`: one prompt can then begin many texts."""
        return Snapshot.take(self)

    def restore(self, snapshot: Snapshot) -> None:
        """Holds again what it held at :meth:`snapshot`, in place where the batch is as large.

        Raises:
            ValueError: a snapshot of a cache with another policy or other rules.
        """
        if (snapshot.policy, snapshot.rules) != (self.policy, self.rules):
            raise ValueError(
                f"snapshot must be of a cache like this one ({self.policy}, {self.rules}), got one "
                f"with {snapshot.policy}, {snapshot.rules}"
            )
        self._tell("restore")
        self._drafts.stop()
        snapshot.put(self)

    def save(self, path: str | Path) -> None:
        """Writes what is held to a safetensors file.

        Raises:
            NotImplementedError: a model with linear-attention layers.
        """
        self.snapshot().save(path)

    @classmethod
    def load(
        cls, path: str | Path, *, policy: Policy | None = None, device: torch.device | str = "cpu"
    ) -> "CompressedCache":
        """A cache that goes on where the one that wrote ``path`` with :meth:`save` was.

        Args:
            path: the file.
            policy: the policy object, for a policy that is not in ``POLICIES``.
            device: where its tensors go, that of the model.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of something else, or of another version of the format.
        """
        snapshot = Snapshot.load(path, policy=policy, device=device)
        cache = cls(snapshot.policy, **vars(snapshot.rules))
        snapshot.put(cache)
        return cache

    def activate_past_recording(self) -> None:
        """From the next call on :meth:`crop` can take tokens back; assisted decoding calls it."""
        self._tell("activate_past_recording")
        self._drafts.start()
        super().activate_past_recording()

    def expect_model(self, model: Any) -> None:
        """Says what model is about to generate: called by ``generate`` before any work.

        Raises:
            NotImplementedError: a model this cache cannot serve.
        """
        checks.check_model(model)

    def expect_text(self, tokens: int) -> None:
        """Says how long the text is that ``generate`` goes on with, what it held included.

        Raises:
            ValueError: nothing would be new, as with another text.
        """
        checks.check_text(self.get_seq_length(), tokens)

    def expect_call(self, config: PreTrainedConfig, attention_mask: Any, tokens: int) -> None:
        """Says what a call is like that begins: called before the first layer, unless compiled.

        What a 2-D mask shows as padding from now on is dropped, as if it had never been read. That
        is not looked at for the single token of a decode step on another device than the CPU,
        which would have to be waited for.

        Args:
            config: of the model.
            attention_mask: as the model was given it.
            tokens: of each row in this call.

        Raises:
            NotImplementedError: a model this cache cannot serve, or a prompt off the device of
                which something would be dropped.
            ValueError: a mask that is not of the text held.
        """
        if not self._is_filled:
            checks.check_config(config)
            return
        columns, seen = self.columns, self.clock.tokens_seen
        is_new = columns.announced is not attention_mask or columns.announced_at != seen
        # What generate has built for the call before comes without the text.
        width = 0 if attention_mask is None else attention_mask.shape[-1]
        if not is_new or (columns.is_asked and width == tokens):
            return
        columns.announced, columns.announced_at = attention_mask, seen
        columns.truncate(seen)
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            checks.check_mask(attention_mask, seen, tokens)
            device = self.layers[self._first].keys.device
            if tokens > 1 or device.type == "cpu":
                real = attention_mask[:, : seen + tokens].to(device, torch.bool)
                self._drop_padding(real, seen)

    def _drop_padding(self, real: Tensor, seen: int) -> None:
        """Takes columns ``[B, T + L]`` bool for real or not, ``seen`` of which were read."""
        known, past = self.columns.known, real[:, :seen]
        if known is None or known.shape != past.shape or not torch.equal(known, past):
            first = self.layers[self._first]
            known = self.columns.until(seen, first.next_position)
            real = real.expand(len(known), -1)
            past = real[:, :seen]
            checks.check_shown(known, past)
            hidden = known & ~past
            if bool(hidden.any()):
                moved = positions_without(hidden, known)
                layers = [layer for layer in self._attention_layers() if layer.is_filled]
                for layer in layers:
                    layer.check_renumber(moved)
                self._tell("attention_mask")
                for layer in layers:
                    layer.renumber(moved)
        self.columns.known = real

    def expect_prompt(self, tokens: int) -> None:
        """Says how long the text is that the next call begins with, what it held included.

        Assisted decoding reads the prompt and the first drafted tokens in one call, and only what
        the user wrote is a prompt.
        """
        self._drafts.prompt_length = tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last ``-tokens_to_remove`` tokens of the last call, evictions included.

        Raises:
            ValueError: a positive number, or more tokens than that call had.
            NotImplementedError: a model with linear-attention layers.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                "tokens_to_remove must be <= 0, the number of tokens to take back as transformers "
                f"counts it, got {tokens_to_remove}"
            )
        if not all(isinstance(layer, CompressedLayer) for layer in self.layers):
            raise NotImplementedError(
                "CompressedCache cannot take tokens back from linear-attention layers. Generate "
                "without assisted decoding or prompt lookup."
            )
        # Some releases count on the device.
        self._drafts.take_back(self, -int(tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows become copies of the rows ``beam_idx`` ``[B]``, in place; beam search calls it."""
        self._tell("reorder_cache")
        self.columns.select(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, one copy beside the other, in new memory."""
        first = self._filled_layer("batch_repeat_interleave")
        rows = torch.arange(first.keys.shape[0], device=first.keys.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows ``indices``, in new memory where their number is another."""
        self._filled_layer("batch_select_indices")
        self._tell("batch_select_indices")
        self.columns.select(indices)
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.select(indices)
            else:
                layer.reorder_cache(indices)

    def __repr__(self) -> str:
        rules = ", ".join(f"{name}={value!r}" for name, value in vars(self.rules).items())
        seen = self.get_seq_length()
        return f"CompressedCache(policy={self.policy.label!r}, {rules}, tokens_seen={seen})"

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # It may be the first of this process.
        hook.install()

    # What the parts of a cache call, and those who watch it.

    def listen(self, listener: Listener | None) -> None:
        """Lets every layer tell what it reads, or no longer."""
        self.listener = listener
        for layer in self._attention_layers():
            layer.listener = listener

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

    def takes_step(self, tokens: int) -> bool:
        """Whether a call with so many tokens is a decode step."""
        return tokens == 1 and self._is_filled

    def count(self, prompt_tokens: int, steps: int) -> None:
        """Counts a call that begins: tokens read as a prompt, then tokens read one by one."""
        if self._is_filled and (self.clock.running or prompt_tokens + steps > 1):
            self._tick(prompt_tokens + steps)
        self.clock.begin(prompt_tokens, steps)

    def make_layers(self, count: int) -> None:
        """Makes layers up to this number; one that never asks for a cache stays empty."""
        for index in range(len(self.layers), count):
            layer = _LAYERS[self.layout](self.policy, self.rules, self.clock, self.columns, index)
            layer.listener = self.listener
            self.layers.append(layer)

    @property
    def layout(self) -> str:
        """Where the layers have their tokens, see :attr:`Policy.layout`."""
        own = self.policy.evicts and budgets.is_per_head(self.rules.budget)
        return "pool" if own else self.policy.layout

    @property
    def _is_filled(self) -> bool:
        return self._first is not None and self.layers[self._first].is_filled

    def _attention_layers(self) -> Iterator[CompressedLayer]:
        return (layer for layer in self.layers if isinstance(layer, CompressedLayer))

    def _tell(self, what: str) -> None:
        for watcher in self.watchers:
            watcher.rearranged(self, what)

    def _filled_layer(self, method: str) -> CompressedLayer:
        if not self._is_filled:
            raise ValueError(f"{method} needs a cache that holds a prompt, got an empty one")
        return self.layers[self._first]

    def _check(self, layer: CompressedLayer, keys: Tensor, values: Tensor) -> None:
        first = self.layers[self._first]
        if layer is first:
            for other in self._attention_layers():
                other.check_attended()
                if other.is_filled:
                    checks.check_calls(other.index, other.calls, expected=first.calls)
        else:
            if isinstance(previous := self.layers[layer.index - 1], CompressedLayer):
                previous.check_attended()
            checks.check_calls(layer.index, layer.calls, expected=first.calls - 1)
        if layer.is_filled:
            checks.check_states(layer.sizes, keys, values)

    def _begin(self, tokens: int) -> None:
        prompt_tokens = tokens
        if not torch.compiler.is_compiling() and (self._drafts.active or self.clock.records):
            prompt_tokens = self._drafts.begin_call(self, tokens)
        if self.takes_step(tokens):
            prompt_tokens = 0
        self.count(prompt_tokens, tokens - prompt_tokens)

    def _tick(self, tokens: int) -> None:
        self.clock.tick()
        if not self.policy.evicts:
            for layer in self._attention_layers():
                if not layer.is_sliding:
                    layer.grow(self.clock.tokens_seen + tokens)


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


def _tensors(layer: Any) -> list[Tensor]:
    return layer.tensors() if isinstance(layer, CompressedLayer) else states(layer)
