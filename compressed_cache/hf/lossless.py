"""A loop for ``generate`` in which a compressed cache drafts and the full cache verifies."""

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig
from transformers.generation.logits_process import (
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from compressed_cache.hf import attention_hook as hook
from compressed_cache.hf import checks
from compressed_cache.hf.decode_loop import MODES, longest_text, prepares_plainly
from compressed_cache.hf.draft_length import DraftLength, DraftStatistics
from compressed_cache.hf.drafter import Drafter
from compressed_cache.hf.full_cache import CopyPrompt, FullCache
from compressed_cache.hf.row_texts import RowTexts
from compressed_cache.hf.verifier import Verifier
from compressed_cache.ops.acceptance import accept_greedy, accept_sampled
from compressed_cache.policies.fields import whole_number
from compressed_cache.stores.refresh import can_refresh
from compressed_cache.versions import CACHE
from compressed_cache.wording import listing, shown

_STATEFUL = (
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
)
_GRAPHS = 64
"""Of each function that is compiled, for all models, policies, batch sizes and sizes of memory in a
process; torch allows 8."""
_READ = {"attention_mask", "position_ids", "cache_position", "inputs_embeds"}
_BY_LENGTH = ("dynamic", "longrope")

hook.install()


@hook.takes_all_arguments
def lossless(
    model: Any,
    input_ids: Tensor,
    *,
    num_draft_tokens: int = 4,
    adaptive: bool | None = None,
    refresh: int | None = None,
    statistics: DraftStatistics | None = None,
    **arguments: Any,
) -> Tensor:
    """The text of the full cache, written with the help of a compressed one::

        cache = CompressedCache("snapkv", budget=256)
        model.generate(**inputs, cache=cache, custom_generate=lossless, num_draft_tokens=4)

    The compressed cache drafts some tokens, the same model verifies them in one call with all keys
    and values, and those that it would have written itself stay, in each row as many as there are.
    Greedy tokens are those of plain ``generate`` with all keys and values, but where two logits are
    equal up to rounding; sampled ones have its distribution (speculative sampling). Memory is that
    of the full cache and of the budget together, and layers with a sliding window keep all, too.

    Batches with padding on the left, processors, stopping criteria, streamers and several sequences
    work as in plain ``generate``, but for processors that keep state, and in a batch for criteria
    that do, other than in a ``done_tracker`` of its rows, as those of lm_eval. A cache that holds
    an earlier text of the conversation is given the whole text, which the full cache then reads
    anew. Where ``generate`` compiles, all of it is compiled.

    Args:
        model: the model.
        input_ids: ``[B, L]`` int64 the prompt.
        num_draft_tokens: how many tokens are drafted, at most.
        adaptive: whether their number is chosen by the seconds that drafts and verification take
            and by how many are accepted, down to none at all. None: for greedy decoding only,
            because what is drawn after a seed would depend on the time taken.
        refresh: after so many tokens of the text, again and again, the compressed cache holds the
            best of all tokens, also of those that it had evicted. For policies that rank by keys,
            values and the last queries. None: never.
        statistics: what drafting brings is added to it.
        arguments: what ``generate`` passes to its own loops.

    Returns:
        ``[B, L + T]`` int64, the prompt and the text.

    Raises:
        TypeError: a number of tokens that is no int.
        ValueError: ``num_draft_tokens`` or ``refresh`` below 1, no compressed cache, or not the
            whole text.
        NotImplementedError: beams or another mode, ``refresh`` with a policy that ranks by what is
            not known of evicted tokens, ``return_dict_in_generate``, a model that prepares its
            inputs in its own way or has linear-attention layers, or a cache with telemetry.
    """
    num_draft_tokens = _to_count("num_draft_tokens", num_draft_tokens)
    refresh = None if refresh is None else _to_count("refresh", refresh)
    if not isinstance(adaptive, bool | None):
        raise TypeError(f"adaptive must be True, False or None, got {shown(adaptive)}")
    if statistics is None:
        statistics = DraftStatistics()
    elif not isinstance(statistics, DraftStatistics):
        raise TypeError(f"statistics must be DraftStatistics(), got {shown(statistics)}")
    _check(model, arguments)
    if refresh is not None and not can_refresh(arguments[CACHE].policy):
        raise NotImplementedError(
            f"{arguments[CACHE].policy.label!r} ranks by more than keys, values and the last "
            "queries, which is not known of an evicted token. Choose another policy, such as "
            "'snapkv', or leave out refresh."
        )
    loop = _Loop(model, input_ids, num_draft_tokens, statistics, refresh, **arguments)
    _check_rope(model, loop.longest)
    # More than the text has room for would never be drafted.
    most = int(min(num_draft_tokens, max(loop.texts.room() - 2, 1)))
    adapts = not loop.samples if adaptive is None else adaptive
    return loop.run(DraftLength(most, adapts=adapts))


def _to_count(name: str, value: Any) -> int:
    number = whole_number(value)
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def _check(model: Any, arguments: dict[str, Any]) -> None:
    """Raises before any work is done."""
    cache: Any = arguments.get(CACHE)
    config = arguments["generation_config"]
    if not hook.is_compressed(cache) or not arguments.get("use_cache"):
        raise ValueError(
            "lossless drafts with a CompressedCache. Pass it as cache= and leave use_cache on."
        )
    mode = config.get_generation_mode(arguments.get("assistant_model"))
    if mode not in MODES:
        raise NotImplementedError(
            f"lossless is for greedy decoding and sampling, got {mode.value}. Leave out one of "
            "the two."
        )
    for name, asked in (
        ("return_dict_in_generate", config.return_dict_in_generate),
        ("synced_gpus", arguments.get("synced_gpus")),
    ):
        if asked:
            raise NotImplementedError(f"lossless cannot serve {name}. Leave it out.")
    if not prepares_plainly(model) or arguments.get("position_ids") is None:
        raise NotImplementedError(
            f"{type(model).__name__} prepares its inputs in a way of its own, which lossless does "
            "not know. Generate without it."
        )
    if not cache.get_seq_length():
        checks.check_drafts(cache.policy)
    _check_layers(model, cache)
    for processor in arguments["logits_processor"]:
        if isinstance(processor, _STATEFUL):
            raise NotImplementedError(
                f"lossless cannot serve {type(processor).__name__}, which remembers each token it "
                "was asked for. Leave out what asks for it, or lossless."
            )
    tensors = {name for name, given in arguments.items() if isinstance(given, Tensor)}
    if unknown := tensors - _READ:
        raise NotImplementedError(
            f"lossless cannot give {listing(unknown)} to the model with every token. Leave it out, "
            "or lossless."
        )
    # Drafts would be among what is told of.
    cache.notify("activate_past_recording")
    if cache.readers:
        raise NotImplementedError(
            "lossless drafts tokens that are taken back, which nobody can be told of. Stop what "
            "observes the cache, or assisted decoding with it."
        )


def _check_rope(model: Any, longest: float) -> None:
    config = model.config.get_text_config()
    given = getattr(config, "rope_parameters", None) or {}
    # Some models have several, by the kind of layer.
    for one in [given, *(part for part in given.values() if isinstance(part, dict))]:
        kind, original = one.get("rope_type"), one.get("original_max_position_embeddings")
        limit = original if kind == "longrope" else config.max_position_embeddings
        if kind in _BY_LENGTH and limit is not None and longest > limit:
            raise NotImplementedError(
                f"lossless cannot serve a text of up to {longest} tokens with rope_type {kind!r}, "
                f"whose angles depend on the length beyond {limit}. Generate fewer tokens, or "
                "without it."
            )


def _check_layers(model: Any, cache: Any) -> None:
    if cache.is_recurrent or checks.has_linear_layers(model.config):
        raise NotImplementedError(
            "lossless cannot take tokens back from linear-attention layers. Generate without it."
        )


def _is_windowed(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) != {"full_attention"}
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return any(window is not None for window in windows)


class _Loop:
    """One call of ``generate``."""

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        drafts: int,
        statistics: DraftStatistics,
        refresh: int | None,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        synced_gpus: bool = False,
        **kwargs: Any,
    ) -> None:
        self.model, self.config, self.kwargs = model, generation_config, kwargs
        self.cache = kwargs[CACHE]
        self.statistics, self.refresh = statistics, refresh
        self.samples: bool = generation_config.do_sample
        self.texts = RowTexts(
            ids,
            logits_processor,
            stopping_criteria,
            pad_token=generation_config._pad_token_tensor,
            longest=longest_text(stopping_criteria),
            streamer=streamer,
        )
        self.prompt = self.refreshed = ids.shape[1]
        embeddings = kwargs.get("inputs_embeds")
        # Where embeddings are given, ids need not be of the prompt.
        self.read = self.prompt if embeddings is None else embeddings.shape[1]
        self.longest = self.read + self.texts.longest - self.prompt
        self.full = FullCache(
            self.longest + drafts,
            needs_hidden_states=self.cache.needs_hidden_states,
            is_windowed=_is_windowed(model.config.get_text_config()),
        )

    def run(self, length: DraftLength) -> Tensor:
        """The texts."""
        model, texts = self.model, self.texts
        self.statistics.plain_from = None
        forward, compile_, graphs = model.__call__, None, contextlib.nullcontext()
        if model._valid_auto_compile_criteria(self.kwargs, self.config):
            config = self.config.compile_config or CompileConfig()
            forward = model.get_compiled_call(config)
            compile_ = functools.partial(torch.compile, **config.to_dict())
            graphs = torch._dynamo.config.patch(recompile_limit=_GRAPHS)
        outputs = self._read_prompt()
        _check_layers(model, self.cache)
        kwargs = model._update_model_kwargs_for_generation(outputs, self.kwargs)
        # It is told of the cache that the outputs are from.
        kwargs[CACHE] = self.cache
        tokens, _ = self._choose(texts.process(outputs.logits[:, -1:]))
        del outputs
        texts.extend([0] * len(tokens), tokens)
        drafts = not self._holds_all()
        if not drafts:
            length = DraftLength(0, adapts=False)
            warnings.warn(
                "nothing is drafted, because the compressed cache would hold the whole text: take "
                "a smaller budget, or policy='full' without lossless.",
                stacklevel=2,
            )
        ids = texts.ids[:, : self.prompt + 1]
        drafter = Drafter(model, self.cache, forward, compile_, ids, kwargs)
        self.verifier = Verifier(model, self.full, compile_, length.longest)
        with graphs, model._optimize_model_for_decode(), drafter.writing():
            while any(texts.growing):
                self._round(drafter, length)
            if drafts and any(drafter.wanted(texts.closing)):
                # As after :func:`decode`, a row has read the token that ended it.
                began = self._now()
                self.verifier.read(texts.last(), self._positions(drafter, 1))
                self._keep(drafter, list(map(int, texts.closing)), 1)
                self.statistics.verifying_s += self._now() - began
        self.statistics.full_bytes = self.full.nbytes
        return texts.finished()

    def _read_prompt(self) -> Any:
        """Both caches read the prompt, in one pass where the compressed one reads it in full."""
        model, config, ids = self.model, self.config, self.texts.ids
        if self.cache.get_seq_length() == 0 and config.prefill_chunk_size is None:
            copy = CopyPrompt(self.full)
            self.cache.add_observer(copy)
            try:
                outputs = model._prefill(ids, config, self.kwargs)
            finally:
                self.cache.remove_observer(copy)
            self.full.holds(copy.real)
            return outputs
        width = hook.mask_width(config, self.kwargs)
        if self.read != width:
            raise ValueError(
                f"lossless needs the whole text, got {self.read} tokens and a mask of {width}. "
                "Pass the earlier ones too, or a new CompressedCache."
            )
        checks.check_text(self.cache.get_seq_length(), self.read)
        if (filled := self.cache.first_filled()) is not None:
            checks.check_batch(filled.store.sizes.batch, len(ids))
        outputs = model._prefill(ids, config, {**self.kwargs, CACHE: self.full})
        self.full.reads()
        model._prefill(ids, config, self.kwargs)
        mask = self.kwargs.get("attention_mask")
        real = torch.ones(len(ids), self.read, device=ids.device) if mask is None else mask
        self.full.holds(real.bool())
        return outputs

    def _holds_all(self) -> bool:
        layer = self.cache.compressed_layer
        return not self.cache.policy.evicts or layer.store.slots_per_head >= self.longest

    def _round(self, drafter: Drafter, length: DraftLength) -> None:
        """Some drafts, and the model's word on them."""
        texts, statistics = self.texts, self.statistics
        began = self._now()
        # Drafts that no row could take would be for nothing.
        count = int(min(length.choose(), texts.room() - 1))
        width = self.verifier.width(count + 1)
        tokens, positions = texts.last(), self._positions(drafter, width)
        proposed, chances = [tokens], []
        if count:
            drafter.begin()
        for step in range(count):
            logits = drafter.step(proposed[-1], positions[..., step : step + 1])
            draft, chance = self._choose(texts.process(logits, offset=step))
            texts.propose(draft, step)
            proposed.append(draft)
            chances.append(chance)
        drafted = self._now()
        read = torch.cat(proposed, dim=1)
        scores = texts.process(self.verifier.read(read, positions))
        if not count:
            tokens, _ = self._choose(scores)
            accepted = [0] * len(tokens)
        else:
            if self.samples:
                found = accept_sampled(read[:, 1:], torch.cat(chances, dim=1), scores.softmax(-1))
            else:
                found = accept_greedy(read[:, 1:], scores)
            accepted, tokens = found[0].tolist(), found[1]
        verified = self._now()
        growing, closing = texts.growing, texts.closing
        taken = texts.extend(accepted, tokens)
        kept = [new + ends for new, ends in zip(taken, closing, strict=True)]
        if length.has_given_up and statistics.plain_from is None:
            statistics.plain_from = max(texts.lengths) - self.prompt
            drafter.level()
        self._keep(drafter if length.longest else None, kept, width)
        grown = [one for one, grows in zip(accepted, growing, strict=True) if grows]
        drafting_s, verifying_s = drafted - began + self._now() - verified, verified - drafted
        length.add(count, grown, drafting_s, verifying_s)
        statistics.tokens += sum(taken)
        statistics.row_verifications += len(grown)
        statistics.drafted += count * len(grown)
        # Some may be after the end of the text.
        statistics.accepted += sum(map(min, accepted, taken))
        statistics.drafting_s += drafting_s
        statistics.verifying_s += verifying_s

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """A token ``[B, 1]`` by scores ``[B, 1, V]``, and what it was drawn from."""
        if not self.samples:
            return scores.argmax(dim=-1), scores
        chances = scores.softmax(dim=-1)
        return torch.multinomial(chances[:, 0], num_samples=1), chances

    def _keep(self, drafter: Drafter | None, kept: Sequence[int], tokens: int) -> None:
        """Of the tokens just verified keeps the first of each row, in both caches."""
        self.full.keep(kept, tokens)
        inputs = self.full.reads()
        if drafter is None or not any(wanted := drafter.wanted(kept)):
            return
        drafter.read(inputs, wanted)
        longest = max(self.texts.lengths)
        if drafter.drafts and self.refresh is not None and longest - self.refreshed >= self.refresh:
            self.refreshed = longest
            self.full.close_holes()
            drafter.refresh(self.full)

    def _positions(self, drafter: Drafter, tokens: int) -> Tensor:
        """``[..., B, tokens]`` int64, of the last token of each row and what is drafted."""
        first = drafter.first_position
        device = first.device
        read = torch.tensor(self.texts.lengths, device=device)[:, None] - self.prompt - 1
        positions = first + read + torch.arange(tokens, device=device)
        if math.isinf(self.texts.longest):
            return positions
        # A model may have no position after the longest text.
        return torch.minimum(positions, first + int(self.texts.longest) - self.prompt - 1)

    def _now(self) -> float:
        device = self.texts.ids.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
