"""Runs the library and the reference side by side and compares what they keep."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from compressed_cache import CompressedCache
from tests.reference.llama import Kept, ReferenceLlama, Trace
from tests.reference.policies import POLICIES, Rules, Score

VOCABULARY = 160
NUM_STEPS = 30
SEGMENTS: dict[str, Any] = {
    "mass_window": 3,
    "mass_kernel_size": 3,
    "segment_mass": 0.15,
    "min_segment_length": 3,
    "max_segment_length": 5,
    "min_keep_per_segment": 2,
}
# Small windows, so that they end, wrap and are pooled many times in a short text.
OPTIONS: dict[str, dict[str, Any]] = {
    "curdkv": {"rank": 6, "local_window": 4, "num_sinks": 1, "seed": 7},
    "finch": {"window": 5},
    "gkv": {"window": 4, "kernel_size": 3, "similarity_threshold": 0.3},
    "h2o": {},
    "keydiff": {},
    "knorm": {},
    "morphkv": {"window": 3, "fuse": "sum"},
    "observed_attention": {},
    "random": {"seed": 3},
    "random_prompt": {"redraw": False},
    "raas": {"share": 0.25},
    "lagged_attention": {"window": 3, "fuse": "sum"},
    "learned_gate": {"decay": True, "activation": "silu"},
    "lagkv": {"lag": 3, "num_sinks": 2},
    "expected_attention": {"n_future": 20, "n_sinks": 1, "epsilon": 0.01},
    "expected_attention+caote": {"n_future": 20, "n_sinks": 1, "use_vnorm": False},
    "expected_attention+criticalkv": {"n_future": 20, "n_sinks": 2, "use_covariance": False},
    "expected_attention+chunk": {"n_future": 20, "n_sinks": 2, "block_length": 7},
    "qfilter": {},
    "rkv": {"window": 4, "kernel_size": 3, "mix_lambda": 0.4, "similarity_threshold": 0.3},
    # Few keys share a code of seven bits, and without pooling equal scores are rare.
    "rkv_lsh": {"window": 4, "kernel_size": 1, "mix_lambda": 0.4, "bits": 7, "seed": 3},
    "rpc": {"window": 4, "kernel_size": 3},
    "snapkv": {"window": 6, "kernel_size": 3, "pool": "max"},
    "streaming_llm": {},
    "tova": {},
    "h2o+caote": {},
    "snapkv+caote": {"window": 6, "kernel_size": 3},
    "observed_attention+caote": {},
    "observed_attention+criticalkv": {"first_stage_ratio": 0.3},
    "vase": {"window": 6, "kernel_size": 3, "seed": 5},
    "vase_dkv": {"rank": 6, "seed": 7},
    "triattention": {"num_offsets": 5},
    "h2o+key_rerotation": {},
    "snapkv+key_rerotation": {"window": 6, "kernel_size": 3},
    "streaming_llm+key_rerotation": {},
    "h2o+think": {"channel_ratio": 0.3, "think_recent": 5, "think_window": 4},
    "rkv+think": {
        "window": 4,
        "kernel_size": 3,
        "mix_lambda": 0.4,
        "similarity_threshold": 0.3,
        "channel_ratio": 0.5,
        "think_recent": 1,
        "think_window": 7,
    },
    "snapkv+think": {"window": 6, "kernel_size": 3, "think_recent": 7, "think_window": 30},
    "h2o+criticalkv": {"score_offset": 0.05},
    "snapkv+criticalkv": {"window": 6, "kernel_size": 3, "first_stage_ratio": 0.3},
    "gkv+ams": {"window": 4, "kernel_size": 3, "similarity_threshold": 0.3, **SEGMENTS},
    "h2o+ams": {**SEGMENTS, "mix_beta": 1.0, "max_segment_length": 3, "min_segment_length": 1},
    "keydiff+ams": {**SEGMENTS, "mix_beta": 0.2, "min_keep_per_segment": 0},
    "rkv+ams": {"window": 4, "kernel_size": 3, "mix_lambda": 0.4, **SEGMENTS},
    "snapkv+ams": {"window": 6, "kernel_size": 3, **SEGMENTS},
    "h2o+merging": {"merge_fraction": 0.5},
    "snapkv+merging": {"window": 6, "kernel_size": 3, "merge_threshold": 0.4},
    "h2o+chunk": {"block_length": 5},
    "keydiff+chunk": {"block_length": 8},
    "rkv+chunk": {"window": 4, "kernel_size": 3, "mix_lambda": 0.4, "block_length": 6},
    "snapkv+chunk": {"window": 6, "kernel_size": 3, "block_length": 7},
    "snapkv+criticalkv+chunk": {"window": 6, "kernel_size": 3, "block_length": 11},
    "vase+chunk": {"window": 6, "kernel_size": 3, "seed": 5, "block_length": 8},
    "knorm+chunkkv": {"chunk_length": 4},
    "rkv+chunkkv": {"window": 4, "kernel_size": 3, "mix_lambda": 0.4, "chunk_length": 3},
    "snapkv+chunkkv": {"window": 6, "kernel_size": 3, "chunk_length": 3},
}
NAMES = sorted(OPTIONS)


def make_model(
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 0,
    num_key_value_heads: int = 2,
    num_layers: int = 2,
) -> LlamaForCausalLM:
    """Layers with four query heads each; attention is far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=num_layers,
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
        self.positions.append([layer.held().positions.clone() for layer in self.cache.layers])
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


def assert_agree(
    model: LlamaForCausalLM,
    reference: ReferenceLlama,
    texts: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    *,
    name: str,
    rules: Rules,
    tolerance: float,
    score: Score | None = None,
    expected_rules: Rules | None = None,
    options: dict[str, Any] | None = None,
    floor: float | None = None,
) -> None:
    """A batch fed the same texts keeps the same tokens, row by row, and gives the same logits.

    Args:
        score: of the reference, where ``POLICIES`` has none of this name.
        expected_rules: of the reference, where a policy shares out the budget.
        options: of the policy, where ``OPTIONS`` has none for it.
        floor: as for :meth:`ReferenceLlama.generate`.
    """
    pairs = list(zip(texts, prompt_lengths, strict=True))
    prompts, forced = [t[:n] for t, n in pairs], [t[n:] for t, n in pairs]
    steps = len(forced[0])
    options = OPTIONS[name] if options is None else options
    _, watch = run_library(
        model, prompts, steps, name=name, rules=rules, forced=forced, options=options
    )
    score = score or partial(POLICIES[name], **options)
    for row, (prompt, rest) in enumerate(zip(prompts, forced, strict=True)):
        trace = reference.generate(
            prompt, steps, score=score, rules=expected_rules or rules, forced=rest, floor=floor
        )
        assert_same_kept(trace, watch, row)
        assert_same_logits(trace, watch, row, tolerance)
