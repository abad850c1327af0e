"""KVzip: a context that is read twice, against a reference in float64, and its questions."""

import random
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, pipeline

import compressed_cache.integrations  # noqa: F401
from compressed_cache import CompressedCache, compress
from compressed_cache.integrations.pipeline import TASK
from compressed_cache.policies import make_policy
from compressed_cache.reasoner.problems import VOCABULARY
from compressed_cache.reasoner.tokenizer import build_tokenizer
from tests.families import FAMILIES, FULL, LINEAR, Family
from tests.reference.comparison import distinct_tokens, make_model
from tests.reference.kvzip import kept_afterwards, repeated, score_context
from tests.reference.llama import Kept, ReferenceLlama
from tests.reference.policies import Rules

FIRST, LATER, SUFFIX = [7, 3, 9], [2, 11], [5, 4]
OPTIONS = dict(repeat_prompt="first", repeat_from_prompt="later")
LENGTHS = (40, 23, 31)
CONTEXTS = [distinct_tokens(length, seed=length) for length in LENGTHS]


MIXED = [one for one in FAMILIES if one.kinds == (LINEAR, FULL)]


class Words:
    """A tokenizer of three texts."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return {"first": FIRST, "later": LATER, "suffix": SUFFIX}[text]


def padded(contexts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, contexts))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in contexts])
    return ids, torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in contexts])


def compressed(
    model: LlamaForCausalLM, cache: CompressedCache, contexts: list[list[int]], **more: Any
) -> CompressedCache:
    ids, mask = padded(contexts)
    compress(
        model, ids, cache, tokenizer=Words(), attention_mask=mask, **{"suffix": "suffix", **more}
    )
    return cache


def expected_scores(
    reference: ReferenceLlama, context: list[int], *, sinks: int, chunk: int, overlap: int
) -> Any:
    parts = repeated(
        context, sinks=sinks, chunk=chunk, overlap=overlap, first=FIRST, later=LATER, suffix=SUFFIX
    )
    return score_context(reference, context, parts, sinks=sinks)


def kept(cache: CompressedCache, row: int) -> Kept:
    return [
        [tuple(sorted(p for p in head if p >= 0)) for head in layer.held().positions[row].tolist()]
        for layer in cache.layers
    ]


# One chunk, a last one of a single token, ends at the end of a context, an overlap beyond a chunk.
@pytest.mark.parametrize(
    ("sinks", "chunk", "overlap"),
    [(0, 2000, 8), (4, 9, 3), (1, 13, 0), (3, 4, 8), (2, 38, 8)],
)
def test_scores_are_those_of_the_reference(
    precise_model: LlamaForCausalLM,
    reference: ReferenceLlama,
    sinks: int,
    chunk: int,
    overlap: int,
) -> None:
    """With a budget for everything, in a batch with padding."""
    options = OPTIONS | dict(repeat_chunk=chunk, repeat_overlap=overlap)
    cache = CompressedCache("kvzip", 64, sinks=sinks, **options)
    compressed(precise_model, cache, CONTEXTS)
    for row, context in enumerate(CONTEXTS):
        expected = expected_scores(reference, context, sinks=sinks, chunk=chunk, overlap=overlap)
        for layer, heads in zip(cache.layers, expected, strict=True):
            held = layer.held()
            order = held.positions[row].argsort(dim=-1)[:, -len(context) :]
            found = held.notes[row, :, :, 0].gather(1, order)
            np.testing.assert_allclose(found.numpy(), np.array(heads), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("budget", "floor", "interval"),
    [
        (15, None, 1),
        (15, None, 3),
        (15, 0.0, 1),
        (15, 0.2, 3),
        (((24, 8), (9, 20)), None, 1),
        (((24, 8), (9, 20)), None, 3),
    ],
)
def test_kept_tokens_are_those_of_the_reference(
    precise_model: LlamaForCausalLM,
    reference: ReferenceLlama,
    budget: Any,
    floor: float | None,
    interval: int,
) -> None:
    """After the cut and after each of thirty tokens, more than half the budget."""
    rules = Rules(budget, interval, sinks=2)
    name, more = ("kvzip", {}) if floor is None else ("kvzip+adakv", {"floor": floor})
    options = OPTIONS | dict(repeat_chunk=9, repeat_overlap=3, **more)
    cache = CompressedCache(name, **asdict(rules), **options)
    compressed(precise_model, cache, CONTEXTS[:2])
    later = [distinct_tokens(30, seed=70 + row) for row in range(2)]
    found = [[kept(cache, row)] for row in range(2)]
    with torch.no_grad():
        for step in torch.tensor(later).T:
            precise_model(step[:, None], past_key_values=cache)
            for row in range(2):
                found[row].append(kept(cache, row))
    for row, context in enumerate(CONTEXTS[:2]):
        scores = expected_scores(reference, context, sinks=2, chunk=9, overlap=3)
        wanted = kept_afterwards(reference, context, scores, later[row], rules, floor=floor)
        assert found[row] == wanted
        assert len({heads[0] for heads in wanted[0]} | {heads[1] for heads in wanted[0]}) > 1


@pytest.mark.parametrize("name", ["kvzip", "kvzip+adakv"])
def test_a_row_of_a_batch_goes_on_as_alone(name: str) -> None:
    model, question = make_model(), distinct_tokens(5, seed=90)
    options = OPTIONS | dict(repeat_chunk=9)

    def texts(contexts: list[list[int]]) -> list[list[int]]:
        cache = compressed(model, CompressedCache(name, 16, **options), contexts)
        ids, mask = padded([[*one, *question] for one in contexts])
        text = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=20, do_sample=False
        )
        return text[:, -20:].tolist()

    alone = [texts([one])[0] for one in CONTEXTS]
    assert texts(CONTEXTS) == alone
    assert len({tuple(text) for text in alone}) == 3


@pytest.mark.parametrize("family", MIXED, ids=lambda family: family.name)
def test_recurrent_layers_read_no_padding_between_a_context_and_what_is_repeated(
    family: Family,
) -> None:
    model = family.make()
    contexts = [[token % 150 + 1 for token in context] for context in CONTEXTS]

    def scores(rows: list[list[int]], **more: Any) -> Any:
        cache = CompressedCache("kvzip", 64, sinks=2, **OPTIONS | dict(repeat_chunk=15))
        held = compressed(model, cache, rows, **more).layers[1].held()
        assert not cache.layers[0].conv_states[0].isnan().any()
        order = held.positions.argsort(dim=-1)
        noted = held.notes[..., 0].gather(2, order)
        return [noted[row, :, -len(one) :].numpy() for row, one in enumerate(rows)]

    alone = [scores([one])[0] for one in contexts]
    # That of Jamba begins anew in each call of several tokens, with any cache.
    chunks = () if family.name == "Jamba" else (1, 13)
    for more in ({}, *(dict(prefill_chunk_size=chunk) for chunk in chunks)):
        for found, expected in zip(scores(contexts, **more), alone, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 13, 39, 40])
def test_a_last_chunk_of_one_token_is_of_the_context(chunk: int) -> None:
    model, options = make_model(), OPTIONS | dict(repeat_chunk=9)
    whole = compressed(model, CompressedCache("kvzip", 16, **options), CONTEXTS)
    parts = CompressedCache("kvzip", 16, **options)
    compressed(model, parts, CONTEXTS, prefill_chunk_size=chunk)
    for row in range(len(CONTEXTS)):
        assert kept(whole, row) == kept(parts, row)


@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen3-VL"])
def test_images_of_an_earlier_text_move_nothing(name: str) -> None:
    model = next(family for family in FAMILIES if family.name == name).make()
    context, question = [token % 150 + 1 for token in CONTEXTS[0]], [5, 6, 7]

    def answer() -> Any:
        cache = compressed(model, CompressedCache("kvzip", 16, **OPTIONS), [context])
        ids = torch.tensor([context + question])
        return model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)

    fresh = answer()
    # As after an image of another text, and then after two of them.
    for moved in ([[-13]], [[-13], [-5]]):
        model.model.rope_deltas = torch.tensor(moved)
        assert torch.equal(answer(), fresh)


def test_a_compiled_model_is_the_model_in_it() -> None:
    model, context = make_model(), CONTEXTS[:1]
    expected = compressed(model, CompressedCache("kvzip", 16, **OPTIONS), context)
    whole: Any = torch.compile(model, backend="eager")
    found = compressed(whole, CompressedCache("kvzip", 16, **OPTIONS), context)
    assert kept(found, 0) == kept(expected, 0)


def test_the_timing_counts_the_context() -> None:
    model: Any = make_model()
    cache = CompressedCache("kvzip", 16, telemetry=True, **OPTIONS)
    for _ in range(2):
        # What is repeated is not counted as tokens, and another text is counted anew.
        cache.reset()
        compressed(model, cache, CONTEXTS[:1])
        model.generate(torch.tensor([[*CONTEXTS[0], 5]]), past_key_values=cache, max_new_tokens=4)
        timing = cache.timing()
        assert (timing.tokens_in, timing.tokens_out) == (40, 4)
        assert timing.prefill_s > timing.step_s[0] > 0


def test_beams_go_on_from_a_context_that_is_repeated_for_each() -> None:
    model: Any = make_model()
    ids = torch.tensor([[*CONTEXTS[0], 5, 6]])
    beams = dict(num_beams=3, max_new_tokens=8, do_sample=False)
    cache = compressed(model, CompressedCache("kvzip", 64, **OPTIONS), CONTEXTS[:1])
    with pytest.raises(ValueError, match=r"call cache.batch_repeat_interleave\(3\) before"):
        model.generate(ids, past_key_values=cache, **beams)
    cache = compressed(model, CompressedCache("kvzip", 64, **OPTIONS), CONTEXTS[:1])
    cache.batch_repeat_interleave(3)
    found = model.generate(ids, past_key_values=cache, **beams)
    assert torch.equal(found, model.generate(ids, past_key_values=DynamicCache(), **beams))


def test_chunks_of_a_prompt_and_files_change_nothing(tmp_path: Any) -> None:
    model, options = make_model(), OPTIONS | dict(repeat_chunk=9)
    whole = compressed(model, CompressedCache("kvzip", 16, **options), CONTEXTS)
    parts = CompressedCache("kvzip", 16, **options)
    compressed(model, parts, CONTEXTS, prefill_chunk_size=7)
    whole.save(tmp_path / "context.safetensors")
    loaded = CompressedCache.load(tmp_path / "context.safetensors")
    for row in range(len(CONTEXTS)):
        assert kept(whole, row) == kept(parts, row) == kept(loaded, row)
    assert whole.nbytes == CompressedCache.load(tmp_path / "context.safetensors").nbytes
    assert whole.evicted_tokens == 40 - 16


@pytest.mark.parametrize("new", [1, 3])
def test_drafts_change_nothing_of_a_question(precise_model: LlamaForCausalLM, new: int) -> None:
    ids, results = torch.tensor([distinct_tokens(43, seed=1)])[:, : 40 + new], []
    for helper in ({}, dict(prompt_lookup_num_tokens=3)):
        cache = CompressedCache("kvzip", 16, **OPTIONS)
        compress(precise_model, ids[:, :40], cache, tokenizer=Words())
        options = dict(max_new_tokens=14, do_sample=False, **helper)
        text = precise_model.generate(ids, past_key_values=cache, **options)
        positions = [layer.held().positions.sort().values.tolist() for layer in cache.layers]
        results.append((text.tolist(), cache.get_seq_length(), positions))
    assert results[0] == results[1]


def test_only_the_model_that_read_the_context_goes_on() -> None:
    cache = compressed(make_model(), CompressedCache("kvzip", 16, **OPTIONS), CONTEXTS[:1])
    with pytest.raises(ValueError, match="model must be the one that read the prompt"):
        make_model(seed=1)(torch.tensor([[1]]), past_key_values=cache)


def text(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY[4:], k=words))


@pytest.fixture
def pipe(make_model: Any) -> Any:
    model = make_model(vocab_size=len(VOCABULARY), max_position_embeddings=300).double()
    model.generation_config.suppress_tokens = [0, 1, 2, 3]
    return pipeline(TASK, model=model, tokenizer=build_tokenizer(), device="cpu")


@pytest.mark.parametrize("policy", ["kvzip", "kvzip+adakv"])
def test_many_questions_are_asked_about_one_compressed_text(pipe: Any, policy: str) -> None:
    contexts = [text(60, 0), text(35, 1)]
    questions = [text(length, length) for length in (5, 1, 9)]
    arguments = dict(policy=policy, budget=24, repeat_chunk=25, max_new_tokens=12)
    calls: list[int] = []
    handle = pipe.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    together = pipe(contexts[0], questions=questions, **arguments)["answers"]
    handle.remove()
    # The context, three parts of it again, and then each question.
    assert calls[0] == 61
    assert sum(length > 1 for length in calls) == 1 + 3 + 3
    alone = [pipe(contexts[0], question=one, **arguments)["answer"] for one in questions]
    assert together == alone
    assert len(set(together)) == 3
    batch = pipe(contexts, questions=questions, batch_size=2, **arguments)
    assert batch[0]["answers"] == together
    assert batch[1]["answers"] == pipe(contexts[1], questions=questions, **arguments)["answers"]


def test_the_pipeline_puts_the_end_of_a_turn_before_what_is_repeated(pipe: Any) -> None:
    context, question = text(40, 0), text(5, 5)
    pipe.tokenizer.chat_template = "{{ bos_token }} tax {{ messages[0]['content'] }} solve answer"
    arguments = dict(policy="kvzip", budget=16, repeat_chunk=25)
    got = pipe(context, question=question, max_new_tokens=12, **arguments)["answer"]

    def tokens(what: str) -> torch.Tensor:
        return pipe.tokenizer(what, return_tensors="pt", add_special_tokens=False).input_ids

    cache, first = CompressedCache("kvzip", 16, repeat_chunk=25), tokens(f"<bos> tax {context}")
    compress(pipe.model, first, cache, tokenizer=pipe.tokenizer, suffix=" solve answer")
    whole = torch.cat([first, tokens(f"{question} solve answer")], dim=1)
    output = pipe.model.generate(whole, past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert got == pipe.tokenizer.decode(output[0, whole.shape[1] :])
    # Room for the context alone is enough to protect it.
    protected = dict(budget=first.shape[1] + 1, protect_prompt=True)
    assert pipe(context, question=question, max_new_tokens=2, **(arguments | protected))


def test_a_question_after_a_protected_context_is_not_protected(
    precise_model: LlamaForCausalLM,
) -> None:
    context, rest = CONTEXTS[0], distinct_tokens(40, seed=80)
    cache = CompressedCache("kvzip", len(context) + 4, protect_prompt=True, **OPTIONS)
    compressed(precise_model, cache, [context])
    with torch.no_grad():
        # More than there is room for if it were of the prompt.
        precise_model(torch.tensor([rest[:10]]), past_key_values=cache)
        for token in rest[10:]:
            precise_model(torch.tensor([[token]]), past_key_values=cache)
    newest = len(context) + len(rest) - 1
    for layer in kept(cache, 0):
        for head in layer:
            assert head[: len(context)] == tuple(range(len(context)))
            assert len(head) == len(context) + 4
            assert head[-1] == newest


@pytest.mark.parametrize(
    ("cache", "more", "message"),
    [
        (lambda: CompressedCache("h2o", 16), {}, "reads a prompt twice.* got 'h2o'"),
        (lambda: CompressedCache("kvzip", 64, protect_prompt=True, recent=30, **OPTIONS), {},
         r"budget must be at least prompt \+ recent \+ 1"),
        (lambda: CompressedCache("kvzip", 16, **OPTIONS),
         dict(attention_mask=torch.tensor([[1] * 39 + [0]])), "must pad on the left"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(
    precise_model: LlamaForCausalLM, cache: Any, more: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        arguments = {"tokenizer": Words(), "suffix": "suffix", **more}
        compress(precise_model, torch.tensor(CONTEXTS[:1]), cache(), **arguments)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (dict(input_ids=torch.ones(9, dtype=torch.int64)), ValueError, r"\[B, L\].* got \[9\]"),
        (dict(input_ids=torch.ones(1, 0)), ValueError, r"one token, got \[1, 0\]"),
        (dict(input_ids=[[1, 2]]), TypeError, "input_ids must be a tensor .* got list"),
        (dict(input_ids=torch.ones(1, 9)), TypeError, "must be int64, got torch.float32"),
        (dict(attention_mask=torch.ones(1, 39)), ValueError, r"\[1, 40\], got \[1, 39\]"),
        (dict(attention_mask=torch.ones(2, 40)), ValueError, r"\[1, 40\], got \[2, 40\]"),
        (dict(attention_mask=torch.ones(1, 1, 40, 40)), ValueError, r"got \[1, 1, 40, 40\]"),
        (dict(attention_mask=[[1] * 40]), TypeError, "attention_mask must be a tensor.* got list"),
        (dict(tokenizer=None), TypeError, "tokenizer must be that of the model.* got NoneType"),
        (dict(tokenizer="words"), TypeError, "tokenizer must be that of the model.* got str"),
        (dict(suffix=None), TypeError, "suffix must be a text, got None"),
        (dict(cache=DynamicCache()), TypeError, "must be a CompressedCache, got DynamicCache"),
        (dict(prefill_chunk_size=0), ValueError, "prefill_chunk_size must be >= 1, got 0"),
        (dict(prefill_chunk_size=-2), ValueError, "prefill_chunk_size must be >= 1, got -2"),
    ],
)
def test_arguments_of_another_kind_are_refused(more: Any, error: Any, message: str) -> None:
    given = {
        "input_ids": torch.tensor(CONTEXTS[:1]),
        "cache": CompressedCache("kvzip", 16, **OPTIONS),
        "tokenizer": Words(),
    }
    with pytest.raises(error, match=message):
        compress(make_model(), **{**given, **more})


def test_a_context_that_is_too_long_is_refused(precise_model: LlamaForCausalLM) -> None:
    ids = torch.arange(1, 131)[None]
    cache = CompressedCache("kvzip", 16, sinks=0, **OPTIONS)
    with pytest.raises(ValueError, match=r"256 tokens the model can see, got 130 \+ 135"):
        compress(precise_model, ids, cache, tokenizer=Words(), suffix="suffix")
    assert not cache.get_seq_length()


def test_a_cache_that_holds_something_is_refused(precise_model: LlamaForCausalLM) -> None:
    cache = compressed(precise_model, CompressedCache("kvzip", 16, **OPTIONS), CONTEXTS[:1])
    with pytest.raises(ValueError, match="cache must be empty, got one that has read 40 tokens"):
        compressed(precise_model, cache, CONTEXTS[:1])


def test_generate_without_the_second_pass_is_refused(precise_model: LlamaForCausalLM) -> None:
    message = r"'kvzip\+adakv' ranks a prompt by a second pass.*call compressed_cache.compress\("
    calls: list[Any] = []
    handle = precise_model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(_))
    with pytest.raises(ValueError, match=message):
        precise_model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            torch.tensor(CONTEXTS[:1]),
            past_key_values=CompressedCache("kvzip+adakv", 16),
            max_new_tokens=2,
        )
    handle.remove()
    assert not calls


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kvzip", {"repeat_chunk": 0}, "repeat_chunk must be >= 1, got 0"),
        ("kvzip", {"repeat_overlap": -1}, "repeat_overlap must be >= 0, got -1"),
        ("kvzip", {"repeat_prompt": " "}, "repeat_prompt must not be empty, got ' '"),
        ("kvzip/h2o", {}, "'kvzip/h2o' cannot be used"),
        ("h2o/kvzip", {}, "'h2o/kvzip' cannot be used"),
        ("kvzip+criticalkv", {}, "criticalkv cannot be written after 'kvzip'.*Only 'adakv' can"),
        ("kvzip+adakv+chunkkv", {}, "chunkkv cannot be written after 'kvzip\\+adakv'"),
    ],
)
def test_bad_policies_are_refused(name: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(name, **options)
