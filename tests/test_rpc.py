"""Reasoning Path Compression as the paper has it: a cache that grows by a share of the text."""

from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache
from tests.compiling import CountingBackend, compiled
from tests.conftest import held
from tests.grids import slow_but
from tests.reference.comparison import (
    NUM_STEPS,
    assert_same_kept,
    assert_same_logits,
    distinct_tokens,
    run_library,
)
from tests.reference.llama import ReferenceLlama
from tests.reference.policies import Rules, Score, merging, rpc

OPTIONS: dict[str, Any] = {"window": 4, "kernel_size": 3, "compression": 3}


@pytest.mark.parametrize(
    ("name", "score"), [("rpc", rpc), ("rpc+merging", partial(merging, base=rpc))]
)
@pytest.mark.parametrize("protect_prompt", [False, True])
@pytest.mark.parametrize(
    ("budget", "interval"), slow_but([(40, 6), (22, 1)], [(40, 6), (40, 1), (22, 6), (22, 1)])
)
def test_growing_cache_keeps_the_tokens_of_the_reference(
    precise_model: LlamaForCausalLM,
    reference: ReferenceLlama,
    tolerance: float,
    budget: int,
    interval: int,
    protect_prompt: bool,
    name: str,
    score: Score,
) -> None:
    """At a budget that is never used up and at one that is."""
    lengths = [11, 6]
    texts = [distinct_tokens(length + NUM_STEPS, seed=60 + length) for length in lengths]
    pairs = list(zip(texts, lengths, strict=True))
    prompts, forced = [t[:n] for t, n in pairs], [t[n:] for t, n in pairs]
    rules = Rules(budget, interval, sinks=1, recent=4, protect_prompt=protect_prompt)
    _, watch = run_library(
        *(precise_model, prompts, NUM_STEPS),
        name=name,
        rules=rules,
        forced=forced,
        options=OPTIONS,
    )
    for row, (prompt, rest) in enumerate(zip(prompts, forced, strict=True)):
        own = partial(score, **OPTIONS)
        trace = reference.generate(prompt, NUM_STEPS, score=own, rules=rules, forced=rest)
        assert_same_kept(trace, watch, row)
        assert_same_logits(trace, watch, row, tolerance)


def test_a_third_of_the_generated_tokens_stays_beside_prompt_and_window(
    precise_model: LlamaForCausalLM,
) -> None:
    prompt, rules = 11, Rules(64, interval=6, recent=4)
    text = distinct_tokens(prompt + 60, seed=3)
    _, watch = run_library(
        *(precise_model, [text[:prompt]], 60),
        name="rpc",
        rules=rules,
        forced=[text[prompt:]],
        options=OPTIONS,
    )
    for step in range(1, 60):
        # Step 1 is the first that fed a token; rankings come before the tokens 0, 6, 12, ...
        generated = (step - 1) // 6 * 6
        ranked = min(max(0, generated - 4), generated // 3) + min(4, generated)
        for head in (head for layer in watch.kept(step, 0) for head in layer):
            assert set(range(prompt)) <= set(head)
            assert len(head) == prompt + ranked + step - generated


@pytest.mark.slow
def test_growing_cache_is_one_graph_for_rankings_and_one_for_the_other_steps(
    precise_model: Any,
) -> None:
    torch._dynamo.reset()
    backend = CountingBackend()
    ids = torch.tensor([distinct_tokens(11, seed=5)])
    texts, caches = [], []
    for config in (None, compiled(backend)):
        caches.append(CompressedCache("rpc", **asdict(Rules(40, 6, recent=4)), **OPTIONS))
        texts.append(
            precise_model.generate(
                ids,
                past_key_values=caches[-1],
                max_new_tokens=30,
                do_sample=False,
                compile_config=config,
            )
        )
    assert torch.equal(*texts)
    for layer in range(2):
        assert held(caches[0], layer) == held(caches[1], layer)
    assert len(held(caches[0], 0)[0]) < 40 == ids.shape[1] + 29
    assert backend.graphs <= 2
    torch._dynamo.reset()
