"""``pipeline("kv-press-text-generation")``: one context, held once, and questions about it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.pipelines.base import Pipeline

from compressed_cache.integrations.prompt import Prompt, make_prompt, pair, positive
from compressed_cache.integrations.request import Request, by_budget, make_request, renamed
from compressed_cache.policies.capabilities import ReadsTwice, SharesBudget, find
from compressed_cache.wording import shown

if TYPE_CHECKING:
    from compressed_cache.telemetry.timing import Timing

TASK = "kv-press-text-generation"
_PROMPT = ("answer_prefix", "max_context_length", "enable_thinking")


def register(registry: Any) -> None:
    """Makes the task known to transformers' registry of pipelines."""
    registry.register_pipeline(
        TASK, pipeline_class=CompressedTextGenerationPipeline, pt_model=AutoModelForCausalLM
    )


class CompressedTextGenerationPipeline(Pipeline):
    """Answers questions about contexts that are read once and held in a fixed budget::

        pipe = pipeline("kv-press-text-generation", model="Qwen/Qwen3-4B")
        pipe(context, question="Who built it?", policy="snapkv", budget=512)["answer"]

    Whatever :meth:`__call__` takes by keyword may also be given to ``pipeline``, for all calls.
    """

    # Any: transformers says they may be None, or tensors, which those of this task are not.
    tokenizer: Any
    model: Any
    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        context: str | Iterable[str],
        *,
        question: str | None = None,
        questions: Sequence[str] | Sequence[Sequence[str]] | None = None,
        batch_size: int | None = None,
        **arguments: Any,
    ) -> Any:
        """Answers, and what they cost.

        Args:
            context: a text, or several.
            question: what to ask about each; by default its continuation. Where nothing stands
                between the two, the last token of the context is read as the question.
            questions: several, each asked as if it were the only one; or a list of them for each
                context.
            batch_size: contexts read at a time, 1 by default.
            arguments: ``policy`` (or ``press``, as in kvpress), a name or a policy object, with
                ``budget`` and whatever else :class:`~compressed_cache.CompressedCache` takes; or
                ``cache``, an empty one; or neither for a full cache. ``compression_ratio`` may
                stand in place of ``budget``: the share of the context's tokens that goes. The
                budget is ``int(tokens * (1 - compression_ratio))``, as in kvpress, but holds for
                question and answer too. Each context has a budget of its own, so only those with
                the same one are read together. ``answer_prefix``, a text that each answer
                begins with. ``max_context_length``, tokens of a context that are read.
                ``enable_thinking``, passed on to the chat template, False by default. All else
                goes to ``model.generate``: greedy decoding of 50 tokens unless told otherwise.
                ``prefill_chunk_size`` holds for contexts too. With ``lossless=True`` the cache
                drafts (``num_draft_tokens`` at a time) and a full cache verifies: the answers are
                those of a full cache, and each question is read with its context anew.

        Returns:
            For a text a dictionary with ``answer``, or ``answers`` where ``questions`` are given,
            without the prefix, and ``timing``, a :class:`~compressed_cache.telemetry.timing.Timing`
            of all that was done for its batch. For several texts a list of these. A cache that was
            given holds the last contexts afterwards, with ``lossless`` the last texts.

        Raises:
            ValueError: an empty context, more tokens than the model can see, both ``question`` and
                ``questions``, an unknown policy, a budget too small for what is protected, or both
                ``budget`` and ``compression_ratio``.
            TypeError: an unknown argument, or a value of the wrong type.
            NotImplementedError: a model that cannot be served, or several answers per question.
        """
        if isinstance(context, Mapping) or not isinstance(context, Iterable):
            raise TypeError(f"context must be a text, or a list of texts, got {shown(context)}")
        contexts = [context] if isinstance(context, str) else list(context)
        size = self._batch_size if batch_size is None else batch_size
        size = 1 if size is None else positive("batch_size", size)
        arguments = {**renamed(self._forward_params), **renamed(arguments)}
        prompting = {name: arguments.pop(name) for name in _PROMPT if name in arguments}
        asked = pair(contexts, question, questions)
        # All before the first is read, so that nothing is lost to an error in the last.
        prompts = [self.preprocess(each, **prompting) for each in asked]
        lengths = [len(prompt.context) for prompt in prompts]
        groups = [
            (make_request(self.model, each), rows) for each, rows in by_budget(arguments, lengths)
        ]
        for request, rows in groups:
            _check_budget(request, [prompts[row] for row in rows])
        results: list[Any] = [None] * len(prompts)
        while groups:
            # One budget's memory is given back before the next one's is taken.
            request, rows = groups.pop(0)
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                output: Any = self.forward([prompts[row] for row in batch], request=request)
                answers = self.postprocess(output, is_single=questions is None)
                for row, answer in zip(batch, answers, strict=True):
                    results[row] = answer
        return results[0] if isinstance(context, str) else results

    def _sanitize_parameters(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, **arguments: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        # Sorted when the call has added its own.
        return {}, arguments, {}

    def preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_: tuple[str, list[str]], **prompting: Any
    ) -> Prompt:
        """The tokens of a context and its questions."""
        length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return make_prompt(self.tokenizer, *input_, **prompting, model_length=length)

    def _forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, prompts: list[Prompt], *, request: Request
    ) -> tuple[list[list[str]], "Timing"]:
        from compressed_cache.telemetry.measure import measure
        from compressed_cache.telemetry.timing import total

        if request.lossless:
            return self._draft(prompts, request)
        cache = request.cache
        cache.reset()
        contexts, context_mask = self._padded([prompt.context for prompt in prompts])
        runs = [self._read(contexts, context_mask, request, prompts[0].suffix)]
        rounds = _rounds(prompts, by_length=cache.is_recurrent)
        # A copy of all that is held, so only where it is needed.
        snapshot = cache.snapshot() if len(rounds) > 1 or request.is_lent else None
        answers: list[list[str]] = [[] for _ in prompts]
        for number, rows in rounds:
            if len(rows) < len(prompts):
                cache.batch_select_indices(torch.tensor(rows, device=contexts.device))
            asked = [prompts[row].questions[number] for row in rows]
            # A single token would count as a decode step, and in a longer batch as a prompt.
            questions, mask = self._padded(asked, least=1 if cache.is_recurrent else 2)
            text = torch.cat([contexts[rows], questions], dim=1)
            mask = torch.cat([context_mask[rows], mask], dim=1)
            with measure(self.model) as measured:
                output = self._generate(text, mask, request)
            runs.append(replace(measured.timing, tokens_in=questions.numel()))
            for row, answer in zip(rows, self._decoded(output, text), strict=True):
                answers[row].append(answer)
            if snapshot is not None:
                cache.restore(snapshot)
        return answers, total(runs)

    def _draft(self, prompts: list[Prompt], request: Request) -> tuple[list[list[str]], "Timing"]:
        """As ``_forward``, with nothing lost: a text that is not read as a whole has no full cache
        to be verified with."""
        from compressed_cache.hf.lossless import lossless
        from compressed_cache.telemetry.measure import measure

        answers: list[list[str]] = [[] for _ in prompts]
        with measure(self.model) as measured:
            for number, rows in _rounds(prompts, by_length=False):
                request.cache.reset()
                asked = [prompts[row].context + prompts[row].questions[number] for row in rows]
                text, mask = self._padded(asked)
                output = self._generate(text, mask, request, custom_generate=lossless)
                for row, answer in zip(rows, self._decoded(output, text), strict=True):
                    answers[row].append(answer)
        return answers, measured.timing

    def _decoded(self, output: Tensor, text: Tensor) -> list[str]:
        """What comes after a text."""
        return self.tokenizer.batch_decode(output[:, text.shape[1] :], skip_special_tokens=True)

    def postprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, output: tuple[list[list[str]], "Timing"], *, is_single: bool
    ) -> list[dict[str, Any]]:
        """What a user gets of each context."""
        answers, timing = output
        return [
            {**({"answer": each[0]} if is_single else {"answers": each}), "timing": timing}
            for each in answers
        ]

    def _read(self, contexts: Tensor, mask: Tensor, request: Request, suffix: str) -> "Timing":
        """Fills the cache."""
        from compressed_cache.second_pass import compress, read
        from compressed_cache.telemetry import peaks
        from compressed_cache.telemetry.timestamps import Timestamp, seconds_between
        from compressed_cache.telemetry.timing import finished

        chunk = request.generate.get("prefill_chunk_size")
        if chunk is None:
            config = request.generate.get("generation_config")
            chunk = getattr(config, "prefill_chunk_size", None)
        peaks.restart()
        began = Timestamp()
        if find(request.cache.policy, ReadsTwice):
            compress(
                *(self.model, contexts, request.cache),
                tokenizer=self.tokenizer,
                attention_mask=mask,
                suffix=suffix,
                prefill_chunk_size=chunk,
            )
        else:
            read(self.model, contexts, mask, request.cache, chunk=chunk)
        (seconds,) = seconds_between([began, Timestamp()], self.model.device)
        return finished(
            request.cache,
            device=self.model.device,
            rows=len(contexts),
            prefill_s=seconds,
            step_s=(),
            tokens_in=contexts.numel(),
            tokens_out=0,
            evicted_tokens=request.cache.evicted_tokens,
        )

    def _generate(self, text: Tensor, mask: Tensor, request: Request, **more: Any) -> Any:
        from compressed_cache.versions import cache_argument

        # The tokenizer is asked for stop_strings.
        more = {"tokenizer": self.tokenizer} | request.generate | more
        if more.get("generation_config") is None and self.tokenizer.pad_token_id is not None:
            more.setdefault("pad_token_id", self.tokenizer.pad_token_id)
        return self.model.generate(
            input_ids=text, attention_mask=mask, **cache_argument(request.cache), **more
        )

    def _padded(self, rows: list[list[int]], *, least: int = 1) -> tuple[Tensor, Tensor]:
        """Token ids and mask ``[B, L]`` int64, padded on the left to ``least`` or more."""
        from compressed_cache.ops.masks import left_padded

        ids, mask = left_padded(rows, pad=self.tokenizer.pad_token_id or 0, least=least)
        return ids.to(self.model.device), mask.to(self.model.device)


def _rounds(prompts: list[Prompt], *, by_length: bool) -> list[tuple[int, list[int]]]:
    """The number of a question, and the rows that are asked theirs together.

    Args:
        prompts: of the batch.
        by_length: whether questions that are asked together must be equally long.
    """
    from compressed_cache.second_pass import alike

    found: list[tuple[int, list[int]]] = []
    for number in range(max(len(prompt.questions) for prompt in prompts)):
        rows = [row for row, each in enumerate(prompts) if number < len(each.questions)]
        groups = [[*range(len(rows))]]
        if by_length:
            groups = alike([prompts[row].questions[number] for row in rows])
        found += [(number, [rows[index] for index in group]) for group in groups]
    return found


def _check_budget(request: Request, prompts: list[Prompt]) -> None:
    """Refuses what a later batch would be refused for."""
    from compressed_cache.hf.checks import check_prompt

    eviction = request.cache.eviction
    if (
        prompts
        and isinstance(eviction.budget, int)
        and not find(request.cache.policy, SharesBudget)
    ):
        policy = request.cache.policy
        # A question after a second pass is not of the prompt.
        asked = not find(policy, ReadsTwice)
        lengths = [
            len(prompt.context) + asked * max(map(len, prompt.questions)) for prompt in prompts
        ]
        check_prompt(torch.tensor(lengths), policy, eviction, eviction.budget)
