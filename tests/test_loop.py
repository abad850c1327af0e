"""The loop of this library gives the tokens, the draws and the cache of plain ``generate``."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationMixin, LlamaForCausalLM
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from compressed_cache import CompressedCache, decode
from compressed_cache.hf.decode_loop import draw
from compressed_cache.versions import cache_argument
from tests.compiling import CountingBackend, compiled
from tests.conftest import VOCABULARY, distinct_tokens, held
from tests.families import EACH_FAMILY, LINEAR, Family
from tests.grids import pairwise, slow_but

NEW = 24
SAMPLING: dict[str, Any] = dict(do_sample=True, temperature=0.7, top_k=50, top_p=0.9)
OFTEN = list(range(0, VOCABULARY, 10))  # so many ends that rows end at different steps
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": SAMPLING,
    "several sequences": dict(do_sample=True, num_return_sequences=2),
    "ends": dict(eos_token_id=OFTEN),
    "sampled ends": dict(eos_token_id=OFTEN, do_sample=True),
    "minimal length": dict(eos_token_id=OFTEN, min_new_tokens=12),
    "repetition penalty": dict(repetition_penalty=1.3, no_repeat_ngram_size=3),
    "one token": dict(max_new_tokens=1),
    "chunks of the prompt": dict(prefill_chunk_size=11),
}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., LlamaForCausalLM]) -> Any:
    return make_model().double()


@pytest.fixture
def backend() -> Iterator[CountingBackend]:
    torch._dynamo.reset()
    yield CountingBackend()
    torch._dynamo.reset()


@pytest.fixture
def plain_loops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of transformers' own loops, as they are called."""
    called: list[str] = []
    generation: Any = GenerationMixin

    def note(name: str) -> None:
        original = getattr(generation, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(generation, name, method)

    for name in ("_sample", "_beam_search", "_assisted_decoding"):
        note(name)
    return called


def _cache(policy: str = "h2o", interval: int | None = None) -> CompressedCache:
    return CompressedCache(policy, 16, interval=interval, recent=8, protect_prompt=False)


def _padded() -> dict[str, torch.Tensor]:
    ids = distinct_tokens(3, 30)
    ids[0, :11] = ids[1, :4] = 0
    return dict(input_ids=ids, attention_mask=(ids != 0).long())


def _generate(model: Any, cache: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(3)
    options = {"max_new_tokens": NEW, "do_sample": False, **_padded(), **options}
    return model.generate(**cache_argument(cache), **options)


def _assert_same(cache: CompressedCache, expected: CompressedCache) -> None:
    assert cache.get_seq_length() == expected.get_seq_length()
    assert cache.evicted_tokens == expected.evicted_tokens
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        for tensor, wanted in zip(layer.tensors(), other.tensors(), strict=True):
            assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("policy", "interval"), [("h2o", 1), ("snapkv", 4)])
def test_tokens_draws_and_cache_are_those_of_generate(
    model: Any, plain_loops: list[str], policy: str, interval: int, mode: str
) -> None:
    caches = [_cache(policy, interval) for _ in range(2)]
    expected = _generate(model, caches[0], **MODES[mode])
    draw = torch.rand(1)
    got = _generate(model, caches[1], custom_generate=decode, **MODES[mode])
    assert torch.equal(got, expected)
    assert torch.equal(torch.rand(1), draw)
    assert plain_loops == ["_sample"]
    if "eos_token_id" not in MODES[mode]:
        _assert_same(caches[1], caches[0])


def test_rows_end_at_different_steps(model: Any) -> None:
    """Or the modes above that end would show nothing."""
    new = _generate(model, _cache(), eos_token_id=OFTEN)[:, 30:]
    lengths = [int((row != 0).sum()) for row in new]
    assert len(set(lengths)) == 3 and max(lengths) < NEW


@pytest.mark.parametrize(
    ("policy", "interval", "graphs", "mode"),
    [
        pytest.param("h2o", 1, 1, "greedy", marks=pytest.mark.slow),
        pytest.param("h2o", 1, 1, "ends", marks=pytest.mark.slow),
        pytest.param("snapkv", 4, 2, "sampling", marks=pytest.mark.slow),
        pytest.param("snapkv", 4, 2, "repetition penalty", marks=pytest.mark.slow),
    ],
)
def test_the_graphs_are_those_of_generate(
    model: Any, backend: CountingBackend, policy: str, interval: int, graphs: int, mode: str
) -> None:
    caches = [_cache(policy, interval) for _ in range(2)]
    options = dict(MODES[mode], compile_config=compiled(backend))
    got = _generate(model, caches[0], custom_generate=decode, **options)
    assert backend.graphs == graphs
    assert torch.equal(got, _generate(model, caches[1], **options))
    _generate(model, _cache(policy, interval), custom_generate=decode, **SAMPLING)
    assert backend.graphs == graphs
    if mode != "ends":
        _assert_same(caches[0], caches[1])


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_families(family: Family) -> None:
    model = family.make()
    ids = torch.randint(1, 160, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if LINEAR not in family.kinds:
        mask[0, :5] = 0
    inputs = dict(input_ids=ids, attention_mask=mask)
    expected = _generate(model, CompressedCache("h2o", 12), **inputs)
    got = _generate(model, CompressedCache("h2o", 12), custom_generate=decode, **inputs)
    assert torch.equal(got, expected)


def test_a_conversation_goes_on(model: Any) -> None:
    caches = [_cache("snapkv", 4) for _ in range(2)]
    texts = []
    for cache, options in zip(caches, ({}, {"custom_generate": decode}), strict=True):
        first = _generate(model, cache, **options)
        ids = torch.cat([first, distinct_tokens(3, 7, seed=1)], dim=1)
        mask = torch.ones_like(ids)
        mask[:, :30] = _padded()["attention_mask"]
        texts.append(_generate(model, cache, input_ids=ids, attention_mask=mask, **options))
    assert torch.equal(*texts)
    _assert_same(caches[1], caches[0])


@pytest.mark.parametrize(
    ("steps", "compiles", "attention"),
    slow_but(
        [(("snapkv", 4), False)],
        pairwise([("h2o", 1), ("snapkv", 4), ("full", 1)], [False, True], ["sdpa", "eager"]),
    ),
    ids=str,
)
def test_a_row_that_ends_holds_what_it_holds_alone(
    make_model: Callable[..., LlamaForCausalLM],
    backend: CountingBackend,
    steps: tuple[str, int],
    compiles: bool,
    attention: str,
) -> None:
    """At a budget below the prompt, and in the turn after it."""
    policy, interval = steps
    # transformers' eager attention cannot pad in float64.
    dtype = torch.float64 if attention == "sdpa" else torch.float32
    model = make_model(attn_implementation=attention).to(dtype)
    options: dict[str, Any] = dict(custom_generate=decode, eos_token_id=OFTEN)
    if compiles:
        options["compile_config"] = compiled(backend)
    inputs, cache = _padded(), _cache(policy, interval)
    text = _generate(model, cache, **options)
    answers = text[:, 30:]
    lengths = (answers != 0).sum(dim=1).tolist()
    assert len(set(lengths)) == 3
    read = cache.get_seq_length()
    more = distinct_tokens(3, 7, seed=1)
    whole = torch.cat([text, more], dim=1)
    mask = torch.cat([inputs["attention_mask"], answers != 0, more != 0], dim=1).long()
    turn = dict(input_ids=whole, attention_mask=mask, max_new_tokens=9)
    again = _generate(model, cache, **turn, custom_generate=decode)[:, -9:]
    if compiles:
        assert backend.graphs <= (1 if interval == 1 else 2)
    for row, length in enumerate(lengths):
        alone = _cache(policy, interval)
        prompt = inputs["input_ids"][row, inputs["attention_mask"][row] == 1][None]
        unread = 30 + length - read
        steps = answers[row : row + 1, : length - max(0, unread)]
        with torch.no_grad():
            for part in (prompt, *steps.split(1, dim=1)):
                model(part, **cache_argument(alone))
        own = torch.cat([prompt, answers[row : row + 1, :length], more[row : row + 1]], dim=1)
        expected = _generate(
            model, alone, input_ids=own, attention_mask=torch.ones_like(own), max_new_tokens=9
        )
        assert torch.equal(again[row], expected[0, -9:])
        for layer in range(2):
            assert held(cache, layer, row) == held(alone, layer)
        # And what the same loop makes of it.
        alone = _cache(policy, interval)
        answer = _generate(
            model, alone, input_ids=prompt, attention_mask=torch.ones_like(prompt), **options
        )
        assert torch.equal(answer, own[:, : answer.shape[1]])
        expected = _generate(
            model,
            alone,
            input_ids=own,
            attention_mask=torch.ones_like(own),
            max_new_tokens=9,
            custom_generate=decode,
        )
        assert torch.equal(again[row], expected[0, -9:])


def test_a_row_that_ended_cannot_be_shown_as_text(model: Any) -> None:
    cache = _cache()
    text = _generate(model, cache, eos_token_id=OFTEN, custom_generate=decode)
    ids = torch.cat([text, distinct_tokens(3, 7, seed=1)], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :30] = _padded()["attention_mask"]
    with pytest.raises(ValueError, match="must hide what was read as padding, of rows that had"):
        _generate(model, cache, input_ids=ids, attention_mask=mask)
    # Not even one more token than the shortest answer has.
    mask[:, 30:-7] = text[:, 30:] != 0
    row = int(mask.sum(dim=1).argmin())
    mask[row, 30 + int((text[row, 30:] != 0).sum())] = 1
    with pytest.raises(ValueError, match=f"it shows 1 such tokens of row {row}"):
        _generate(model, cache, input_ids=ids, attention_mask=mask)


def test_a_prompt_of_embeddings(model: Any) -> None:
    inputs = dict(
        input_ids=None, inputs_embeds=model.get_input_embeddings()(_padded()["input_ids"])
    )
    expected = _generate(model, _cache(), **inputs)
    got = _generate(model, _cache(), custom_generate=decode, **inputs)
    assert torch.equal(got, expected)


class _Notes(BaseStreamer):
    def __init__(self) -> None:
        self.put_in: list[list[Any]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.put_in.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("options", [{}, {"return_dict_in_generate": True}])
def test_a_streamer_gets_what_it_gets_from_generate(model: Any, options: dict[str, Any]) -> None:
    plain, streamer = _Notes(), _Notes()
    options = {**options, "eos_token_id": OFTEN}
    _generate(model, _cache(), streamer=plain, **options)
    _generate(model, _cache(), streamer=streamer, custom_generate=decode, **options)
    assert streamer.put_in == plain.put_in and len(plain.put_in) > 2
    assert streamer.ended == plain.ended == 1


class _Bans(LogitsProcessor):
    """Bans what was written last, in place."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter_(1, input_ids[:, -1:], -torch.inf)


class _EndsAt(StoppingCriteria):
    """Ends row ``b`` at ``lengths[b]`` tokens."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.lengths


def test_processors_and_criteria_of_the_user(model: Any, plain_loops: list[str]) -> None:
    options: dict[str, Any] = dict(
        logits_processor=LogitsProcessorList([_Bans()]),
        stopping_criteria=StoppingCriteriaList([_EndsAt(35, 33, 40)]),
    )
    expected = _generate(model, _cache(), **options)
    assert expected.shape == (3, 40)
    assert torch.equal(_generate(model, _cache(), custom_generate=decode, **options), expected)
    assert plain_loops == ["_sample"]


@pytest.mark.parametrize(
    ("loop", "options"),
    [
        ("_beam_search", dict(num_beams=3)),
        ("_beam_search", dict(num_beams=3, do_sample=True)),
        ("_sample", dict(return_dict_in_generate=True, output_scores=True)),
        ("_assisted_decoding", dict(prompt_lookup_num_tokens=3)),
    ],
)
def test_what_it_does_not_do_is_left_to_generate(
    model: Any, plain_loops: list[str], loop: str, options: dict[str, Any]
) -> None:
    options = {"input_ids": distinct_tokens(1, 30), "attention_mask": None, **options}
    expected = _generate(model, _cache(), **options)
    got = _generate(model, _cache(), custom_generate=decode, **options)
    assert plain_loops == [loop] * 2
    if "output_scores" in options:
        assert len(got.scores) == NEW
        expected, got = expected.sequences, got.sequences
    assert torch.equal(got, expected)


def test_an_assistant_is_not_lost(model: Any, plain_loops: list[str]) -> None:
    options = dict(input_ids=distinct_tokens(1, 30), attention_mask=None)
    expected = _generate(model, _cache(), **options)
    got = _generate(model, _cache(), custom_generate=decode, assistant_model=model, **options)
    assert "_assisted_decoding" in plain_loops
    assert torch.equal(got, expected)


def test_another_cache_is_left_to_generate(model: Any, plain_loops: list[str]) -> None:
    expected = _generate(model, DynamicCache())
    assert torch.equal(_generate(model, DynamicCache(), custom_generate=decode), expected)
    assert plain_loops == ["_sample"] * 2


def test_a_cache_that_drafts_is_left_to_generate(model: Any, plain_loops: list[str]) -> None:
    texts = []
    for options in ({}, {"custom_generate": decode}):
        cache = _cache()
        cache.activate_past_recording()
        texts.append(_generate(model, cache, **options))
    assert plain_loops == ["_sample"] * 2
    assert torch.equal(*texts)


def test_a_model_with_steps_of_its_own_is_left_to_generate(
    make_model: Callable[..., LlamaForCausalLM], plain_loops: list[str]
) -> None:
    model: Any = make_model()
    original = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *args, **kwargs: original(*args, **kwargs)
    _generate(model, _cache(), custom_generate=decode)
    assert plain_loops == ["_sample"]


def test_other_custom_loops_are_called_as_ever(model: Any) -> None:
    """``generate`` keeps the streamer from them."""
    CompressedCache()
    seen: dict[str, Any] = {}

    def loop(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.update(kwargs)
        return input_ids

    _generate(model, DynamicCache(), custom_generate=loop, streamer=_Notes())
    assert "generation_config" in seen and "streamer" not in seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["greedy", "sampling", "ends"])
def test_cuda_graphs_give_what_they_give_generate(
    make_model: Callable[..., LlamaForCausalLM], mode: str
) -> None:
    torch._dynamo.reset()
    model: Any = make_model().cuda()
    inputs = {name: tensor.cuda() for name, tensor in _padded().items()}
    caches = [_cache() for _ in range(2)]
    expected = _generate(model, caches[0], **inputs, **MODES[mode])
    got = _generate(model, caches[1], custom_generate=decode, **inputs, **MODES[mode])
    assert torch.equal(got, expected)
    _assert_same(caches[1], caches[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("vocabulary", [5, 2000])
def test_draws_are_those_of_pytorch(vocabulary: int) -> None:
    chances = torch.randn(3, vocabulary).mul(3).softmax(dim=-1)
    chances[:, ::3] = 0.0
    torch.manual_seed(1)
    expected, later = torch.multinomial(chances, num_samples=1), torch.rand(2)
    torch.manual_seed(1)
    tokens, is_broken = draw(chances)
    assert torch.equal(tokens, expected)
    assert torch.equal(torch.rand(2), later)
    assert not is_broken


def test_nothing_is_drawn_of_nan(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model: Any = make_model()
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(ValueError, match="probabilities must be numbers, got NaN"):
        _generate(model, _cache(), do_sample=True, custom_generate=decode)


class _OfTheBatch(StoppingCriteria):
    """Says one thing of all rows."""

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return input_ids.shape[1] >= self.longest


def test_a_criterion_that_speaks_of_the_batch(model: Any) -> None:
    longest = _padded()["input_ids"].shape[1] + 6
    criteria = StoppingCriteriaList([_OfTheBatch(longest)])
    options: dict[str, Any] = dict(stopping_criteria=criteria, eos_token_id=None)
    expected = _generate(model, _cache(), **options)
    assert expected.shape[1] == longest
    got = _generate(model, _cache(), custom_generate=decode, **options)
    assert torch.equal(got, expected)
