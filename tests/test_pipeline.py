"""``pipeline("kv-press-text-generation")``: contexts that are read once, and questions."""

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CompileConfig,
    GenerationConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    pipeline,
)
from transformers.generation import utils

import compressed_cache.integrations  # noqa: F401
from compressed_cache import CompressedCache, decode
from compressed_cache.integrations.pipeline import TASK
from compressed_cache.policies import MODIFIERS, POLICIES
from compressed_cache.policies.fields import own_options
from compressed_cache.policies.methods.h2o import H2O
from compressed_cache.reasoner.problems import VOCABULARY
from compressed_cache.reasoner.tokenizer import build_tokenizer
from tests.compiling import CountingBackend, compiled
from tests.families import FAMILIES, FULL, LINEAR, Family
from tests.grids import slow_but

H2O_24: dict[str, Any] = dict(policy="h2o", budget=24, max_new_tokens=12)
MIXED = [one for one in FAMILIES if one.kinds == (LINEAR, FULL)]
TEMPLATE = (
    "{{ bos_token }} tax {{ messages[0]['content'] }} solve"
    "{{ ' jam' if enable_thinking else '' }}{{ ' answer' if add_generation_prompt else '' }}"
)


def _text(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY[4:], k=words))


CONTEXT, QUESTIONS = _text(60), [_text(n, seed=n) for n in (5, 1, 30)]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., LlamaForCausalLM]) -> Any:
    made = make_model(vocab_size=len(VOCABULARY), max_position_embeddings=300)
    # So that every token that is generated is a word of the answer.
    made.generation_config.suppress_tokens = [0, 1, 2, 3]
    return made.double()


@pytest.fixture
def pipe(model: Any) -> Any:
    return pipeline(TASK, model=model, tokenizer=build_tokenizer(), device="cpu")


@pytest.fixture
def calls(model: Any) -> Iterator[list[int]]:
    """How many tokens each call of the model had."""
    lengths: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        lengths.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    yield lengths
    handle.remove()


def _by_hand(pipe: Any, context: str, question: str, cache: Any, new: int = 12, **more: Any) -> str:
    """The answer as a user of ``generate`` would get it."""

    def tokens(text: str) -> torch.Tensor:
        return pipe.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

    first = tokens(context)
    pipe.model(first, past_key_values=cache)
    text = torch.cat([first, tokens(question)], dim=1)
    more = {"do_sample": False, **more}
    output = pipe.model.generate(text, past_key_values=cache, max_new_tokens=new, **more)
    return pipe.tokenizer.decode(output[0, text.shape[1] :])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, lambda: CompressedCache("full")),
        (dict(policy="snapkv", budget=24), lambda: CompressedCache("snapkv", 24)),
        (
            dict(policy="h2o+caote", budget=20, sinks=2, recent=4, interval=3),
            lambda: CompressedCache("h2o+caote", 20, sinks=2, recent=4, interval=3),
        ),
        (
            dict(policy="snapkv", budget=24, window=4, kernel_size=1),
            lambda: CompressedCache("snapkv", 24, window=4, kernel_size=1),
        ),
        (dict(press="h2o", budget=24), lambda: CompressedCache("h2o", 24)),
        (dict(policy=H2O(), budget=24), lambda: CompressedCache(H2O(), 24)),
        (dict(cache=CompressedCache("tova", 24)), lambda: CompressedCache("tova", 24)),
        (dict(policy="h2o", budget=[24, 16]), lambda: CompressedCache("h2o", [24, 16])),
    ],
)
def test_an_answer_is_that_of_generate_by_hand(
    pipe: Any, given: dict[str, Any], expected: Callable[[], CompressedCache]
) -> None:
    got = pipe(CONTEXT, question=QUESTIONS[0], max_new_tokens=12, **given)
    assert got["answer"] == _by_hand(pipe, f"<bos> {CONTEXT}", QUESTIONS[0], expected())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_ratio_is_the_share_of_each_context_that_goes(
    pipe: Any, batch_size: int, calls: list[int]
) -> None:
    contexts = [_text(n, seed=n) for n in (60, 23, 41, 60)]
    arguments = dict(question=QUESTIONS[0], policy="h2o", max_new_tokens=12)
    found = pipe(contexts, compression_ratio=0.6, batch_size=batch_size, **arguments)
    # The first and the last are equally long. Each begins with one more token.
    read = [length for length in calls if length in (61, 24, 42)]
    assert read == ([61, 61, 24, 42] if batch_size == 1 else [61, 24, 42])
    for context, tokens, each in zip(contexts, (61, 24, 42, 61), found, strict=True):
        # As in kvpress, which rounds down.
        alone = pipe(context, budget=int(tokens * (1 - 0.6)), **arguments)
        assert each["answer"] == alone["answer"]


def test_every_question_is_answered_as_if_it_were_the_only_one(pipe: Any, calls: list[int]) -> None:
    together = pipe(CONTEXT, questions=QUESTIONS, **H2O_24)["answers"]
    # The context once, then each question and eleven steps. A question of one token is padded, so
    # that it is read as it would be in a batch.
    assert [length for length in calls if length > 1] == [61, 5, 2, 30]
    assert len(calls) == 1 + 3 * 12
    alone = [pipe(CONTEXT, question=question, **H2O_24)["answer"] for question in QUESTIONS]
    assert together == alone
    assert len(set(together)) == 3


@pytest.mark.parametrize("batch_size", [2, 3])
@pytest.mark.parametrize("policy", slow_but(("h2o",), ("h2o", "snapkv", None)))
def test_contexts_in_a_batch_are_answered_as_alone(
    pipe: Any, policy: str | None, batch_size: int
) -> None:
    budget = {} if policy is None else dict(policy=policy, budget=24)
    contexts = [_text(n, seed=n) for n in (60, 23, 41)]
    questions = [QUESTIONS, QUESTIONS[1:2], QUESTIONS[::-1]]
    arguments = dict(max_new_tokens=12, **budget)
    got = pipe(contexts, questions=questions, batch_size=batch_size, **arguments)
    for context, asked, answers in zip(contexts, questions, got, strict=True):
        assert answers["answers"] == pipe(context, questions=asked, **arguments)["answers"]


@pytest.mark.parametrize("policy", slow_but(("kvzip",), ("h2o", "kvzip", None)))
@pytest.mark.parametrize("family", MIXED, ids=lambda family: family.name)
def test_questions_of_other_lengths_are_no_padding_of_recurrent_layers(
    family: Family, policy: str | None
) -> None:
    model = family.make()
    model.generation_config.suppress_tokens = [0, 1, 2, 3, *range(len(VOCABULARY), 160)]
    pipe: Any = pipeline(TASK, model=model, tokenizer=build_tokenizer(), device="cpu")
    budget = {} if policy is None else dict(policy=policy, budget=24)
    contexts = [_text(n, seed=n) for n in (60, 23, 41)]
    questions = [QUESTIONS[:2], QUESTIONS[1:2], QUESTIONS[1::-1]]
    arguments = dict(max_new_tokens=6, **budget)
    got = pipe(contexts, questions=questions, batch_size=3, **arguments)
    for context, asked, answers in zip(contexts, questions, got, strict=True):
        each = [pipe(context, question=one, **arguments)["answer"] for one in asked]
        assert answers["answers"] == each


def test_without_a_question_a_text_goes_on(pipe: Any, calls: list[int]) -> None:
    contexts = [CONTEXT, _text(23, seed=23)]
    for context in contexts:
        ids = pipe.tokenizer(f"<bos> {context}", return_tensors="pt").input_ids
        whole = pipe.model.generate(ids, max_new_tokens=12, do_sample=False)
        expected = pipe.tokenizer.decode(whole[0, ids.shape[1] :])
        assert pipe(context, max_new_tokens=12)["answer"] == expected
    calls.clear()
    together = pipe(contexts, batch_size=2, **H2O_24)
    assert calls[:2] == [60, 2]
    assert together[1]["answer"] == pipe(contexts[1], **H2O_24)["answer"]


def test_one_question_or_list_is_for_all_contexts(pipe: Any) -> None:
    contexts = [_text(40, seed=n) for n in range(2)]
    one = pipe((text for text in contexts), question=QUESTIONS[0], batch_size=2, **H2O_24)
    many = pipe(contexts, questions=QUESTIONS[:2], batch_size=2, **H2O_24)
    assert [each["answer"] for each in one] == [each["answers"][0] for each in many]
    assert [len(each["answers"]) for each in many] == [2, 2]
    assert pipe([], question="1", **H2O_24) == []


def test_a_chat_template_surrounds_context_and_question(pipe: Any) -> None:
    pipe.tokenizer.chat_template = TEMPLATE
    for thinking in (False, True):
        got = pipe(
            CONTEXT,
            question=QUESTIONS[0],
            answer_prefix=" total",
            enable_thinking=thinking,
            **H2O_24,
        )
        suffix = " solve jam answer total" if thinking else " solve answer total"
        first, then = f"<bos> tax {CONTEXT}", QUESTIONS[0] + suffix
        assert got["answer"] == _by_hand(pipe, first, then, CompressedCache("h2o", 24))


def test_an_answer_begins_after_its_prefix(pipe: Any) -> None:
    got = pipe(CONTEXT, question=QUESTIONS[0], answer_prefix="answer is", **H2O_24)["answer"]
    cache = CompressedCache("h2o", 24)
    assert got == _by_hand(pipe, f"<bos> {CONTEXT}", f"{QUESTIONS[0]} answer is", cache)
    assert len(got.split()) == 12


def test_a_context_is_cut_at_its_end(pipe: Any, calls: list[int], caplog: Any) -> None:
    cut = pipe(CONTEXT, question=QUESTIONS[0], max_context_length=31, **H2O_24)
    assert calls[0] == 31
    assert "cut from 61 to 31" in caplog.text
    words = " ".join(CONTEXT.split()[:30])
    assert cut["answer"] == pipe(words, question=QUESTIONS[0], **H2O_24)["answer"]


@pytest.mark.parametrize(
    "sampling",
    [
        dict(do_sample=True, temperature=3.0, top_k=20),
        dict(repetition_penalty=1.5),
        dict(custom_generate=decode),
    ],
)
def test_arguments_of_generate_are_those_of_generate(pipe: Any, sampling: dict[str, Any]) -> None:
    cache, question = CompressedCache("h2o", 24), QUESTIONS[0]
    torch.manual_seed(0)
    expected = _by_hand(pipe, f"<bos> {CONTEXT}", question, cache, **sampling)
    torch.manual_seed(0)
    assert pipe(CONTEXT, question=question, **H2O_24, **sampling)["answer"] == expected


@pytest.mark.parametrize("settings", [{}, dict(lossless=True), dict(custom_generate=decode)])
def test_an_answer_ends_where_it_says_a_word(
    pipe: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ends(StoppingCriteria):
        """In place of transformers', to which a tokenizer of whole words means nothing."""

        def __init__(self, tokenizer: Any, stop_strings: list[str]) -> None:
            (self.end,) = tokenizer.convert_tokens_to_ids(stop_strings)

        def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> Any:
            return input_ids[:, -1] == self.end

    monkeypatch.setattr(utils, "StopStringCriteria", Ends)
    whole = pipe(CONTEXT, question="1", **H2O_24, **settings)["answer"].split()
    cut = pipe(CONTEXT, question="1", **H2O_24, stop_strings=[whole[5]], **settings)
    assert cut["answer"].split() == whole[: whole.index(whole[5]) + 1]


def test_what_a_model_generates_by_default_is_refused_too(pipe: Any, model: Any) -> None:
    model.generation_config.num_beams = 2
    try:
        with pytest.raises(NotImplementedError, match="num_beams is not served"):
            pipe(CONTEXT, question="1", generation_config=GenerationConfig(max_new_tokens=4))
        pipe(CONTEXT, question="1", num_beams=1, max_new_tokens=4)
    finally:
        model.generation_config.num_beams = None


def test_a_generation_config_takes_the_place_of_the_defaults(pipe: Any) -> None:
    config = GenerationConfig(max_new_tokens=5, do_sample=False, suppress_tokens=[0, 1, 2, 3])
    got = pipe(CONTEXT, question=QUESTIONS[0], policy="h2o", budget=24, generation_config=config)
    assert len(got["answer"].split()) == 5
    whole = pipe(CONTEXT, question=QUESTIONS[0], policy="h2o", budget=24)["answer"].split()
    assert len(whole) == 50 and whole[:5] == got["answer"].split()


def test_chunks_hold_for_contexts(pipe: Any, calls: list[int]) -> None:
    whole = pipe(CONTEXT, question=QUESTIONS[0], policy="h2o", budget=200, max_new_tokens=12)
    calls.clear()
    parts = pipe(
        CONTEXT,
        question=QUESTIONS[0],
        policy="h2o",
        budget=200,
        max_new_tokens=12,
        prefill_chunk_size=20,
    )
    assert calls[:4] == [20, 20, 20, 1]
    assert parts["answer"] == whole["answer"]


@pytest.mark.slow
def test_steps_may_be_compiled(make_model: Callable[..., LlamaForCausalLM]) -> None:
    torch._dynamo.reset()
    model, backend = make_model(vocab_size=len(VOCABULARY)), CountingBackend()
    pipe: Any = pipeline(TASK, model=model, tokenizer=build_tokenizer(), device="cpu")
    config: CompileConfig = compiled(backend)
    eager = pipe(CONTEXT, questions=QUESTIONS, **H2O_24)["answers"]
    got = pipe(CONTEXT, questions=QUESTIONS, compile_config=config, **H2O_24)
    assert got["answers"] == eager
    assert backend.graphs == 1
    torch._dynamo.reset()


def test_a_cache_of_the_user_holds_the_context_afterwards(pipe: Any) -> None:
    cache = CompressedCache("h2o", 24)
    answer = pipe(CONTEXT, question=QUESTIONS[0], cache=cache, max_new_tokens=12)["answer"]
    assert cache.get_seq_length() == 61 and cache.evicted_tokens == 61 - 24
    with pytest.raises(ValueError, match="cache must be empty, got one that holds a text of 61"):
        pipe(CONTEXT, question=QUESTIONS[0], cache=cache)
    cache.reset()
    again = pipe([CONTEXT, CONTEXT], question=QUESTIONS[0], cache=cache, max_new_tokens=12)
    assert [each["answer"] for each in again] == [answer, answer]


def test_what_a_pipeline_is_made_with_holds_for_every_call(model: Any, pipe: Any) -> None:
    made: Any = pipeline(
        TASK, model=model, tokenizer=build_tokenizer(), device="cpu", answer_prefix="is", **H2O_24
    )
    expected = pipe(CONTEXT, question=QUESTIONS[0], answer_prefix="is", **H2O_24)["answer"]
    assert made(CONTEXT, question=QUESTIONS[0])["answer"] == expected
    assert made(CONTEXT, question=QUESTIONS[0], press="H2OPress")["answer"] == expected
    shorter = made(CONTEXT, question=QUESTIONS[0], max_new_tokens=3)["answer"]
    assert expected.startswith(shorter) and len(shorter.split()) == 3


def test_timing_is_of_the_context_and_all_questions(pipe: Any) -> None:
    cache = CompressedCache("h2o", 24)
    found = pipe(CONTEXT, questions=QUESTIONS, cache=cache, max_new_tokens=12)["timing"]
    assert (found.tokens_in, found.tokens_out) == (61 + 5 + 2 + 30, 3 * 12)
    assert len(found.step_s) == 3 * 11
    # Of the context once, then of each question, one of which has a single token, and its answer.
    assert found.evicted_tokens == 61 - 24 + 5 + 1 + 30 + 3 * 11
    assert found.cache_bytes == cache.nbytes
    assert found.prefill_s > 0 and found.decode_s == sum(found.step_s)


def test_no_option_of_a_policy_is_named_like_an_argument_of_generate() -> None:
    names = {
        name for kind in (POLICIES, MODIFIERS) for one in kind.values() for name in own_options(one)
    }
    assert not names & set(vars(GenerationConfig()))
    assert not names & {
        "policy",
        "press",
        "cache",
        "question",
        "questions",
        "batch_size",
        "answer_prefix",
    }


@pytest.mark.parametrize(
    ("context", "arguments", "error", "message"),
    [
        ("", {}, ValueError, r"context must not be empty, got ''"),
        (" \n", {}, ValueError, r"context must not be empty, got ' \\n'"),
        (["1", ""], {}, ValueError, r"context must not be empty"),
        ([3], {}, TypeError, r"context must be a text, got 3 \(int\)"),
        ("1", dict(questions=["1"]), ValueError, r"question and questions must not both be given"),
        ("1", dict(question=None, questions=[]), ValueError, r"questions must have at least one"),
        ("1", dict(question=None, questions="1 2"), TypeError, r"questions must be a list of text"),
        ("1", dict(question=None, questions=["1", ""]), ValueError,
         r"question must have at least one token.* Leave out question"),
        ("1", dict(question=None, max_context_length=1), ValueError, r"must have two tokens then"),
        ("1", dict(question=3), TypeError, r"question must be a text, got 3"),
        ("1", dict(question=["1", "2"]), TypeError, r"question must be a text.* as questions"),
        (3, {}, TypeError, r"context must be a text, or a list of texts, got 3"),
        ({"context": "1"}, {}, TypeError, r"context must be a text, or a list of texts"),
        ("1", dict(answer_prefix=None), TypeError, r"answer_prefix must be a text, got None"),
        ("1", dict(max_context_length=2.0), TypeError, r"max_context_length must be an int"),
        ("1", dict(batch_size=0), ValueError, r"batch_size must be >= 1, got 0"),
        ("1", dict(batch_size=2.0), TypeError, r"batch_size must be an int >= 1, got 2.0"),
        ("1", dict(policy="h2o", least_recent=1), TypeError, r"unknown argument 'least_recent'"),
        ("1", dict(generation_config=GenerationConfig(num_beams=2)), NotImplementedError,
         r"num_beams is not served"),
        ("1", dict(generation_config=GenerationConfig(return_dict_in_generate=True)),
         NotImplementedError, r"return_dict_in_generate is not served"),
        (["1"] * 3, dict(question=None, questions=[["1"]] * 2), ValueError, r"one list for each"),
        (["1"] * 2, dict(question=None, questions=[["1"], []]), ValueError, r"at least one text"),
        ("1", dict(question=_text(300)), ValueError,
         r"question must be shorter than the 300 tokens the model can see, got 300"),
        (_text(295), dict(question=_text(9)), ValueError,
         r"must fit into the 300 tokens.* got 296 \+ 9. Pass max_context_length=291"),
        ("1", dict(max_context_length=0), ValueError, r"max_context_length must be >= 1, got 0"),
        ("1", dict(max_new_tokens="5"), TypeError, r"max_new_tokens must be an int >= 1, got '5'"),
        ("1", dict(max_new_tokens=0), ValueError, r"max_new_tokens must be >= 1, got 0"),
        ("1", dict(prefill_chunk_size=0), ValueError, r"prefill_chunk_size must be >= 1, got 0"),
        ("1", dict(prefill_chunk_size=-3), ValueError, r"prefill_chunk_size must be >= 1, got -3"),
        ("1", dict(batch_size=-1), ValueError, r"batch_size must be >= 1, got -1"),
        ("1", dict(press="snapvk"), ValueError, r"policy='snapvk': unknown .* mean 'snapkv'"),
        ("1", dict(press="CURPress"), ValueError, r"`compressed-cache presses CURPress` tells"),
        ("1", dict(policy=object()), TypeError, r"policy must be a name or a Policy object"),
        ("1", dict(policy="h2o", press="h2o"), ValueError, r"policy and press are the same"),
        ("1", dict(policy="h2o", compression_ratio=0.5, budget=4), ValueError, r"and budget must"),
        ("1", dict(cache=CompressedCache(), compression_ratio=0.5), ValueError, r"and cache must"),
        ("1", dict(compression_ratio=0.5), ValueError, r"_ratio given without a policy"),
        ("1", dict(policy="h2o", compression_ratio="0.5"), TypeError, r"must be a float, got"),
        ("1", dict(policy="h2o", compression_ratio=1), ValueError, r"to below 1, got 1"),
        ("1", dict(policy="h2o", compression_ratio=-0.1), ValueError, r"to below 1, got -0"),
        ("1", dict(policy="h2o", compresion_ratio=1), TypeError, r"mean 'compression_ratio'"),
        ("1", dict(policy="h2o", budget=0), ValueError, r"policy='h2o': budget must be"),
        ("1", dict(policy="h2o", budget=4, sinks=4), ValueError, r"policy='h2o': budget must be"),
        ("1", dict(policy="h2o", bugdet=4), TypeError, r"unknown argument 'bugdet'.*mean 'budget'"),
        ("1", dict(policy="h2o", window=4), TypeError, r"'window' for policy='h2o', expected"),
        ("1", dict(max_new_token=4), TypeError, r"Did you mean 'max_new_tokens'"),
        ("1", dict(budget=64), ValueError, r"'budget' given without a policy"),
        ("1", dict(num_beams=4), NotImplementedError, r"num_beams is not served"),
        ("1", dict(return_dict_in_generate=True), NotImplementedError, r"generate is not served"),
        ("1", dict(prompt_lookup_num_tokens=9), NotImplementedError, r"is not served by"),
        ("1", dict(cache={}), TypeError, r"cache must be a CompressedCache, got dict"),
        ("1", dict(cache=CompressedCache(), policy="h2o"), ValueError, r"got 'policy' beside"),
        ("1", dict(cache=CompressedCache(), sinks=1), ValueError, r"alone, got 'sinks' beside"),
        (["1", _text(60)], dict(policy="h2o", budget=50, protect_prompt=True, recent=4), ValueError,
         r"budget must be at least prompt \+ recent \+ 1 .*\(62 \+ 4 \+ 1 = 67\), got 50"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_read(
    pipe: Any, calls: list[int], context: Any, arguments: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        pipe(context, **{"question": "1", **arguments})
    assert not calls


def test_a_default_may_be_asked_for_as_none(pipe: Any) -> None:
    asked = pipe("1", question=QUESTIONS[0], max_new_tokens=None)["answer"]
    assert asked == pipe("1", question=QUESTIONS[0])["answer"]
    assert len(asked.split()) == 50


def test_a_template_that_alters_the_text_is_refused(pipe: Any) -> None:
    pipe.tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ValueError, match="chat_template must write the text of the user once"):
        pipe(CONTEXT, question="1")


PROGRAM = f"""
from transformers import pipeline
import compressed_cache.integrations, sys
from transformers.pipelines import PIPELINE_REGISTRY
print(PIPELINE_REGISTRY.check_task({TASK!r})[1]["impl"].__name__)
print("compressed_cache.cache" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("autoload", ["0", "1"])
def test_the_task_is_known_where_the_pipelines_come_first(autoload: str) -> None:
    # With torch's entry points transformers' pipelines are half executed when we are.
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["CompressedTextGenerationPipeline", "False"], done.stderr


@pytest.mark.slow
def test_pipelines_that_have_changed_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "transformers/pipelines").mkdir(parents=True)
    for name in ("__init__", "pipelines/__init__", "pipelines/base"):
        (tmp_path / f"transformers/{name}.py").write_text("")
    program = "import compressed_cache.integrations, transformers.pipelines.base; print('alive')"
    path = os.pathsep.join((str(tmp_path), str(Path(__file__).parents[1])))
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "alive\n", done.stderr
    assert "the pipeline is not available with this transformers" in done.stderr


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "streaming_llm"])
def test_lossless_answers_are_those_of_the_full_cache(pipe: Any, policy: str) -> None:
    contexts = [CONTEXT, _text(40, seed=9)]
    asked = [QUESTIONS, QUESTIONS[:1]]
    options = dict(questions=asked, batch_size=2, max_new_tokens=24)
    full = pipe(contexts, **options)
    drafted = pipe(contexts, **options, policy=policy, budget=24, lossless=True, num_draft_tokens=3)
    for own, answer in zip(drafted, full, strict=True):
        assert own["answers"] == answer["answers"]
    drafts = drafted[0]["timing"].drafts
    # All but the first token of each of four answers.
    assert drafts.tokens == 4 * 23 and drafts.drafted
    assert full[0]["timing"].drafts is None


def test_lossless_of_a_pipeline_is_left_out_of_one_call(model: Any) -> None:
    options = dict(lossless=True, num_draft_tokens=2, policy="h2o", budget=24)
    pipe: Any = pipeline(TASK, model=model, tokenizer=build_tokenizer(), device="cpu", **options)
    timings = [
        pipe(CONTEXT, question=QUESTIONS[0], **more)["timing"] for more in ({}, {"lossless": False})
    ]
    assert timings[0].drafts is not None and timings[1].drafts is None


def test_lossless_with_a_cache_of_the_users_own(pipe: Any) -> None:
    cache = CompressedCache("h2o", 24)
    answer = pipe(CONTEXT, question=QUESTIONS[0], cache=cache, lossless=True, adaptive=False)
    assert answer["answer"] == pipe(CONTEXT, question=QUESTIONS[0])["answer"]
    assert cache.get_seq_length() > 60


@pytest.mark.parametrize(
    ("error", "says", "arguments"),
    [
        (TypeError, "lossless must be True or False, got 1", dict(lossless=1)),
        (ValueError, "'num_draft_tokens' given without lossless=True", dict(num_draft_tokens=2)),
        (
            ValueError,
            "num_draft_tokens must be at least 1",
            dict(lossless=True, num_draft_tokens=0),
        ),
        (ValueError, "must not both be given", dict(lossless=True, custom_generate=decode)),
        (
            NotImplementedError,
            "'kvzip' ranks a prompt by a second pass over it, but drafts follow the first. "
            "Choose another policy, or leave out lossless.",
            dict(lossless=True, policy="kvzip"),
        ),
    ],
)
def test_lossless_is_refused(
    pipe: Any, calls: list[int], error: type[Exception], says: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(error, match=re.escape(says)):
        pipe(CONTEXT, question=QUESTIONS[0], **{**H2O_24, **arguments})
    assert not calls
