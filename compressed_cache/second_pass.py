"""A context that is read twice: whole, and then once more to see what of it is looked at."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from compressed_cache.cache import CompressedCache
from compressed_cache.hf import checks
from compressed_cache.hf.binding import bind_module
from compressed_cache.layer import CompressedLayer
from compressed_cache.observers import Observer
from compressed_cache.ops import attention
from compressed_cache.ops.masks import check_left, left_padded
from compressed_cache.ops.tokens import Tokens, gather
from compressed_cache.policies.capabilities import ReadsTwice, Repetition, find
from compressed_cache.snapshot import LayerState, Snapshot
from compressed_cache.stores import store_for
from compressed_cache.stores.bound_policy import BoundPolicy
from compressed_cache.stores.inputs import AttentionInputs
from compressed_cache.telemetry import peaks
from compressed_cache.telemetry.timer import Timer
from compressed_cache.telemetry.timestamps import Timestamp
from compressed_cache.versions import cache_argument


@torch.no_grad()
def compress(
    model: Any,
    input_ids: Tensor,
    cache: CompressedCache,
    *,
    tokenizer: Any,
    attention_mask: Tensor | None = None,
    suffix: str = "",
    prefill_chunk_size: int | None = None,
) -> None:
    """Fills a cache whose policy ranks a context by a second pass over it (``kvzip``)::

        cache = CompressedCache("kvzip", budget=512)
        compress(model, context.input_ids, cache, tokenizer=tokenizer)
        model.generate(context_and_question, cache=cache)

    The context is read with a full cache, which is in memory twice until this returns. Then it is
    repeated part by part, and after each the cache is as it was. :meth:`CompressedCache.snapshot`
    and :meth:`~CompressedCache.restore` let one compressed context begin many texts. With
    ``protect_prompt=True`` it is the context that is protected, not what follows it.

    Args:
        model: the model.
        input_ids: ``[B, L]`` int64 the contexts, with what a chat template puts before them.
        cache: an empty one.
        tokenizer: makes tokens of the instructions.
        attention_mask: ``[B, L]``, padded on the left; None: no row is padded.
        suffix: what a chat template puts between a question and the answer, which stands between
            each instruction and what is repeated.
        prefill_chunk_size: tokens of the context that are read at a time, at least two; None: all.

    Raises:
        ValueError: a policy that reads once, a cache that holds something, ids or a mask of another
            shape, padding elsewhere, a context whose repetition is more than the model can see, or
            a budget too small for what is protected.
        TypeError: an argument of the wrong type.
        NotImplementedError: a model that cannot be served.
    """
    # What torch.compile returns is no model of transformers; the second pass is read eagerly.
    model = getattr(model, "_orig_mod", model)
    began = Timestamp()
    policy = _checked_policy(cache)
    _check_input(input_ids, attention_mask, tokenizer, suffix)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    mask = mask.to(input_ids.device, torch.int64)
    check_left(mask.bool())
    lengths = mask.sum(dim=1)
    cache.settle(input_ids.shape[1])

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    repetitions = [
        policy.repetitions(ids[-length:] if length else [], cache.eviction.sinks, suffix, encode)
        for ids, length in zip(input_ids.tolist(), lengths.tolist(), strict=True)
    ]
    _check_length(model, lengths.tolist(), repetitions)

    timers = [observer for observer in cache.observers if isinstance(observer, Timer)]
    if timers:
        peaks.restart()
    whole, second = CompressedCache("full"), _SecondPass(cache, lengths)
    whole.expect_model(model)
    whole.add_observer(second)
    read(model, input_ids, mask, whole, chunk=prefill_chunk_size)
    before = whole.snapshot()
    second.begin(before)
    for parts in zip_longest(*repetitions):
        # A part begins at the same position in all rows that have it.
        second.start = next(part.start for part in parts if part is not None)
        second.length = max(part.stop for part in parts if part is not None) - second.start
        tokens = [[] if part is None else part.tokens for part in parts]
        for rows in alike(tokens) if whole.is_recurrent else [list(range(len(tokens)))]:
            ids, real = (
                tensor.to(input_ids) for tensor in left_padded([tokens[row] for row in rows])
            )
            second.rows = torch.tensor(rows, device=mask.device)
            if len(rows) < len(tokens):
                whole.batch_select_indices(second.rows)
            read(model, ids, torch.cat([mask[rows], real], dim=1), whole)
            whole.restore(before)
    layers = tuple(second.cut(index, state) for index, state in enumerate(before.layers))
    # What comes next is a question, not more of the prompt.
    counter = before.counter | {"is_first_prompt": False}
    cache.restore(
        Snapshot(cache.policy, cache.eviction, counter, before.columns, layers, input_ids)
    )
    for timer in timers:
        timer.add_prompt(began, input_ids.shape[1])
    for own, other in zip(cache.layers, whole.layers, strict=True):
        if isinstance(own, CompressedLayer) and own.is_filled:
            own.module.bind(other.module.module)


def read(
    model: Any, ids: Tensor, mask: Tensor, cache: CompressedCache, *, chunk: int | None = None
) -> None:
    """Lets a model read tokens into a cache, as ``generate`` would.

    Args:
        model: the model.
        ids: ``[B, L]`` int64.
        mask: ``[B, T + L]``, also of what the cache has read.
        cache: a compressed one.
        chunk: how many tokens are read at a time, at least two; None: all.

    Raises:
        ValueError: a chunk without a token.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"prefill_chunk_size must be >= 1, got {chunk}")
    # Recurrent layers take padding for text where it is read alone. The last token is none.
    width = ids.shape[1] if chunk is None else max(2, chunk)
    end = mask.shape[1] - ids.shape[1]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if not cache.get_seq_length():
        _forget_images(model)
    with cache.reading(ids.shape[1]):
        for part in ids.split(width, dim=1):
            start, end = end, end + part.shape[1]
            model(
                input_ids=part,
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                use_cache=True,
                logits_to_keep=1,
                **cache_argument(cache),
            )


def alike(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Which rows are equally long, without those that are empty: recurrent layers would read the
    padding between a context and what follows it."""
    found: defaultdict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        if row:
            found[len(row)].append(index)
    return list(found.values())


def _forget_images(model: Any) -> None:
    """Takes back by how much images of an earlier text moved positions, which a model keeps until
    it computes positions itself."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


class _SecondPass(Observer):
    """Meets the layers in the first pass, and in the second adds up what their keys are worth.

    Attributes:
        start: position where what is repeated begins.
        length: how many tokens that are.
        rows: ``[R]`` int64, those of the batch that repeat it.
    """

    reads_layers = True

    def __init__(self, cache: CompressedCache, lengths: Tensor) -> None:
        self.start = self.length = 0
        self.rows = torch.arange(len(lengths), device=lengths.device)
        self._cache = cache
        self._lengths = lengths
        """``[B]`` int64, of the contexts."""
        self._bound: dict[int, BoundPolicy] = {}
        self._scores: dict[int, Tensor] = {}
        """``[B, H, L]`` float32 by layer; empty in the first pass."""

    def begin(self, before: Snapshot) -> None:
        """From now on it is the second pass."""
        for index in self._bound:
            state = before.layers[index]
            assert isinstance(state, LayerState)
            positions = state.tensors["positions"][:, :, : before.counter["prompt"]]
            self._scores[index] = torch.zeros_like(positions, dtype=torch.float32)

    def layer_read(self, layer: CompressedLayer, inputs: AttentionInputs) -> None:
        """Takes what a layer has just read."""
        if layer.is_sliding:
            return
        if layer.index in self._scores:
            scores = self._scores[layer.index]
            rows = self.rows.to(scores.device)
            scores[rows] = self._scored(scores[rows], layer, inputs)
        elif layer.index not in self._bound:
            transform = layer.store.bound.transform
            arguments = {
                "scaling": transform.scaling,
                "softcap": transform.softcap,
                "s_aux": transform.sinks,
                "sliding_window": None,
            }
            policy, eviction = self._cache.policy, self._cache.eviction
            module = layer.module.module
            bound = bind_module(policy, eviction, layer.index, module, inputs, arguments)
            checks.check_prompt(self._lengths, policy, eviction, bound.budget, bound.place)
            self._bound[layer.index] = bound

    def _scored(self, scores: Tensor, layer: CompressedLayer, inputs: AttentionInputs) -> Tensor:
        """Scores with those of the tokens that were just repeated."""
        held, columns = layer.held(), scores.shape[2]
        device = scores.device
        lengths = self._lengths[self.rows].to(device)[:, None]
        sinks = torch.arange(self._cache.eviction.sinks, device=device)
        part = torch.arange(self.start, self.start + self.length, device=device)
        asked = torch.cat([sinks, part])
        place = (asked + columns - lengths).clamp(max=columns - 1)
        keys = gather(held.keys[:, :, :columns], place[:, None])
        own = inputs.positions(lengths)
        positions = torch.cat([torch.where(asked < lengths, asked, -1), own], dim=1)[:, None]
        most = torch.zeros(*keys.shape[:2], positions.shape[2], device=device)
        for weights, _ in attention.attention_rows(
            inputs.query,
            torch.cat([keys, inputs.key], dim=2),
            query_positions=own,
            positions=positions,
            transform=layer.store.bound.transform,
        ):
            most = torch.maximum(most, weights.amax(dim=(2, 3)).float())
        offset = held.positions[:, :, :columns] - self.start
        is_repeated = (offset >= 0) & (offset < self.length)
        offset = offset.clamp(0, self.length - 1) + len(sinks)
        return torch.where(is_repeated, most.gather(2, offset), scores)

    def cut(self, index: int, state: Any) -> Any:
        """What is kept of a layer; of one without full attention all that there is."""
        if index not in self._bound:
            return state
        bound, scores = self._bound[index], self._scores[index]
        columns, tensors = scores.shape[2], state.tensors
        keys, values, positions = (
            tensors[name][:, :, :columns] for name in ("keys", "values", "positions")
        )
        store = store_for(bound)(bound, _untagged)
        store.provide(keys, values, state.sizes.groups)
        store.counts.copy_(tensors["counts"])
        store.prompt_length.copy_(tensors["prompt_length"])
        store.protect_prefix(store.prompt_length)
        unseen = scores[:, :, :0]
        store.keep(Tokens(keys, values, positions, unseen, scores.unsqueeze(3)))
        return LayerState.of(store)


def _untagged(keys: Tensor) -> None:
    """Keys of a store that no layer has."""


def _checked_policy(cache: Any) -> ReadsTwice:
    """The policy of an empty cache that is filled by a second pass."""
    if not isinstance(cache, CompressedCache):
        raise TypeError(
            f"cache must be a CompressedCache, got {type(cache).__name__}. Pass e.g. "
            "CompressedCache('kvzip', budget=512)."
        )
    policy = find(cache.policy, ReadsTwice)
    if policy is None:
        raise ValueError(
            f"compress is for a policy that reads a prompt twice, such as 'kvzip', got "
            f"{cache.policy.label!r}. Give the cache to generate as it is."
        )
    if cache.get_seq_length():
        raise ValueError(
            f"cache must be empty, got one that has read {cache.get_seq_length()} tokens. Use a "
            "new one or reset it."
        )
    return policy


def _check_input(ids: Any, mask: Any, tokenizer: Any, suffix: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` for what is not of a batch of contexts."""
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"input_ids must be a tensor [B, L], got {type(ids).__name__}. Pass what the tokenizer "
            "returns with return_tensors='pt'."
        )
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(
            "input_ids must be [B, L], of at least one row and one token, got "
            f"{list(ids.shape)}. Pass one text as [1, L]."
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64, got {ids.dtype}. Pass the ids of tokens.")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor [B, L], got {type(mask).__name__}")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must be [B, L] like input_ids, {list(ids.shape)}, got "
            f"{list(mask.shape)}. Pass the mask of the tokenizer."
        )
    # A text can be encoded too, into bytes.
    if isinstance(tokenizer, str) or not callable(getattr(tokenizer, "encode", None)):
        raise TypeError(
            "tokenizer must be that of the model, which makes tokens of the instructions, got "
            f"{type(tokenizer).__name__}"
        )
    if not isinstance(suffix, str):
        raise TypeError(f"suffix must be a text, got {suffix!r} ({type(suffix).__name__})")


def _check_length(
    model: Any, lengths: Sequence[int], repetitions: Sequence[Sequence[Repetition]]
) -> None:
    """Raises ``ValueError`` where a context and its repetition are longer than the model sees."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(
        (length + len(part.tokens), length)
        for length, parts in zip(lengths, repetitions, strict=True)
        for part in parts or [Repetition(0, 0, [])]
    )
    if limit is not None and longest[0] > limit:
        raise ValueError(
            f"a context and its repetition must fit into the {limit} tokens the model can see, got "
            f"{longest[1]} + {longest[0] - longest[1]}. Lower repeat_chunk, or shorten the context."
        )
