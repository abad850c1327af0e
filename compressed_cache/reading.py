"""How a layer reads several tokens at once: a prompt, a further one, or drafted tokens."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from compressed_cache import attention, checks, slots
from compressed_cache.stepping import step
from compressed_cache.totals import attention_totals

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

    def split(self, count: int) -> tuple["States", "States"]:
        """The first ``count`` tokens, and the others."""
        first, rest = slice(None, count), slice(count, None)
        return self._slice(first), self._slice(rest)

    def _slice(self, part: slice) -> "States":
        query, key, value = (tensor[:, :, part] for tensor in (self.query, self.key, self.value))
        return States(query, key, value, self.real[:, part])


def read(layer: "CompressedLayer", states: States, prompt_tokens: int) -> Tensor | None:
    """Reads so many tokens as a prompt and the others one by one.

    Returns:
        The output ``[B, L, H * G, D]``, but of an empty layer only that of the tokens after the
        prompt, None if there are none: the prompt's is the model's own affair.
    """
    prompt, steps = states.split(prompt_tokens)
    outputs = []
    if not layer.is_filled:
        _fill(layer, *prompt)
    elif prompt_tokens:
        outputs.append(_read_block(layer, *prompt))
    if steps.real.shape[1]:
        outputs.append(_read_steps(layer, *steps))
    return torch.cat(outputs, dim=1) if outputs else None


def _fill(
    layer: "CompressedLayer", query: Tensor, key: Tensor, value: Tensor, real: Tensor
) -> None:
    """Takes the first prompt and keeps its best tokens."""
    layer.provide(query, key, value)
    rows = torch.where(real, real.cumsum(dim=1) - 1, -1)
    layer.next_position.copy_(real.sum(dim=1))
    layer.counts[:, 1] = key.shape[2]
    layer.protected_prefix.fill_(layer.rules.sinks)
    positions = rows[:, None].expand(key.shape[:3])
    seen = layer.attention
    if layer.policy.observes_attention:
        seen = _seen_of_prompt(layer, query, key, rows)
    notes = layer.note(key, value, positions)
    _end_of_prompt(layer, query, rows)
    _keep_best(layer, key, value, positions, seen, notes)
    layer.is_filled = layer.is_initialized = True


def _seen_of_prompt(layer: "CompressedLayer", query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
    """What the policy makes of the attention of a first prompt, ``[B, H, L]`` or more."""
    if layer.policy.adds_attention:
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
    ):
        seen = layer.accumulate(seen, weights, own, rows[:, None].expand(key.shape[:3]))
    return seen


def _read_block(
    layer: "CompressedLayer", query: Tensor, key: Tensor, value: Tensor, real: Tensor
) -> Tensor:
    """A further prompt, or the next chunk of one, attends over the slots and over itself.

    Then the tokens held and the new ones are ranked together and the best are kept. Until then no
    more than the slots and the new tokens are in memory.
    """
    count = real.sum(dim=1)
    is_prompt = layer.clock.is_first_prompt
    if is_prompt and layer.policy.evicts:
        checks.check_prompt(layer.next_position + count, layer.rules)
    rows = torch.where(real, layer.next_position[:, None] + real.cumsum(dim=1) - 1, -1)
    new_positions = rows[:, None].expand(key.shape[:3])
    keys, values = torch.cat([layer.keys, key], dim=2), torch.cat([layer.values, value], dim=2)
    positions = torch.cat([layer.positions, new_positions], dim=2)
    observes = layer.policy.observes_attention
    seen = before = layer.attention
    if observes:
        new = layer.attention.new_zeros(*key.shape[:3], *layer.attention.shape[3:])
        seen = before = torch.cat([layer.attention, new], dim=2)
    notes = torch.cat([layer.notes, layer.note(key, value, new_positions)], dim=2)
    outputs = []
    for weights, own in attention.attention_rows(
        query, keys, query_positions=rows, positions=positions, form=layer.form, window=layer.window
    ):
        outputs.append(weights.to(values.dtype) @ values.unsqueeze(2))
        if observes:
            seen = layer.accumulate(seen, weights, own, positions)
    if observes:
        # A row that only had padding saw nothing new.
        saw = (count > 0).view(-1, *[1] * (seen.dim() - 1))
        seen = torch.where(saw, seen, before)
    layer.next_position.add_(count)
    if is_prompt:
        _end_of_prompt(layer, query, rows)
    else:
        _record_queries(layer, query, rows)
    if layer.policy.evicts:
        _keep_best(layer, keys, values, positions, seen, notes)
    else:
        free = layer.tokens_seen + torch.arange(key.shape[2], device=key.device)
        layer.keys.index_copy_(2, free, key)
        layer.values.index_copy_(2, free, value)
        layer.positions.index_copy_(2, free, new_positions)
    layer.counts[:, 1] += key.shape[2]
    return torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2)


def _read_steps(
    layer: "CompressedLayer", query: Tensor, key: Tensor, value: Tensor, real: Tensor
) -> Tensor:
    """Drafted tokens of one row, one by one: exactly what decoding them would give."""
    outputs = []
    for token in range(query.shape[2]):
        here = slice(token, token + 1)
        one = (tensor[:, :, here] for tensor in (query, key, value))
        outputs.append(step(layer, *one, ranks=layer.clock.ranks_at(token))[0])
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _end_of_prompt(layer: "CompressedLayer", query: Tensor, rows: Tensor) -> None:
    layer.prompt_length.copy_(layer.next_position)
    if layer.rules.protect_prompt:
        layer.protected_prefix.clamp_(min=layer.next_position)
    _record_queries(layer, query, rows)


def _record_queries(layer: "CompressedLayer", query: Tensor, rows: Tensor) -> None:
    """Writes the last ``W`` queries to their places in the ring, each row by its own positions."""
    window = layer.query_positions.shape[1]
    if not window:
        return
    # A further prompt may have padding in its middle, after the last token of an answer.
    newest = (rows >= 0).int().argsort(dim=1, stable=True)[:, -window:]
    rows = rows.gather(1, newest)
    before = torch.arange(-rows.shape[1], 0, device=rows.device)
    # At padding this is the place of an older query, which is written back.
    place = (layer.next_position[:, None] + before) % window
    grouped = attention.group_queries(query, layer.keys.shape[1])
    column = newest[:, None, None, :, None]
    grouped = grouped.gather(3, column.expand(*grouped.shape[:3], -1, grouped.shape[4]))
    index = place[:, None, None, :, None].expand_as(grouped)
    real = rows >= 0
    held = layer.queries.gather(3, index)
    layer.queries.scatter_(3, index, torch.where(real[:, None, None, :, None], grouped, held))
    held = layer.query_positions.gather(1, place)
    layer.query_positions.scatter_(1, place, torch.where(real, rows, held))


def _keep_best(
    layer: "CompressedLayer",
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    seen: Tensor,
    notes: Tensor,
) -> None:
    """Copies the best of these tokens ``[B, H, L, ...]`` into the slots."""
    count = min(positions.shape[2], layer.positions.shape[2])
    kept = None
    if count < positions.shape[2]:
        prompt = layer.view(keys, values, positions, seen, notes, is_prompt=True)
        prompt = prompt._replace(notes=layer.policy.revise(prompt))
        kept = slots.keep_best(layer.protected_scores(prompt), positions, count=count)
        notes = prompt.notes
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
