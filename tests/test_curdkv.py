"""What the reference does not try: a token that the model computed wrongly."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from compressed_cache import CompressedCache
from tests.conftest import distinct_tokens


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_broken_key_goes_first_and_the_others_score_as_without_it(
    model: LlamaForCausalLM, wrong: float
) -> None:
    cache = CompressedCache("curdkv", 20, local_window=4)
    model(distinct_tokens(1, 20), past_key_values=cache)
    layer = cache.layers[0]
    view, policy = layer.store.view(layer.store.held()), layer.store.bound.policy
    broken = view.positions == 9
    without = policy.scores(view._replace(positions=view.positions.masked_fill(broken, -1)))
    keys = view.keys.masked_fill(broken.unsqueeze(-1), wrong)
    scores = policy.scores(view._replace(keys=keys))
    torch.testing.assert_close(scores[~broken], without[~broken])
    assert (scores[broken] < scores[~broken].min()).all()
