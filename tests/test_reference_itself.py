"""The float64 reference against transformers and against what its policies must do."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from tests.reference.comparison import distinct_tokens, make_model
from tests.reference.llama import ReferenceLlama
from tests.reference.policies import Row, Rules, Token, View, full, h2o, rkv


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
    precise_model: LlamaForCausalLM, reference: ReferenceLlama
) -> None:
    prompt = distinct_tokens(10, seed=11)
    output = cast(Any, precise_model).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 10, dtype=torch.int64),
        past_key_values=DynamicCache(config=precise_model.config),
        max_new_tokens=30,
        do_sample=False,
    )
    assert isinstance(output, Tensor)
    trace = reference.generate(prompt, 30, score=full, rules=Rules(64))
    assert trace.tokens == output[0, 10:].tolist()


def test_attention_of_the_test_model_is_far_from_uniform(
    precise_model: LlamaForCausalLM, reference: ReferenceLlama
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
    return View(0, 0, held, list(queries), [], [], Rules(num_tokens), num_tokens)


def replace_keys(view: View, copies: dict[int, int]) -> View:
    """``{3: 1}`` gives position 3 the key of position 1."""
    held = [
        token._replace(key=view.held[copies.get(token.position, token.position)].key)
        for token in view.held
    ]
    return replace(view, held=held)


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
