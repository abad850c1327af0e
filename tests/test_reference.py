"""The library against `tests/reference`, and the reference against transformers and itself."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
)

from compressed_cache import CompressedCache
from tests.reference.llama import Kept, ReferenceLlama, Trace
from tests.reference.policies import POLICIES, Row, Rules, Token, View, full, h2o, rkv, snapkv

VOCABULARY = 160
NUM_STEPS = 30
# Small windows, so that they end, wrap and are pooled many times in a short text.
OPTIONS: dict[str, dict[str, Any]] = {
    "h2o": {},
    "keydiff": {},
    "knorm": {},
    "rkv": {"window": 4, "kernel_size": 3, "mix_lambda": 0.4, "similarity_threshold": 0.3},
    "snapkv": {"window": 6, "kernel_size": 3},
    "streaming_llm": {},
    "tova": {},
}
NAMES = sorted(OPTIONS)


def make_model(
    dtype: torch.dtype = torch.float64, *, seed: int = 0, num_key_value_heads: int = 2
) -> LlamaForCausalLM:
    """Two layers with four query heads each; attention is far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        head_dim=16,
        initializer_range=0.25,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        # A padding token would have zeros as embedding and key, and a zero has no cosine.
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    return model.double() if dtype == torch.float64 else model.float()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="module")
def reference(model: LlamaForCausalLM) -> ReferenceLlama:
    return ReferenceLlama(model)


@pytest.fixture(scope="module")
def tolerance(reference: ReferenceLlama) -> float:
    """Four times what transformers loses in float32 over a full cache; logits are around 2."""
    text = distinct_tokens(50, seed=0)
    with torch.no_grad():
        output = make_model(torch.float32)(torch.tensor([text]), use_cache=False)
    trace = reference.generate(text[:1], 50, score=full, rules=Rules(64), forced=[*text[1:], 0])
    error = float(np.abs(output.logits[0].double().numpy() - np.stack(trace.logits)).max())
    assert error < 1e-4
    return 4 * error


def distinct_tokens(count: int, *, seed: int) -> list[int]:
    """Tokens without repetition: equal tokens have equal key norms in the first layer."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randperm(VOCABULARY - 1, generator=generator)[:count] + 1).tolist()


class Watch(LogitsProcessor):
    """Notes logits and kept positions before each choice, and may make the choice itself."""

    def __init__(self, cache: CompressedCache, forced: Tensor | None) -> None:
        self.cache = cache
        self.forced = forced
        self.logits: list[Tensor] = []
        self.positions: list[list[Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = len(self.logits)
        self.logits.append(scores.clone())
        self.positions.append([layer.positions.clone() for layer in self.cache.layers])
        if self.forced is None:
            return scores
        chosen = torch.full_like(scores, -math.inf)
        return chosen.scatter(1, self.forced[:, step : step + 1], 0.0)

    def kept(self, step: int, row: int) -> Kept:
        return [
            [tuple(sorted(p for p in head if p >= 0)) for head in positions[row].tolist()]
            for positions in self.positions[step]
        ]


def run_library(
    model: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    num_new_tokens: int,
    *,
    name: str,
    rules: Rules,
    forced: Sequence[Sequence[int]] | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[Tensor, Watch]:
    """Generate for a batch, padded on the left; returns the new tokens ``[B, L]`` and the notes."""
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    input_ids = torch.tensor([[0] * pad + [*p] for pad, p in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
    cache = CompressedCache(name, **asdict(rules), **(options or {}))
    watch = Watch(cache, None if forced is None else torch.tensor(forced))
    output = cast(Any, model).generate(
        input_ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=num_new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([watch]),
    )
    assert isinstance(output, Tensor)
    return output[:, width:], watch


def assert_same_kept(trace: Trace, watch: Watch, row: int) -> None:
    """Every step, layer and head holds the same tokens."""
    for step, expected in enumerate(trace.kept):
        found = watch.kept(step, row)
        assert found == expected, (
            f"row {row}, step {step}: the library keeps {found}, the reference {expected} "
            f"(closest decision of the reference: {trace.gap:.1e})"
        )


def assert_same_logits(trace: Trace, watch: Watch, row: int, tolerance: float) -> None:
    """Logits agree as well as float32 can."""
    found = np.stack([logits[row].double().numpy() for logits in watch.logits])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, np.stack(trace.logits), rtol=0, atol=tolerance)


def cases() -> list[Any]:
    """Every policy with a budget below and above the prompt, each protection and two intervals."""
    parameters = []
    for name in NAMES:
        for budget, protect_prompt in [(14, False), (30, False), (30, True)]:
            for sinks, recent in [(0, 0), (2, 4)]:
                for interval in [1, 3]:
                    rules = Rules(budget, interval, sinks, recent, protect_prompt)
                    label = f"{name}-b{budget}-s{sinks}-r{recent}-i{interval}"
                    label += "-prompt" * protect_prompt
                    parameters.append(pytest.param(name, rules, id=label))
    return parameters


@pytest.mark.parametrize(("name", "rules"), cases())
def test_library_keeps_the_tokens_of_the_reference(
    model: LlamaForCausalLM, reference: ReferenceLlama, tolerance: float, name: str, rules: Rules
) -> None:
    texts = [distinct_tokens(19 + NUM_STEPS, seed=seed) for seed in (18, 19)]
    prompts, forced = [text[:19] for text in texts], [text[19:] for text in texts]
    _, watch = run_library(
        model, prompts, NUM_STEPS, name=name, rules=rules, forced=forced, options=OPTIONS[name]
    )
    for row in range(2):
        trace = reference.generate(
            prompts[row],
            NUM_STEPS,
            score=partial(POLICIES[name], **OPTIONS[name]),
            rules=rules,
            forced=forced[row],
        )
        assert_same_kept(trace, watch, row)
        assert_same_logits(trace, watch, row, tolerance)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_left_padded_rows_keep_what_they_would_keep_alone(
    model: LlamaForCausalLM, reference: ReferenceLlama, tolerance: float, name: str, interval: int
) -> None:
    # One prompt over the budget, one that fills it after two steps, one much shorter.
    lengths = [21, 12, 5]
    texts = [distinct_tokens(length + NUM_STEPS, seed=20 + length) for length in lengths]
    prompts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
    forced = [text[length:] for text, length in zip(texts, lengths, strict=True)]
    rules = Rules(14, interval, sinks=1, recent=3)
    _, watch = run_library(
        model, prompts, NUM_STEPS, name=name, rules=rules, forced=forced, options=OPTIONS[name]
    )
    for row in range(3):
        trace = reference.generate(
            prompts[row],
            NUM_STEPS,
            score=partial(POLICIES[name], **OPTIONS[name]),
            rules=rules,
            forced=forced[row],
        )
        assert_same_kept(trace, watch, row)
        assert_same_logits(trace, watch, row, tolerance)


# With the options of the papers; not "knorm", whose scores tie where the model repeats a token.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "knorm"])
def test_greedy_text_is_that_of_the_reference(
    model: LlamaForCausalLM, reference: ReferenceLlama, tolerance: float, name: str
) -> None:
    prompts = [distinct_tokens(25, seed=3), distinct_tokens(17, seed=4)]
    rules = Rules(20, interval=1, sinks=2, recent=5)
    tokens, watch = run_library(model, prompts, NUM_STEPS, name=name, rules=rules)
    for row, prompt in enumerate(prompts):
        trace = reference.generate(prompt, NUM_STEPS, score=POLICIES[name], rules=rules)
        assert tokens[row].tolist() == trace.tokens
        assert_same_kept(trace, watch, row)


@pytest.mark.parametrize("name", NAMES)
def test_float32_model_keeps_the_tokens_of_the_reference(
    model: LlamaForCausalLM, reference: ReferenceLlama, tolerance: float, name: str
) -> None:
    text = distinct_tokens(19 + NUM_STEPS, seed=17)
    rules = Rules(14, interval=3, sinks=2, recent=4)
    _, watch = run_library(
        make_model(torch.float32),
        [text[:19]],
        NUM_STEPS,
        name=name,
        rules=rules,
        forced=[text[19:]],
        options=OPTIONS[name],
    )
    score = partial(POLICIES[name], **OPTIONS[name])
    trace = reference.generate(text[:19], NUM_STEPS, score=score, rules=rules, forced=text[19:])
    assert_same_kept(trace, watch, 0)
    assert_same_logits(trace, watch, 0, tolerance)


@pytest.mark.parametrize("num_key_value_heads", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_any_grouping_of_query_heads_keeps_the_tokens_of_the_reference(
    name: str, num_key_value_heads: int, tolerance: float
) -> None:
    model = make_model(seed=2, num_key_value_heads=num_key_value_heads)
    text = distinct_tokens(19 + NUM_STEPS, seed=15)
    rules = Rules(16, interval=2, sinks=1, recent=5)
    _, watch = run_library(
        model,
        [text[:19]],
        NUM_STEPS,
        name=name,
        rules=rules,
        forced=[text[19:]],
        options=OPTIONS[name],
    )
    score = partial(POLICIES[name], **OPTIONS[name])
    trace = ReferenceLlama(model).generate(
        text[:19], NUM_STEPS, score=score, rules=rules, forced=text[19:]
    )
    assert_same_kept(trace, watch, 0)
    assert_same_logits(trace, watch, 0, tolerance)


@pytest.mark.parametrize("interval", [1, 3])
def test_snapkv_window_may_be_longer_than_what_is_held(
    model: LlamaForCausalLM, reference: ReferenceLlama, tolerance: float, interval: int
) -> None:
    """A query in the window can then be older than every token that is left."""
    text = distinct_tokens(30 + NUM_STEPS, seed=16)
    rules = Rules(6, interval)
    blind = 0

    def score(view: View) -> list[float]:
        nonlocal blind
        blind += view.held[0].position > view.incoming - 32
        return snapkv(view, window=32, kernel_size=5)

    _, watch = run_library(
        model, [text[:30]], NUM_STEPS, name="snapkv", rules=rules, forced=[text[30:]]
    )
    trace = reference.generate(text[:30], NUM_STEPS, score=score, rules=rules, forced=text[30:])
    assert blind > 0
    assert_same_kept(trace, watch, 0)
    assert_same_logits(trace, watch, 0, tolerance)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("name", ["knorm", "tova"])
def test_of_equal_scores_the_older_token_is_evicted(name: str, interval: int) -> None:
    """All keys are zero, so every norm is zero and attention is uniform."""
    model = make_model()
    torch.nn.init.zeros_(model.model.embed_tokens.weight)
    rules = Rules(14, interval, sinks=2, recent=3)
    _, watch = run_library(
        model, [[1] * 19], NUM_STEPS, name=name, rules=rules, forced=[[1] * NUM_STEPS]
    )
    trace = ReferenceLlama(model).generate(
        [1] * 19, NUM_STEPS, score=POLICIES[name], rules=rules, forced=[1] * NUM_STEPS
    )
    assert_same_kept(trace, watch, 0)
    for step in range(NUM_STEPS):
        newest = 18 + step
        expected = (0, 1, *range(newest - 11, newest + 1))
        assert watch.kept(step, 0) == [[expected] * 2] * 2


@pytest.mark.parametrize("name", NAMES)
def test_forward_calls_without_generate_keep_the_same_tokens(
    model: LlamaForCausalLM, reference: ReferenceLlama, tolerance: float, name: str
) -> None:
    text = distinct_tokens(19 + NUM_STEPS, seed=6)
    rules = Rules(14, interval=3, sinks=2, recent=4)
    cache = CompressedCache(name, **asdict(rules), **OPTIONS[name])
    watch = Watch(cache, None)
    with torch.no_grad():
        for step in range(NUM_STEPS):
            fed = text[:19] if step == 0 else text[18 + step : 19 + step]
            output = model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
            watch(torch.empty(0), output.logits[:, -1])
    score = partial(POLICIES[name], **OPTIONS[name])
    trace = reference.generate(text[:19], NUM_STEPS, score=score, rules=rules, forced=text[19:])
    assert_same_kept(trace, watch, 0)
    assert_same_logits(trace, watch, 0, tolerance)


@pytest.mark.parametrize("name", [*NAMES, "full", "random"])
def test_budget_that_is_never_reached_gives_the_logits_of_the_full_cache(
    model: LlamaForCausalLM, reference: ReferenceLlama, tolerance: float, name: str
) -> None:
    prompts = [distinct_tokens(12, seed=7), distinct_tokens(8, seed=8)]
    rules = Rules(64, sinks=0, recent=0)
    tokens, watch = run_library(model, prompts, 20, name=name, rules=rules)
    for row, prompt in enumerate(prompts):
        trace = reference.generate(prompt, 20, score=full, rules=rules)
        assert tokens[row].tolist() == trace.tokens
        assert_same_kept(trace, watch, row)
        assert_same_logits(trace, watch, row, tolerance)


@pytest.mark.parametrize("protect_prompt", [False, True])
def test_random_evicts_at_will_but_never_protected_tokens(
    model: LlamaForCausalLM, reference: ReferenceLlama, tolerance: float, protect_prompt: bool
) -> None:
    """Which tokens go is not checked; that attention then covers just the others is."""
    num_prompt, num_steps = 12, 40
    text = distinct_tokens(num_prompt + num_steps, seed=9)
    rules = Rules(20, interval=1, sinks=2, recent=4, protect_prompt=protect_prompt)
    _, watch = run_library(
        model,
        [text[:num_prompt]],
        num_steps,
        name="random",
        rules=rules,
        forced=[text[num_prompt:]],
    )
    kept = [watch.kept(step, 0) for step in range(num_steps)]
    last = [positions for heads in kept[-1] for positions in heads]
    assert len(set(last)) == len(last), "every head draws for itself"
    for step, layers in enumerate(kept):
        newest = num_prompt + step - 1
        for layer, heads in enumerate(layers):
            for head, positions in enumerate(heads):
                assert len(positions) == len(set(positions)) == min(newest + 1, rules.budget)
                assert {0, 1, *range(newest - 3, newest + 1)} <= set(positions)
                if protect_prompt:
                    assert set(range(num_prompt)) <= set(positions)
                if step:
                    assert set(positions) <= {*kept[step - 1][layer][head], newest}

    def imitate(view: View) -> list[float]:
        now = kept[view.incoming - num_prompt + 1]
        return [float(token.position in now[view.layer][view.head]) for token in view.held]

    trace = reference.generate(
        text[:num_prompt], num_steps, score=imitate, rules=rules, forced=text[num_prompt:]
    )
    assert_same_kept(trace, watch, 0)
    assert_same_logits(trace, watch, 0, tolerance)


# The reference itself


def test_reference_logits_are_those_of_transformers() -> None:
    """In float64, with the norm replaced: transformers' own computes in float32."""
    model = make_model(seed=1)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(48, eps=model.config.rms_norm_eps, dtype=torch.float64)
                setattr(module, name, norm)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    text = distinct_tokens(40, seed=10)
    with torch.no_grad():
        expected = model(torch.tensor([text]), use_cache=False).logits[0].numpy()
    trace = ReferenceLlama(model).generate(
        text[:10], 31, score=full, rules=Rules(64), forced=[*text[10:], 0]
    )
    np.testing.assert_allclose(np.stack(trace.logits), expected[9:], rtol=0, atol=1e-9)


def test_reference_text_is_that_of_transformers(
    model: LlamaForCausalLM, reference: ReferenceLlama
) -> None:
    prompt = distinct_tokens(10, seed=11)
    output = cast(Any, model).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 10, dtype=torch.int64),
        past_key_values=DynamicCache(config=model.config),
        max_new_tokens=30,
        do_sample=False,
    )
    assert isinstance(output, Tensor)
    trace = reference.generate(prompt, 30, score=full, rules=Rules(64))
    assert trace.tokens == output[0, 10:].tolist()


def test_attention_of_the_test_model_is_far_from_uniform(
    model: LlamaForCausalLM, reference: ReferenceLlama
) -> None:
    """Else a library that attends to the wrong tokens could still agree."""
    strongest: list[float] = []

    def record(view: View) -> list[float]:
        strongest.extend(max(row.values()) for row in view.group_rows[-1])
        return full(view)

    text = distinct_tokens(50, seed=12)
    reference.generate(text[:20], 30, score=record, rules=Rules(16), forced=text[20:])
    assert np.median(strongest) > 3 / 16
    assert max(strongest) < 1 - 1e-6


def orthogonal_view(num_tokens: int) -> View:
    """A head that holds every position, with keys that have nothing in common."""
    keys = np.eye(num_tokens)
    queries = np.random.default_rng(0).normal(size=(num_tokens, 2, num_tokens))
    held = [Token(t, keys[t], keys[t]) for t in range(num_tokens)]
    return View(0, 0, held, list(queries), [], [])


def replace_keys(view: View, copies: dict[int, int]) -> View:
    """``{3: 1}`` gives position 3 the key of position 1."""
    held = [
        token._replace(key=view.held[copies.get(token.position, token.position)].key)
        for token in view.held
    ]
    return View(0, 0, held, view.queries, [], [])


def rank_of(position: int, scores: Sequence[float]) -> int:
    """How many tokens are evicted before this one; of equals the older goes first."""
    return sorted(range(len(scores)), key=lambda index: scores[index]).index(position)


def test_rkv_evicts_the_older_copies_of_a_key_first() -> None:
    view = orthogonal_view(24)
    score = partial(rkv, window=4, mix_lambda=0.0)
    before, after = score(view), score(replace_keys(view, {9: 3, 15: 3}))
    assert [rank_of(t, before) for t in (3, 9, 15)] == [3, 9, 15]
    assert [rank_of(t, after) for t in (3, 9, 15)] == [0, 1, 15]
    assert after[3] < after[9] < after[15] == after[16]


def test_rkv_spares_both_of_two_copies() -> None:
    """Each is the newest token similar to the other. So it is in the authors' code."""
    view = orthogonal_view(24)
    score = partial(rkv, window=4, mix_lambda=0.0)
    assert score(replace_keys(view, {9: 3})) == score(view)


def test_rkv_window_copies_count_against_the_prefix() -> None:
    view = orthogonal_view(24)
    after = rkv(replace_keys(view, {21: 3, 22: 3}), window=4, mix_lambda=0.0)
    assert rank_of(3, after) == 0
    assert after[20:] == [math.inf] * 4


def test_h2o_attention_is_conserved(reference: ReferenceLlama) -> None:
    """What held tokens have received, plus what the evicted had, is one per query."""
    last_scores: dict[tuple[int, int], dict[int, float]] = {}

    def record(view: View) -> list[float]:
        scores = h2o(view)
        # An evicted token is not seen again, so its last score stays.
        for token, value in zip(view.held, scores, strict=True):
            last_scores.setdefault((view.layer, view.head), {})[token.position] = value
        totals.append((sum(last_scores[view.layer, view.head].values()), view.incoming))
        return scores

    totals: list[tuple[float, int]] = []
    text = distinct_tokens(50, seed=13)
    trace = reference.generate(
        text[:20], 30, score=record, rules=Rules(14, recent=3), forced=text[20:]
    )
    assert len(totals) == 2 * 2 * 30
    assert all(len(positions) == 14 for heads in trace.kept[-1] for positions in heads)
    for total, num_queries in totals:
        assert total == pytest.approx(num_queries, abs=1e-9)


def test_rows_of_the_reference_cover_what_is_held_and_sum_to_one(
    reference: ReferenceLlama,
) -> None:
    rows: list[tuple[int, Row]] = []

    def record(view: View) -> list[float]:
        rows.extend((view.incoming - 1, row) for row in view.group_rows[-1])
        return h2o(view)

    text = distinct_tokens(40, seed=14)
    reference.generate(text[:20], 20, score=record, rules=Rules(10), forced=text[20:])
    for newest, row in rows:
        assert sum(row.values()) == pytest.approx(1, abs=1e-12)
        assert max(row) == newest
        assert len(row) == (20 if newest == 19 else 10)


def test_reference_refuses_to_evict_protected_tokens(reference: ReferenceLlama) -> None:
    with pytest.raises(ValueError, match="protected tokens do not fit"):
        reference.generate([1, 2, 3, 4], 2, score=full, rules=Rules(3, protect_prompt=True))
