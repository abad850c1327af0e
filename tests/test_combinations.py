"""Policies made of others."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from compressed_cache import POLICIES, CompressedCache
from compressed_cache.eval.catalogue.presses import PRESSES
from compressed_cache.policies import (
    MODIFIERS,
    canonical_name,
    make_policy,
    option_names,
    registry,
    split_name,
)
from compressed_cache.policies.base import Needs, Policy
from compressed_cache.policies.methods.adakv import AdaKV
from compressed_cache.policies.methods.caote import CAOTE
from compressed_cache.policies.methods.gkv import GKV
from compressed_cache.policies.methods.h2o import H2O
from compressed_cache.policies.methods.snapkv import SnapKV
from compressed_cache.policies.modifier import Modifier
from compressed_cache.policies.prefill_decode import PrefillDecode
from compressed_cache.policies.view import Slots
from tests.conftest import held
from tests.reference import policies as reference_policies
from tests.reference.comparison import (
    assert_same_kept,
    assert_same_logits,
    distinct_tokens,
    run_library,
)
from tests.reference.llama import ReferenceLlama
from tests.reference.policies import Rules, View

Score = Callable[[View], list[float]]
SMALL = {"window": 6, "kernel_size": 3}


def test_names_are_objects_written_short() -> None:
    assert make_policy("snapkv+caote", window=9) == CAOTE(base=SnapKV(window=9))
    phases = PrefillDecode(prompt=SnapKV(window=9), decoding=H2O())
    assert make_policy("snapkv/h2o", window=9) == phases
    assert make_policy("snapkv/h2o+caote", window=9) == CAOTE(base=phases)
    assert make_policy("snapkv/h2o+caote").label == "snapkv/h2o+caote"
    assert make_policy("snapkv/h2o", window=9).options == {
        "window": 9,
        "kernel_size": 5,
        "pool": "mean",
    }


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("SnapKV", "snapkv"),
        ("SnapKV/H2O+CAOTE", "snapkv/h2o+caote"),
        ("StreamingLLM", "streaming_llm"),
        ("RKVLSHPress", "rkv_lsh"),
        ("knormpress+KeyRerotationPress", "knorm+key_rerotation"),
    ],
)
def test_names_are_taken_in_any_case_and_by_class(written: str, name: str) -> None:
    assert canonical_name(written) == name
    assert split_name(written) == split_name(name)
    assert option_names(written) == option_names(name)
    assert make_policy(written) == make_policy(name)


def test_a_press_is_understood_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    registry._note_presses.cache_clear()
    for _ in range(2):
        assert CompressedCache("SnapKVPress+AdaKVPress", 64).policy.label == "snapkv+adakv"
    (note,) = caplog.messages
    assert note == (
        "policy 'SnapKVPress+AdaKVPress' is taken for 'snapkv+adakv', with the defaults of "
        "compressed-cache, not those of the press: `compressed-cache presses SnapKVPress` tells "
        "which options make it the press"
    )
    caplog.clear()
    CompressedCache("SnapKV", 64)
    assert not caplog.messages


def test_presses_understood_by_name_are_those_of_the_table() -> None:
    for press in PRESSES:
        name = canonical_name(press.name)
        if name == press.name:
            with pytest.raises(ValueError, match=rf"`compressed-cache presses {name}` tells"):
                make_policy(name)
        else:
            assert name in re.split(r"\W", press.here), press


def test_no_option_of_a_modifier_is_one_of_another_part() -> None:
    taken = {option for policy in POLICIES for option in option_names(policy)}
    for modifier in MODIFIERS:
        own = option_names(f"h2o+{modifier}")
        assert not taken & set(own), modifier
        taken |= set(own)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: make_policy("caote"), ValueError, "'caote' is a modifier of.*'h2o\\+caote'"),
        (lambda: make_policy("AdaKVPress"), ValueError, "policy 'AdaKVPress' is a modifier of"),
        (lambda: make_policy("snapkv+h2o"), ValueError, "second scorer, 'h2o'.*Write '/'"),
        (lambda: make_policy("h2o/tova/rkv"), ValueError, "has 3 policies with '/'"),
        (lambda: make_policy("h2o+coate"), ValueError, "unknown modifier.*Did you mean 'caote'"),
        (lambda: make_policy("h2o/snapvk"), ValueError, "unknown policy.*Did you mean 'snapkv'"),
        (lambda: make_policy("full+caote"), ValueError, "caote changes.*full evicts none"),
        (lambda: make_policy("h2o/full"), ValueError, "must evict in both phases, full never"),
        (lambda: make_policy("h2o+caote+caote"), ValueError, "caote must be given once"),
        (lambda: make_policy("knorm+caote"), ValueError, "whose scores are attention.*'knorm'"),
        (lambda: make_policy("h2o/tova"), ValueError, "would add up attention in two ways"),
        (lambda: make_policy("snapkv/tova"), ValueError, "the same in all heads in the other"),
        (lambda: make_policy("h2o+chunk", block_length=0), ValueError, "block_length must be >= 1"),
        (lambda: make_policy("h2o+chunk+adakv"), ValueError, "ranks blocks of a prompt on their"),
        (lambda: make_policy("h2o+adakv+chunk"), ValueError, "Leave one of the two out"),
        (lambda: make_policy("h2o+caote", window=3), TypeError, "unknown option 'window'"),
        (lambda: CAOTE(base=3), TypeError, "base must be a Policy, got 3"),  # pyright: ignore
        (
            lambda: PrefillDecode(prompt=SnapKV(window=3), decoding=SnapKV(window=4)),
            ValueError,
            "window must be the same in both parts of 'snapkv/snapkv', got 3 and 4",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    make: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize(
    ("prompt", "decoding"),
    [("snapkv", "h2o"), ("h2o", "snapkv"), ("rpc", "tova"), ("rkv", "snapkv"), ("knorm", "rkv")],
)
def test_each_phase_has_its_own_scorer(
    precise_model: LlamaForCausalLM,
    reference: ReferenceLlama,
    tolerance: float,
    prompt: str,
    decoding: str,
    interval: int,
) -> None:
    length, steps = 19, 30
    text = distinct_tokens(length + steps, seed=5)
    # What rkv keeps by itself, it keeps in both phases.
    rules = Rules(14, interval, sinks=1, recent=6)
    name = f"{prompt}/{decoding}"
    own = {key: value for key, value in SMALL.items() if key in option_names(name)}
    _, watch = run_library(
        precise_model,
        [text[:length]],
        steps,
        name=name,
        rules=rules,
        forced=[text[length:]],
        options=own,
    )

    def score_of(policy: str) -> Score:
        fields = {key: value for key, value in own.items() if key in option_names(policy)}
        return partial(reference_policies.POLICIES[policy], **fields)

    first, then = score_of(prompt), score_of(decoding)

    def score(view: View) -> list[float]:
        return first(view) if len(view.held) > rules.budget else then(view)

    trace = reference.generate(text[:length], steps, score=score, rules=rules, forced=text[length:])
    assert_same_kept(trace, watch, 0)
    assert_same_logits(trace, watch, 0, tolerance)


@dataclass(frozen=True, kw_only=True)
class Notes(Policy):
    """Notes positions and multiples of them, and says whether it is shown its own."""

    width: ClassVar[int]

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.width, notes=self.width)

    def note(self, tokens: Slots) -> torch.Tensor:
        return tokens.positions.float()[..., None] * self._factors

    def scores(self, slots: Slots) -> torch.Tensor:
        held = slots.positions >= 0
        expected = slots.positions.float()[..., None] * self._factors
        assert torch.equal(slots.notes[held], expected[held])
        newest = slots.next_position[:, None] - 1 - torch.arange(self.width)
        assert torch.equal(slots.query_positions.sort(dim=1, descending=True).values, newest)
        assert slots.queries.shape[3] == self.width
        return slots.positions.float()

    @property
    def _factors(self) -> torch.Tensor:
        return torch.arange(1, 1 + self.width).float() * self.width


class Two(Notes):
    width = 2


class Three(Notes):
    width = 3


@pytest.mark.parametrize(("prompt", "decoding"), [(Two, Three), (Three, Two)])
def test_each_part_is_shown_its_own_notes_and_as_many_queries_as_it_asks_for(
    precise_model: LlamaForCausalLM, prompt: type[Policy], decoding: type[Policy]
) -> None:
    cache = CompressedCache(PrefillDecode(prompt=prompt(), decoding=decoding()), 12)
    ids = torch.tensor([distinct_tokens(24, seed=7)])
    with torch.no_grad():
        for part in ids.split([18, *[1] * 6], dim=1):
            precise_model(part, past_key_values=cache)
    assert cache.evicted_tokens == 12


@dataclass(frozen=True, kw_only=True)
class DropsAll(H2O):
    drops: ClassVar[bool] = True

    def dropped(self, slots: Slots, scores: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(scores, dtype=torch.bool)


def test_a_policy_cannot_drop_what_is_protected(precise_model: LlamaForCausalLM) -> None:
    cache = CompressedCache(DropsAll(), 16, sinks=2, recent=4)
    ids = torch.tensor([distinct_tokens(24, seed=8)])
    with torch.no_grad():
        for part in ids.split([12, *[1] * 12], dim=1):
            precise_model(part, past_key_values=cache)
    assert held(cache, 0) == [[0, 1, *range(19, 24)]] * 2


class KeepsAll(DropsAll):
    needs = Needs()

    def scores(self, slots: Slots) -> Tensor:
        return torch.full(slots.positions.shape, torch.inf)


class AlwaysKeepsAll(KeepsAll):
    drops: ClassVar[bool] = False


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("budget", [10, [[10, 12], [11, 10]]], ids=["slots", "pool"])
def test_what_a_policy_always_keeps_goes_before_what_is_protected(
    precise_model: LlamaForCausalLM, budget: Any, interval: int
) -> None:
    options = {"sinks": 2, "recent": 4, "interval": interval, "protect_prompt": False}
    cache = CompressedCache(AlwaysKeepsAll(), budget, **options)
    ids = torch.tensor([distinct_tokens(40, seed=8)])
    with torch.no_grad():
        for part in ids.split([20, *[1] * 20], dim=1):
            precise_model(part, past_key_values=cache)
            read = cache.get_seq_length()
            for head in held(cache, 0):
                assert {0, 1, *range(read - 5, read)} <= set(head)


def test_what_a_policy_always_keeps_is_not_dropped(precise_model: LlamaForCausalLM) -> None:
    cache = CompressedCache(KeepsAll(), 16, sinks=2, recent=4)
    ids = torch.tensor([distinct_tokens(24, seed=8)])
    with torch.no_grad():
        for part in ids.split([12, *[1] * 12], dim=1):
            precise_model(part, past_key_values=cache)
    assert held(cache, 0) == [[0, 1, *range(10, 24)]] * 2


def test_a_cache_of_a_combination_goes_on_from_a_file(
    precise_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    cache = CompressedCache("snapkv/h2o+caote", 14, window=5)
    text = torch.tensor([distinct_tokens(30, seed=6)])
    with torch.no_grad():
        precise_model(text[:, :20], past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        loaded = CompressedCache.load(tmp_path / "cache.safetensors")
        assert loaded.policy == cache.policy
        for token in range(20, 30):
            step = text[:, token : token + 1]
            expected = precise_model(step, past_key_values=cache).logits
            assert torch.equal(precise_model(step, past_key_values=loaded).logits, expected)


@dataclass(frozen=True, kw_only=True)
class Noting(Modifier):
    """Notes the position of each token, which nobody revises, after what its base notes."""

    name: ClassVar[str] = "noting"

    @property
    def needs(self) -> Needs:
        return Needs(notes=1)

    def note(self, tokens: Slots) -> Tensor:
        return tokens.positions.unsqueeze(-1).float()

    def scores(self, slots: Slots) -> Tensor:
        held = slots.positions >= 0
        assert (slots.notes[..., -1] == slots.positions)[held].all()
        return super().scores(slots)


def test_scores_of_a_modifier_are_attention_only_where_it_says_so() -> None:
    class Silent(Modifier):
        def scores(self, slots: Slots) -> Tensor:
            return super().scores(slots)

    class Spoken(Silent):
        scores_attention = True

    class Quiet(Modifier):
        pass

    assert AdaKV(base=Spoken(base=H2O())).base.label == "h2o+Spoken"
    assert AdaKV(base=Quiet(base=H2O())).base.label == "h2o+Quiet"
    with pytest.raises(ValueError, match=r"whose scores are attention.* got 'h2o.Silent'"):
        AdaKV(base=Silent(base=H2O()))


def test_what_asks_for_attention_is_not_given_something_else() -> None:
    with pytest.raises(ValueError, match="whose scores are attention"):
        make_policy("h2o+duo_attention+criticalkv")


@pytest.mark.parametrize(
    ("make", "same"),
    [
        (lambda: Noting(base=GKV(window=4)), lambda: GKV(window=4)),
        (
            lambda: Noting(base=PrefillDecode(prompt=GKV(window=4), decoding=GKV(window=4))),
            lambda: make_policy("gkv/gkv", window=4),
        ),
        (
            lambda: (lambda one: PrefillDecode(prompt=one, decoding=one))(GKV(window=4)),
            lambda: make_policy("gkv/gkv", window=4),
        ),
    ],
)
def test_each_part_has_notes_of_its_own(
    model: LlamaForCausalLM, make: Callable[[], Policy], same: Callable[[], Policy]
) -> None:
    ids = torch.stack([torch.arange(40) + 3, torch.arange(40) + 50])
    caches = [CompressedCache(policy, 16) for policy in (make(), same())]
    texts = [
        model.generate(ids, past_key_values=cache, max_new_tokens=24, do_sample=False)
        for cache in caches
    ]
    assert torch.equal(*texts)
    for layer in range(2):
        assert held(caches[0], layer) == held(caches[1], layer)
