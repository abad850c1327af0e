"""Segments, their quotas and what stays of them: by hand, and over many random heads."""

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compressed_cache.ops import eviction
from compressed_cache.ops.attention import LogitTransform
from compressed_cache.policies import Slots, make_policy
from tests.grids import slow_but
from tests.reference.policies import Rules, Token, View, rank
from tests.reference.policies.keys import knorm
from tests.reference.policies.segments import ams

HEADS, GROUPS, DIM = 3, 2, 6


def _view(positions: Tensor, keys: Tensor, notes: Tensor, **changes: Any) -> Slots:
    rows, heads = positions.shape[:2]
    nothing = torch.zeros(rows, dtype=torch.int64)
    usual: dict[str, Any] = dict(
        values=keys,
        next_position=positions.amax(dim=(1, 2)) + 1,
        queries=torch.zeros(rows, heads, 1, 0, keys.shape[3]),
        query_positions=torch.zeros(rows, 0, dtype=torch.int64),
        protected_prefix=nothing,
        recent=0,
        budget=positions.shape[2],
        is_prompt=False,
    )
    return Slots(
        keys=keys,
        positions=positions,
        notes=notes,
        attention_state=torch.zeros(rows, heads, 0),
        layer=0,
        first_head=0,
        transform=LogitTransform(DIM**-0.5),
        query_state={},
        prompt_length=nothing,
        constants={},
        **{**usual, **changes},
    )


# Of 32 parts of all mass; a multiple of a quarter is reached at tokens 2, 4 and 7.
MASS = [1, 1, 10, 2, 3, 3, 2, 3, 2, 2, 2, 1]
# Segments 0 to 3, 4 to 6, 7 to 10 and 11: the third is split where it has 4 tokens, the first is
# too short and takes in the second. Their masses are 14, 8, 9 and 1.
VALUES = [1, 2, 3, 4, 32, 31, 30, 12, 11, 10, 9, 0]


@pytest.mark.parametrize(
    ("kept", "least", "expected"),
    [
        # One each, and of the other four 1.75, 1, 1.125 and 0.125 more.
        (8, 1, [1, 2, 3, 4, 5, 7, 8, 11]),
        # Of nine 3.94, 2.25, 2.53 and 0.28: 4, 2, 3 and 0.
        (9, 0, [0, 1, 2, 3, 4, 5, 7, 8, 9]),
        # 2, 2, 2 and 1 are two too many, which the first and the second give up.
        (5, 2, [3, 4, 7, 8, 11]),
        # Nothing is left to take from one each, so their scores decide.
        (3, 2, [3, 4, 7]),
        # No segment has room for what is due to it; the first that has room takes the rest.
        (11, 3, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11]),
    ],
)
@pytest.mark.parametrize("padding", [0, 5])
def test_a_text_of_twelve_tokens(kept: int, least: int, expected: list[int], padding: int) -> None:
    policy = make_policy(
        "knorm+ams",
        segment_mass=0.25,
        min_segment_length=3,
        max_segment_length=4,
        min_keep_per_segment=least,
    )
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(12 + padding, generator=generator)
    positions = torch.cat([torch.arange(12), torch.full((padding,), -1)])[order]
    # Long keys go first. What is left in an empty slot counts for nothing.
    keys = torch.tensor([[40.0 - value] for value in VALUES] + [[0.0]] * padding)[order]
    notes = torch.tensor([[0.0, mass / 32] for mass in MASS] + [[9.0, 9.0]] * padding)[order]
    held = 12 + padding
    view = _view(positions[None, None], keys[None, None], notes[None, None], interval=held - kept)
    scores = policy.scores(view).masked_fill(view.positions < 0, -torch.inf)
    best = eviction.keep_best(scores, view.positions, count=kept)
    assert view.positions.gather(-1, best)[0, 0].tolist() == expected


def test_attention_of_another_head_is_what_the_window_counts_as() -> None:
    """And of no other row."""
    policy: Any = make_policy("knorm+ams", mass_window=2, mass_kernel_size=1, mix_beta=1.0)
    keys = torch.zeros(2, 2, 6, DIM)
    # The second head attends to its first token, the second row to its first token in both.
    keys[0, 1, 0] = keys[1, :, 0] = 9.0
    view = _view(
        torch.arange(6).expand(2, 2, 6),
        keys,
        torch.zeros(2, 2, 6, 2),
        queries=torch.ones(2, 2, 1, 2, DIM),
        query_positions=torch.tensor([[4, 5], [5, 4]]),
        interval=1,
    )
    mass = policy.revise(view)[..., 1]
    torch.testing.assert_close(mass.sum(dim=-1), torch.ones(2, 2))
    even = (1 / 5 + 1 / 6) / 2
    total = 4 * even + 2
    torch.testing.assert_close(mass[0, 0], torch.tensor([even] * 4 + [1.0] * 2) / total)
    alone = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0]) / 3
    torch.testing.assert_close(mass[0, 1], alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(mass[1], alone.expand(2, 6), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mix_beta", [1.0, 0.6], ids=["no credit", "credit"])
@pytest.mark.parametrize("interval", slow_but((8,), (1, 8, 64)))
def test_heads_keep_what_the_reference_keeps(interval: int, mix_beta: float) -> None:
    """All of them: rows with padding, in three rankings each, of which later ones know earlier."""
    found = [equal for seed in range(12) for equal in _rankings(seed, interval, mix_beta)]
    assert (sum(found), len(found)) == (216, 216)


def _rankings(seed: int, interval: int, mix_beta: float) -> Iterator[bool]:
    """Whether each head of two rows keeps what it should, ranking by ranking."""
    draw, numbers = random.Random(seed), np.random.default_rng(seed)
    slots = interval + draw.choice([24, 40, 71])
    window = draw.choice([1, 4, 9])
    rules = Rules(slots, interval, sinks=draw.choice([0, 3]), recent=draw.choice([0, 6]))
    options = {
        "mass_window": window,
        "mass_kernel_size": draw.choice([1, 3, 5]),
        "segment_mass": draw.choice([0.03, 0.11, 0.4]),
        "min_segment_length": draw.choice([1, 4, 9]),
        "max_segment_length": draw.choice([9, 17, 1024]),
        "min_keep_per_segment": draw.choice([0, 2, 7]),
        "credit_decay": draw.choice([0.0, 0.8]),
        "mix_beta": mix_beta,
    }
    policy: Any = make_policy("knorm+ams", **options)
    score = partial(ams, base=knorm, **options)
    shape = (2, HEADS, slots + 2 * interval)
    keys = numbers.normal(size=(*shape, DIM)).astype(np.float32)
    queries = 2 * numbers.normal(size=(*shape, GROUPS, DIM)).astype(np.float32)
    notes = np.zeros((*shape, 2), np.float32)
    heads = [(row, head) for row in range(2) for head in range(HEADS)]
    # The second row has slots that are empty.
    nexts = np.array([slots, slots - draw.randrange(interval)])
    held = {one: list(range(nexts[one[0]])) for one in heads}
    memory: dict[tuple[int, int], dict[int, float]] = {one: {} for one in heads}
    for _ in range(3):
        positions = np.full((2, HEADS, slots), -1)
        for one in heads:
            positions[one][draw.sample(range(slots), len(held[one]))] = held[one]
        # What is in an empty slot is that of the newest token.
        row, head = np.ogrid[:2, :HEADS]
        index = row[..., None], head[..., None], positions
        last = nexts[:, None] - window + np.arange(window)
        view = _view(
            torch.tensor(positions),
            torch.tensor(keys[index]),
            torch.tensor(notes[index]),
            next_position=torch.tensor(nexts),
            queries=torch.tensor(queries[index[0], index[1], last[:, None]]).transpose(2, 3),
            query_positions=torch.tensor(last),
            protected_prefix=torch.full((2,), rules.sinks),
            recent=rules.recent,
            interval=interval,
        )
        view = view._replace(notes=policy.revise(view))
        notes[index] = view.notes.numpy()
        scores = eviction.protect(
            policy.scores(view),
            view.positions,
            next_position=view.next_position,
            protected_prefix=view.protected_prefix,
            recent=rules.recent,
        )
        victims = eviction.next_victims(
            scores,
            view.positions,
            next_position=view.next_position,
            protected_prefix=view.protected_prefix,
            count=interval,
        )
        left = view.positions.scatter(-1, victims, -1)
        views = {
            one: View(
                layer=0,
                head=one[1],
                held=[Token(p, keys[one][p].astype(float), np.zeros(1)) for p in held[one]],
                queries=[*queries[one][: nexts[one[0]]].astype(float)],
                group_rows=[],
                layer_rows=[],
                rules=rules,
                prompt_length=0,
                memory=memory[one],
            )
            for one in heads
        }
        for one in heads:
            layer = [views[other] for other in heads if other[0] == one[0]]
            view_of_head = replace(views[one], layer_views=layer)
            worst = rank(view_of_head, score, rules, prompt_length=0).positions
            gone = set(worst[: len(held[one]) + interval - slots])
            held[one] = [position for position in held[one] if position not in gone]
            yield sorted(p for p in left[one].tolist() if p >= 0) == held[one]
            held[one] += range(nexts[one[0]], nexts[one[0]] + interval)
        nexts += interval


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mass_window": 0}, "mass_window must be >= 1, got 0"),
        ({"mass_kernel_size": 4}, "mass_kernel_size must be odd and >= 1, got 4"),
        ({"segment_mass": 0.0}, "segment_mass must be above 0 and up to 1, got 0.0"),
        ({"segment_mass": 1.5}, "segment_mass must be above 0 and up to 1, got 1.5"),
        ({"min_segment_length": 0}, r"from 1 to max_segment_length \(1024\), got 0"),
        ({"max_segment_length": 31}, r"from 1 to max_segment_length \(31\), got 32"),
        ({"min_keep_per_segment": -1}, "min_keep_per_segment must be >= 0, got -1"),
        ({"credit_decay": 1.0}, "credit_decay must be from 0 to below 1, got 1.0"),
        ({"mix_beta": 1.1}, "mix_beta must be from 0 to 1, got 1.1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy("snapkv+ams", **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("snapkv+chunk+ams", "ams must know how many tokens a head keeps.*length of a block"),
        ("snapkv+ams+chunk", "ams must know how many tokens a head keeps.*Leave one of the two"),
        ("snapkv+adakv+ams", "ams must know how many tokens a head keeps.*told by scores"),
        ("snapkv+ams+adakv", "ams must know how many tokens a head keeps"),
        ("snapkv+ams+caote", "caote needs a policy whose scores are attention"),
        ("tova+ams", r"'tova' decides for all heads at once\. Use another policy\.$"),
        ("rpc+ams", r"'rpc' decides for all heads at once\. Use another policy\.$"),
        ("snapkv+chunkkv+ams", "all heads at once. Write 'ams' before the modifier that does so"),
    ],
)
def test_what_does_not_tell_how_many_tokens_stay_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(name)
