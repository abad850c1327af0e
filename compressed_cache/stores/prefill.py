"""How a layer reads several tokens at once: a prompt, a further one, or drafted tokens."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from compressed_cache.hf import checks
from compressed_cache.ops import attention
from compressed_cache.ops import eviction as slots
from compressed_cache.ops.attention_sums import attention_totals
from compressed_cache.ops.masks import Mask, is_causal
from compressed_cache.stores import channels
from compressed_cache.stores import prompt_blocks as blocks
from compressed_cache.stores.decode_step import NewToken

if TYPE_CHECKING:
    from compressed_cache.layer import CompressedLayer


class States(NamedTuple):
    """What attention has of the tokens of one call."""

    query: Tensor
    """``[B, H * G, L, D]``."""
    key: Tensor
    """``[B, H, L, D]``."""
    value: Tensor
    """``[B, H, L, D]``."""
    real: Tensor
    """``[B, L]`` bool, ``False`` at padding."""
    mask: Mask | None = None
    """What these tokens see; None: those before them."""

    def split(self, count: int) -> tuple["States", "States"]:
        """The first ``count`` tokens, and the others, without what a mask says of these."""
        first, rest = self.take(slice(None, count)), self.take(slice(count, None))
        return first._replace(mask=self.mask and self.mask.first(count)), rest

    def take(self, part: slice) -> "States":
        """Some of the tokens, without what a mask says of these."""
        query, key, value = (tensor[:, :, part] for tensor in (self.query, self.key, self.value))
        return States(query, key, value, self.real[:, part])

    def detached(self) -> "States":
        """The same without gradients."""
        query, key, value = (x.detach() for x in (self.query, self.key, self.value))
        return self._replace(query=query, key=key, value=value)


def read(
    layer: "CompressedLayer", states: States, prompt_tokens: int, *, weighs: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Reads so many tokens as a prompt and the others one by one.

    Args:
        layer: where to.
        states: all tokens of a call.
        prompt_tokens: how many of them are a prompt.
        weighs: whether the attention weights are wanted.

    Returns:
        The output ``[B, L, H * G, D]``, but of an empty layer only that of the tokens after the
        prompt, None if there are none: the model itself computes that of the prompt. And the
        weights ``[B, H * G, L, S + L]`` over what was held before and then the new tokens; None
        unless all of them were read together.
    """
    prompt, steps = states.split(prompt_tokens)
    if not layer.is_filled:
        layer.fill(prompt.detached())
        return (_read_steps(layer, steps)[0] if steps.real.shape[1] else None), None
    if not steps.real.shape[1]:
        return layer.read_block(states, weighs=weighs)
    if not prompt_tokens:
        return _read_steps(layer, states, weighs=weighs)
    outputs = [layer.read_block(prompt)[0], _read_steps(layer, steps)[0]]
    return torch.cat(outputs, dim=1), None


def positions_of(real: Tensor, first: Tensor | int) -> Tensor:
    """Positions of tokens ``[B, L]`` bool from ``first`` (``[B, 1]``) on, ``-1`` at padding."""
    return torch.where(real, first + real.cumsum(dim=1) - 1, -1)


def fill(layer: "CompressedLayer", states: States) -> None:
    """Takes the first prompt and keeps its best tokens."""
    query, key, value, real, mask = states
    layer.provide(query, key, value)
    rows = positions_of(real, 0)
    layer.next_position.copy_(real.sum(dim=1))
    layer.counts[:, 1] = key.shape[2]
    layer.protected_prefix.fill_(layer.rules.sinks)
    positions = rows[:, None].expand(key.shape[:3])
    seen = layer.attention
    if layer.policy.observes_attention:
        seen = _seen(layer, query, key, rows, mask)
    channels.choose(layer, query, key, real)
    query, key = channels.ordered(layer, query), channels.ordered(layer, key)
    _record_tails(layer, key, rows)
    key = channels.kept(layer, key)
    notes = layer.note(key, value, positions)
    _end_of_prompt(layer, query, rows)
    scores = None
    if layer.policy.prompt_block is not None:
        tokens = key, value, positions, seen, notes
        scores, notes = blocks.rank(layer, channels.kept(layer, query), tokens, rows)
    layer.keep_best(key, value, positions, seen, notes, scores)
    layer.is_filled = layer.is_initialized = True


def _seen(
    layer: "CompressedLayer", query: Tensor, key: Tensor, rows: Tensor, mask: Mask | None
) -> Tensor:
    """What the policy makes of the attention of a first prompt, or of that within its blocks."""
    length = layer.policy.prompt_block
    if length is None:
        return _seen_of_prompt(layer, query, key, rows, mask)
    seen = layer.attention.new_zeros(*key.shape[:3], *layer.attention.shape[3:])
    for block in blocks.split(rows, length):
        own = _seen_of_prompt(layer, block.take(query), block.take(key), block.rows)
        seen = block.put(seen, own)
    return seen


def _seen_of_prompt(
    layer: "CompressedLayer",
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    mask: Mask | None = None,
) -> Tensor:
    """What the policy makes of the attention of a first prompt, ``[B, H, L]`` or more."""
    see = None
    if mask is not None and not is_causal(mask, rows >= 0):
        see = layer.see(mask, rows.new_zeros(*key.shape[:2], 0))
    elif layer.policy.adds_attention:
        assert layer.sizes is not None
        totals = attention_totals(query, key, rows >= 0, form=layer.form, sizes=layer.sizes)
        if totals is not None:
            return totals
    shape = *key.shape[:3], *layer.attention.shape[3:]
    seen = torch.zeros(shape, dtype=torch.float32, device=key.device)
    for weights, own in attention.attention_rows(
        query,
        key,
        query_positions=rows,
        positions=rows[:, None],
        form=layer.form,
        last=layer.policy.prompt_queries,
        see=see,
    ):
        seen = layer.accumulate(seen, weights, own, rows[:, None].expand(key.shape[:3]))
    return seen


def read_block(
    layer: "CompressedLayer", states: States, *, weighs: bool = False
) -> tuple[Tensor, Tensor | None]:
    """A further prompt, or the next chunk of one, attends over the slots and over itself.

    Then the tokens held and the new ones are ranked together and the best are kept. Until then no
    more than the slots and the new tokens are in memory.
    """
    query, key, value, real, mask = states
    count = real.sum(dim=1)
    is_prompt = layer.clock.is_first_prompt
    if is_prompt and layer.policy.evicts:
        checks.check_prompt(layer.next_position + count, layer.rules, layer.budget)
    rows = positions_of(real, layer.next_position[:, None])
    new_positions = rows[:, None].expand(key.shape[:3])
    held = layer.held()
    query, key = channels.ordered(layer, query), channels.ordered(layer, key)
    # A pool has one row of slots for all heads.
    known = channels.whole_keys(layer, layer.next_position).expand(-1, key.shape[1], -1, -1)
    known, known_values = (layer.constant(x, query, key, value) for x in (known, held.values))
    whole, values = torch.cat([known, key], dim=2), torch.cat([known_values, value], dim=2)
    positions = torch.cat([held.positions, new_positions], dim=2)
    observes = layer.policy.observes_attention
    seen = before = layer.attention
    if observes:
        new = layer.attention.new_zeros(*key.shape[:3], *layer.attention.shape[3:])
        seen = before = torch.cat([held.attention, new], dim=2)

    def observe(weights: Tensor, own: Tensor) -> None:
        nonlocal seen
        if observes:
            seen = layer.accumulate(seen, weights.detach(), own, positions)

    queries, attended = layer.attended(query, whole, rows, positions)
    attended = attention.attention_rows(
        queries,
        attended,
        query_positions=rows,
        positions=positions,
        form=layer.form,
        window=layer.window,
        see=layer.see(mask, held.positions),
    )
    result = weigh(attended, values, weighs=weighs, observe=observe)
    # A graph through the slots would live as long as the cache.
    query, key, value, whole, values = (x.detach() for x in (query, key, value, whole, values))
    keys, key_kept = channels.kept(layer, whole), channels.kept(layer, key)
    notes = torch.cat([held.notes, layer.note(key_kept, value, new_positions)], dim=2)
    if observes:
        # A row that only had padding saw nothing new.
        saw = (count > 0).view(-1, *[1] * (seen.dim() - 1))
        seen = torch.where(saw, seen, before)
    layer.next_position.add_(count)
    _record_tails(layer, key, rows)
    if is_prompt:
        _end_of_prompt(layer, query, rows)
    else:
        _record_queries(layer, query, rows)
    if layer.policy.evicts:
        layer.keep_best(keys, values, positions, seen, notes)
    else:
        free = layer.free_slot + torch.arange(key.shape[2], device=key.device)
        layer.keys.index_copy_(2, free, key_kept)
        layer.values.index_copy_(2, free, value)
        layer.positions.index_copy_(2, free, new_positions)
    layer.counts[:, 1] += key.shape[2]
    return result


def weigh(
    rows: Iterator[tuple[Tensor, Tensor]],
    values: Tensor,
    *,
    weighs: bool,
    observe: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What many queries read.

    Args:
        rows: what :func:`~compressed_cache.ops.attention.attention_rows` yields.
        values: ``[B, H, S, D]``.
        weighs: whether the weights are wanted.
        observe: given each block of weights and the positions of its queries.

    Returns:
        The output ``[B, L, H * G, D]`` and the weights ``[B, H * G, L, S]``, or None.
    """
    outputs, recorded = [], []
    for weights, own in rows:
        outputs.append(weights.to(values.dtype) @ values.unsqueeze(2))
        if weighs:
            recorded.append(weights)
        if observe is not None:
            observe(weights, own)
    output = torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2)
    return output, torch.cat(recorded, dim=3).flatten(1, 2) if weighs else None


def _read_steps(
    layer: "CompressedLayer", states: States, *, weighs: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Drafted tokens one by one: exactly what decoding them would give."""
    outputs, recorded = [], []
    for token in range(states.real.shape[1]):
        # What a mask says of drafted tokens is that they follow one another.
        mask = states.mask if states.real.shape[1] == 1 else None
        one = states.take(slice(token, token + 1))
        ranks = layer.clock.ranks_at(token)
        output, weights = layer.step(NewToken(*one[:3], ranks, weighs, one.real[:, 0], mask))
        outputs.append(output)
        if weights is not None:
            recorded.append(weights.flatten(1, 2))
    weights = torch.cat(recorded, dim=2) if len(recorded) == len(outputs) else None
    return torch.cat(outputs, dim=2).transpose(1, 2), weights


def _end_of_prompt(layer: "CompressedLayer", query: Tensor, rows: Tensor) -> None:
    layer.prompt_length.copy_(layer.next_position)
    if layer.rules.protect_prompt:
        layer.protected_prefix.clamp_(min=layer.next_position)
    _record_queries(layer, query, rows)


def _record_queries(layer: "CompressedLayer", query: Tensor, rows: Tensor) -> None:
    if layer.query_positions.shape[1]:
        grouped = attention.group_queries(channels.kept(layer, query), layer.keys.shape[1])
        _write_ring(layer.queries, grouped, rows, layer.next_position)
        positions = layer.query_positions[:, None, None, :, None]
        _write_ring(positions, rows[:, None, None, :, None], rows, layer.next_position)


def _record_tails(layer: "CompressedLayer", key: Tensor, rows: Tensor) -> None:
    if layer.policy.prunes_channels:
        tails = key[..., layer.keys.shape[3] :].unsqueeze(2)
        _write_ring(layer.tails.unsqueeze(2), tails, rows, layer.next_position)


def _write_ring(ring: Tensor, new: Tensor, rows: Tensor, next_position: Tensor) -> None:
    """Writes what the last ``W`` tokens bring to their places, each row by its own positions.

    Args:
        ring: ``[B, H, G, W, D]``.
        new: ``[B, H, G, L, D]`` of all tokens that were read.
        rows: ``[B, L]`` int64, their positions, ``-1`` at padding.
        next_position: ``[B]`` int64, the position after these.
    """
    window = ring.shape[3]
    # A further prompt may have padding in its middle, after the last token of an answer.
    newest = (rows >= 0).int().argsort(dim=1, stable=True)[:, -window:]
    rows = rows.gather(1, newest)
    before = torch.arange(-rows.shape[1], 0, device=rows.device)
    # At padding this is the place of an older token, which is written back.
    place = (next_position[:, None] + before) % window
    column = newest[:, None, None, :, None]
    new = new.gather(3, column.expand(*new.shape[:3], -1, new.shape[4]))
    index = place[:, None, None, :, None].expand_as(new)
    real = (rows >= 0)[:, None, None, :, None]
    ring.scatter_(3, index, torch.where(real, new, ring.gather(3, index)))


def keep_best(
    layer: "CompressedLayer",
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    seen: Tensor,
    notes: Tensor,
    scores: Tensor | None = None,
) -> None:
    """Copies the best of these tokens ``[B, H, L, ...]`` into the slots.

    Args:
        layer: where to.
        keys: ``[B, H, L, D]``, and so on.
        values: likewise.
        positions: likewise.
        seen: what was seen of them.
        notes: theirs.
        scores: ``[B, H, L]`` float32, protection applied; None: what the policy says of all
            together.
    """
    count = min(positions.shape[2], layer.positions.shape[2])
    kept = None
    if count < positions.shape[2]:
        if scores is None:
            scores, notes = layer.rank_prompt(keys, values, positions, seen, notes)
        kept = slots.keep_best(scores, positions, count=count)
    contents = [(layer.keys, keys), (layer.values, values), (layer.positions, positions)]
    contents.append((layer.notes, notes))
    if layer.policy.observes_attention:
        contents.append((layer.attention, seen))
    for memory, tokens in contents:
        if kept is not None:
            index = kept.reshape(*kept.shape, *[1] * (tokens.dim() - 3))
            tokens = tokens.gather(2, index.expand(*kept.shape, *tokens.shape[3:]))
        memory[:, :, :count].copy_(tokens)
    if kept is not None and layer.policy.merges:
        gone = (positions >= 0).scatter(2, kept, False)
        held = layer.positions >= 0
        merged = layer.policy.merged(layer.keys, layer.values, held, (keys, values, gone))
        layer.values.copy_(merged)
