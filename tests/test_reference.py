"""The library against the independent float64 reference of `tests/reference`."""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache
from tests.grids import alternating, pairwise, slow_but
from tests.kinds import KINDS, QUICK, SMALL
from tests.reference.comparison import (
    NAMES,
    NUM_STEPS,
    OPTIONS,
    Watch,
    assert_agree,
    assert_same_kept,
    assert_same_logits,
    distinct_tokens,
    make_model,
    run_library,
)
from tests.reference.llama import ReferenceLlama, Trace
from tests.reference.policies import POLICIES, Rules, View, full, snapkv

# And one with each modifier.
MODIFIED = {name.partition("+")[2]: name for name in NAMES if "+" in name}
OF_EACH_KIND = [*(name for name in NAMES if name in KINDS), *MODIFIED.values()]


def cases() -> list[Any]:
    """Every policy with budgets below and above the prompt, each protection and two intervals,
    any two of these together."""
    budgets, protected = [(14, False), (30, False), (30, True)], [(0, 0), (2, 4)]
    parameters = []
    for name in NAMES:
        for number, ((budget, protect_prompt), (sinks, recent), interval) in enumerate(
            pairwise(budgets, protected, [1, 3])
        ):
            rules = Rules(budget, interval, sinks, recent, protect_prompt)
            label = f"{name}-b{budget}-s{sinks}-r{recent}-i{interval}"
            label += "-prompt" * protect_prompt
            is_quick = number < (2 if name in QUICK else 1) and name in OF_EACH_KIND
            marks = [] if is_quick else pytest.mark.slow
            parameters.append(pytest.param(name, rules, id=label, marks=marks))
    return parameters


@pytest.mark.parametrize(("name", "rules"), cases())
def test_library_keeps_the_tokens_of_the_reference(
    precise_model: LlamaForCausalLM,
    reference: ReferenceLlama,
    tolerance: float,
    name: str,
    rules: Rules,
) -> None:
    """Each row of a batch with padding keeps what it would keep alone."""
    # One prompt over the smaller budget, one that fills it after two steps, one much shorter.
    lengths = [21, 12, 5]
    texts = [distinct_tokens(length + NUM_STEPS, seed=20 + length) for length in lengths]
    expected = rules
    if name == "rkv+chunk":
        # The library protects its window, in whatever block; its scores keep that of each block.
        expected = replace(rules, recent=max(rules.recent, OPTIONS[name]["window"]))
    assert_agree(
        *(precise_model, reference, texts, lengths),
        name=name,
        rules=rules,
        expected_rules=expected,
        tolerance=tolerance,
    )


@pytest.mark.parametrize(
    ("name", "protection"),
    slow_but(QUICK, alternating(NAMES, [(12, False), (22, True)])),
    ids=str,
)
def test_an_interval_longer_than_what_is_unprotected_goes_on_with_the_oldest(
    precise_model: LlamaForCausalLM,
    reference: ReferenceLlama,
    tolerance: float,
    name: str,
    protection: tuple[int, bool],
) -> None:
    budget, protect_prompt = protection
    lengths = [15, 11]
    texts = [distinct_tokens(length + NUM_STEPS, seed=40 + length) for length in lengths]
    rules = Rules(budget, 13, sinks=2, recent=6, protect_prompt=protect_prompt)
    assert_agree(
        precise_model, reference, texts, lengths, name=name, rules=rules, tolerance=tolerance
    )


# With the options of the papers; not those whose scores tie where the model repeats a token.
@pytest.mark.parametrize(
    "name",
    slow_but(
        QUICK,
        (name for name in NAMES if name not in ("knorm", "learned_gate")),
    ),
)
def test_greedy_text_is_that_of_the_reference(
    precise_model: LlamaForCausalLM, reference: ReferenceLlama, tolerance: float, name: str
) -> None:
    prompts = [distinct_tokens(25, seed=3), distinct_tokens(17, seed=4)]
    rules = Rules(20, interval=1, sinks=2, recent=5)
    options = SMALL.get(name, {})
    score = partial(POLICIES[name], **options)
    tokens, watch = run_library(
        precise_model, prompts, NUM_STEPS, name=name, rules=rules, options=options
    )
    for row, prompt in enumerate(prompts):
        trace = reference.generate(prompt, NUM_STEPS, score=score, rules=rules)
        assert tokens[row].tolist() == trace.tokens
        assert_same_kept(trace, watch, row)


@pytest.mark.parametrize("name", slow_but(QUICK, OF_EACH_KIND))
def test_float32_model_keeps_the_tokens_of_the_reference(
    reference: ReferenceLlama, tolerance: float, name: str
) -> None:
    text = distinct_tokens(19 + NUM_STEPS, seed=17)
    rules = Rules(14, interval=3, sinks=2, recent=4)
    model = make_model(torch.float32)
    assert_agree(model, reference, [text], [19], name=name, rules=rules, tolerance=tolerance)


@pytest.mark.parametrize(
    ("name", "num_key_value_heads"), slow_but(QUICK, alternating(NAMES, [1, 4]))
)
def test_any_grouping_of_query_heads_keeps_the_tokens_of_the_reference(
    name: str, num_key_value_heads: int, tolerance: float
) -> None:
    model = make_model(seed=2, num_key_value_heads=num_key_value_heads)
    text = distinct_tokens(19 + NUM_STEPS, seed=15)
    rules = Rules(16, interval=2, sinks=1, recent=5)
    reference = ReferenceLlama(model)
    assert_agree(model, reference, [text], [19], name=name, rules=rules, tolerance=tolerance)


@pytest.mark.parametrize("interval", [1, 3])
def test_snapkv_window_may_be_longer_than_what_is_held(
    precise_model: LlamaForCausalLM, reference: ReferenceLlama, tolerance: float, interval: int
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
        precise_model, [text[:30]], NUM_STEPS, name="snapkv", rules=rules, forced=[text[30:]]
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


@pytest.mark.parametrize("name", slow_but(QUICK, OF_EACH_KIND))
def test_forward_calls_without_generate_keep_the_same_tokens(
    precise_model: LlamaForCausalLM, reference: ReferenceLlama, tolerance: float, name: str
) -> None:
    text = distinct_tokens(19 + NUM_STEPS, seed=6)
    rules = Rules(14, interval=3, sinks=2, recent=4)
    cache = CompressedCache(name, **asdict(rules), **OPTIONS[name])
    watch = Watch(cache, None)
    with torch.no_grad():
        for step in range(NUM_STEPS):
            fed = text[:19] if step == 0 else text[18 + step : 19 + step]
            output = precise_model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
            watch(torch.empty(0), output.logits[:, -1])
    score = partial(POLICIES[name], **OPTIONS[name])
    trace = reference.generate(text[:19], NUM_STEPS, score=score, rules=rules, forced=text[19:])
    assert_same_kept(trace, watch, 0)
    assert_same_logits(trace, watch, 0, tolerance)


UNREACHED = Rules(64, sinks=0, recent=0)
SHORT = [distinct_tokens(12, seed=7), distinct_tokens(8, seed=8)]


@pytest.fixture(scope="session")
def full_traces(reference: ReferenceLlama) -> list[Trace]:
    """Of each short prompt, once for all policies."""
    return [reference.generate(prompt, 20, score=full, rules=UNREACHED) for prompt in SHORT]


@pytest.mark.parametrize("name", slow_but(QUICK, (*NAMES, "full", "random")))
def test_budget_that_is_never_reached_gives_the_logits_of_the_full_cache(
    precise_model: LlamaForCausalLM, full_traces: list[Trace], tolerance: float, name: str
) -> None:
    tokens, watch = run_library(precise_model, SHORT, 20, name=name, rules=UNREACHED)
    for row, trace in enumerate(full_traces):
        assert tokens[row].tolist() == trace.tokens
        assert_same_kept(trace, watch, row)
        assert_same_logits(trace, watch, row, tolerance)


@pytest.mark.parametrize("protect_prompt", [False, True])
def test_random_evicts_at_will_but_never_protected_tokens(
    precise_model: LlamaForCausalLM,
    reference: ReferenceLlama,
    tolerance: float,
    protect_prompt: bool,
) -> None:
    """Which tokens go is not checked; that attention then covers just the others is."""
    num_prompt, num_steps = 12, 40
    text = distinct_tokens(num_prompt + num_steps, seed=9)
    rules = Rules(20, interval=1, sinks=2, recent=4, protect_prompt=protect_prompt)
    _, watch = run_library(
        precise_model,
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
                assert len(positions) == len(set(positions)) == min(newest + 1, 20)
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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("learned_gate", {}),
        ("learned_gate", {"activation": "relu"}),
        ("learned_gate", {"decay": True}),
        ("morphkv", {"window": 1, "fuse": "max"}),
        ("morphkv", {"window": 5, "fuse": "max"}),
        ("lagged_attention", {"window": 1, "fuse": "max"}),
        ("lagged_attention", {"window": 4, "fuse": "max"}),
        ("snapkv", {"window": 4, "kernel_size": 7, "pool": "mean"}),
        ("snapkv", {"window": 7, "kernel_size": 5, "pool": "max"}),
        ("rpc", {"window": 4, "kernel_size": 5, "pool": "max"}),
        ("raas", {"share": 1.0}),
        ("random", {"redraw": True}),
        ("curdkv", {"rank": 0, "local_window": 5}),
        ("curdkv", {"local_window": 0}),
        ("vase", {"window": 3, "large_share": 0.0, "kernel_size": 1}),
        ("vase", {"window": 20, "large_share": 1.0}),
    ],
)
@pytest.mark.parametrize("interval", slow_but((3,), (1, 3)))
def test_other_options_keep_the_tokens_of_the_reference(
    precise_model: LlamaForCausalLM,
    reference: ReferenceLlama,
    name: str,
    options: dict[str, Any],
    interval: int,
) -> None:
    text = distinct_tokens(25 + NUM_STEPS, seed=31)
    rules = Rules(14, interval, sinks=1, recent=4)
    _, watch = run_library(
        precise_model,
        [text[:25]],
        NUM_STEPS,
        name=name,
        rules=rules,
        forced=[text[25:]],
        options=options,
    )
    score = partial(POLICIES[name], **options)
    trace = reference.generate(text[:25], NUM_STEPS, score=score, rules=rules, forced=text[25:])
    assert_same_kept(trace, watch, 0)


@pytest.mark.parametrize("chunk", [5, 40])
def test_observed_attention_is_what_h2o_adds_up_over_age(
    precise_model: LlamaForCausalLM, chunk: int
) -> None:
    """With a budget for everything, so that both hold the same; the weights are the model's own."""
    num_tokens = 40
    ids = torch.tensor([distinct_tokens(num_tokens, seed=32)])
    caches = [CompressedCache(name, 64) for name in ("observed_attention", "h2o")]
    for cache in caches:
        for start in range(0, num_tokens, chunk):
            precise_model(ids[:, start : start + chunk], past_key_values=cache)
    implementation = precise_model.config._attn_implementation
    precise_model.set_attn_implementation("eager")
    weights = precise_model(ids, output_attentions=True).attentions
    precise_model.set_attn_implementation(implementation)
    age = num_tokens - torch.arange(num_tokens)
    for mean, total, rows in zip(caches[0].layers, caches[1].layers, weights, strict=True):
        order = mean.positions.argsort(dim=-1)[:, :, -num_tokens:]
        scores = mean.store.scores(mean.store.view(mean.held())).gather(-1, order)
        expected = rows.unflatten(1, (2, 2)).mean(dim=2).sum(dim=2) / age
        torch.testing.assert_close(scores, expected.float())
        torch.testing.assert_close(
            scores, total.store.tokens.attention_state.gather(-1, order) / age
        )
