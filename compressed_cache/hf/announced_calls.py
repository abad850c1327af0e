"""What ``generate`` and models tell a cache before they call it."""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame
from transformers import PreTrainedConfig

from compressed_cache.hf import checks
from compressed_cache.hf.columns import Columns
from compressed_cache.hf.linear_attention import LinearLayers
from compressed_cache.hf.module_inputs import show_inputs
from compressed_cache.observers import Observed
from compressed_cache.ops.masks import check_left
from compressed_cache.policies.base import Policy
from compressed_cache.step_counter import StepCounter


class AnnouncedCalls(LinearLayers, Observed):
    """The part of a cache that :mod:`compressed_cache.hf.attention_hook` calls, always eagerly."""

    policy: Policy
    counter: StepCounter
    columns: Columns
    announced = 0
    """Tokens of the text that is being read in parts, 0 where it is not."""
    needs_hidden_states: bool
    """Whether the policy looks at what attention modules are given."""

    def first_filled(self) -> Any:
        """The layer that a call meets first, None while it holds nothing."""
        raise NotImplementedError

    def stores(self) -> Iterator[Any]:
        """The stores of all layers that have one."""
        raise NotImplementedError

    def takes_step(self, tokens: int) -> bool:
        """Whether a call with ``tokens`` tokens is a decode step."""
        raise NotImplementedError

    def tell_call(self, tokens: int) -> None:
        """Says that a call begins which is not compiled, with ``tokens`` tokens of each row."""
        # So it is where compiled code is run but none is made any more.
        if eval_frame.get_eval_frame_callback() is False and self.takes_step(tokens):
            _warn_uncompiled()
        if self.first_filled() is None:
            # What a prompt that failed has counted is of no text.
            self.counter.reset()
        self.counter.expect()
        for observer in tuple(self.observers):
            observer.call_begins(self, tokens)

    def expect_model(self, model: Any) -> None:
        """Says what model is about to generate.

        Raises:
            NotImplementedError: a model this cache cannot serve.
        """
        checks.check_model(model)
        self.expect_forward(model)

    def expect_forward(self, model: Any) -> None:
        """Says what model is called, before any of its layers is.

        Raises:
            ValueError: a call before failed half way.
        """
        checks.check_whole(is_torn=self.is_torn and checks.has_linear_layers(model.config))
        self.counter.expect()
        self.was_asked = False
        if self.needs_hidden_states:
            show_inputs(model, self)

    @contextmanager
    def calling(self, model: Any, ids: Tensor | None = None) -> Iterator[None]:
        """A call of a model with these ``ids`` ``[B, L]``, all of it.

        If it fails, layers with slots know what they have read. Those of linear attention do not,
        and what went into a state cannot be taken out again.
        """
        is_used = self.first_filled() is not None
        if is_used:
            checks.check_read_once()
        self.expect_forward(model)
        seen = self.counter.tokens_seen
        if ids is not None and not is_used:
            self.columns.expect_text(ids, 0)
        try:
            yield
        except BaseException:
            self.columns.forget_expected()
            if self.first_filled() is None:
                # The next prompt is a first one.
                self.reset_linear_layers()
            elif self.was_asked or self.counter.is_read_now:
                self.is_torn = True
            raise
        is_read = self.was_asked or self.counter.tokens_seen != seen
        checks.check_read(is_read=is_read or not model.training)
        self.is_torn = False

    def expect_text(
        self,
        tokens: int,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        width: int | None = None,
    ) -> None:
        """Says what the text is that ``generate`` goes on with, what it held included.

        Args:
            tokens: of each row.
            ids: ``[B, T + L]`` int64 these tokens, None where there are embeddings of them.
            mask: ``[B, T + L]``, None where no token is padding.
            width: of its mask, where it must be that of these tokens; None: it need not.

        Raises:
            ValueError: nothing would be new, as with another text, other tokens than were read, a
                mask of more tokens, or a row that ends with padding after new tokens.
        """
        first = self.first_filled()
        seen = 0 if first is None else self.counter.tokens_seen
        checks.check_text(seen, tokens)
        if width is not None:
            checks.check_whole_text(seen, tokens, width)
        if mask is not None and mask.dim() == 2 and mask.shape[1] == tokens:
            # What is generated follows the last column. Calls of parts would not see that.
            new = mask[:, seen:tokens].bool()
            check_left(torch.stack([new.any(dim=1), new[:, -1]], dim=1))
        if first is not None and ids is not None:
            next_position = first.store.next_position
            rows: Any = self.columns.rows_of(ids, mask, seen=seen, next_position=next_position)
            if rows is not None:
                self.reorder_cache(rows)

    def expect_ids(self, ids: Tensor, new: int | None) -> None:
        """Says which tokens a call is of, and those before it, where all of them are at hand.

        Args:
            ids: ``[B, N]`` int64.
            new: how many of them the call reads; None: all.
        """
        seen = 0 if self.first_filled() is None else self.counter.tokens_seen
        if ids.shape[1] == seen + (ids.shape[1] if new is None else new):
            self.columns.expect_text(ids, seen)

    @contextmanager
    def reading(self, tokens: int) -> Iterator[None]:
        """While it is open, all calls read parts of a text with so many new tokens.

        So a part of one token is read as text and not as a step. A single new token is a step.
        """
        self.counter.in_parts, self.announced = tokens > 1, tokens
        try:
            yield
        finally:
            self.counter.in_parts, self.announced = False, 0

    def expect_call(
        self, config: PreTrainedConfig, attention_mask: Any, rows: int, tokens: int
    ) -> None:
        """Says what a call is like that begins, unless it is compiled.

        What a 2-D mask shows as padding from now on is dropped, as if it had never been read. That
        is not looked at for the single token of a decode step on another device than the CPU,
        which would have to be waited for.

        Args:
            config: of the model.
            attention_mask: as the model was given it.
            rows: of the batch.
            tokens: of each row in this call.

        Raises:
            NotImplementedError: a model this cache cannot serve, or a prompt off the device of
                which something would be dropped.
            ValueError: another batch, or a mask that is not of the text held.
        """
        first = self.first_filled()
        if first is None:
            checks.check_config(config)
            checks.check_first_prompt(self.policy)
            return
        # Linear attention, which may come first, would say it in words of torch.
        checks.check_batch(first.store.sizes.batch, rows)
        next_position = first.store.next_position
        seen = self.counter.tokens_seen
        real = self.columns.announce(attention_mask, tokens, seen=seen, like=next_position)
        if real is None:
            return
        moved = self.columns.moved_by(real, seen=seen, next_position=next_position)
        if moved is not None:
            for store in self.stores():
                store.check_renumber(moved)
            self.notify("attention_mask")
            for store in self.stores():
                store.renumber(moved)
        self.columns.known = real.expand(len(next_position), -1)


@functools.cache
def _warn_uncompiled() -> None:
    limit = torch._dynamo.config.recompile_limit
    warnings.warn(
        "decode steps that were to be compiled run eagerly: each policy and each shape takes a "
        f"graph or two, and torch._dynamo.config.recompile_limit allows {limit} of them. Call "
        "torch._dynamo.reset() between policies, or raise the limit.",
        stacklevel=4,
    )
