"""Time of a token under ``lossless``, where a compressed cache drafts, beside DynamicCache.

    pytest bench/test_lossless.py --benchmark-only

The weights are random, so no draft would be right. Each is taken for right with a fixed chance, and
the text is not looked at; what real models accept is in ``docs/results.md``.
"""

from statistics import median
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.contenders import BASELINE, EACH_DEVICE, SMALL, Generation, compile_options, random_model
from compressed_cache import CompressedCache, DraftStatistics, lossless
from compressed_cache.hf import lossless as loop
from compressed_cache.versions import cache_argument

BUDGET = 256
CHANCES = (0.8, 0.9)
WINDOWS, ROUNDS = 6, 8  # of so many verifications each
BEFORE = 12  # verifications in which the number of drafts is found
TOKENS = 4  # of the baseline in each round


@EACH_DEVICE
@pytest.mark.parametrize("seen", [2048, 8192, 32768])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("chance", CHANCES)
def test_lossless(
    benchmark: BenchmarkFixture,
    monkeypatch: pytest.MonkeyPatch,
    chance: float,
    compiled: bool,
    seen: int,
    device: str,
) -> None:
    model = random_model(SMALL, device)
    baseline = Generation(BASELINE, model, batch=1, prompt=seen)
    baseline.continue_by(TOKENS)
    statistics = DraftStatistics()
    generator = torch.Generator().manual_seed(0)
    rounds: list[tuple[float, int, float]] = []
    run = loop._Loop._round

    def accept(drafts: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        right = torch.rand(drafts.shape, generator=generator) < chance
        count = right.int().cumprod(dim=1).sum(dim=1).to(drafts.device)
        return count, scores.argmax(dim=-1).gather(1, count[:, None])

    def timed(self: Any, *args: Any) -> None:
        tokens, began = statistics.tokens, self._now()
        run(self, *args)
        seconds = self._now() - began
        rounds.append((seconds, statistics.tokens - tokens, median(baseline.continue_by(TOKENS))))
        if len(rounds) == BEFORE + WINDOWS * ROUNDS:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "accept_greedy", accept)
    monkeypatch.setattr(loop._Loop, "_round", timed)

    def generate() -> None:
        with pytest.raises(KeyboardInterrupt), torch.inference_mode():
            model.generate(
                baseline.ids[:, :seen],
                attention_mask=torch.ones_like(baseline.ids[:, :seen]),
                **cache_argument(CompressedCache("snapkv", BUDGET)),
                custom_generate=lossless,
                num_draft_tokens=8,
                statistics=statistics,
                max_new_tokens=1 << 12,
                do_sample=False,
                **compile_options(compiled, device),
            )

    benchmark.group = f"lossless, {device}"
    benchmark.pedantic(generate, rounds=1, iterations=1)
    starts = range(BEFORE, len(rounds), ROUNDS)
    windows = [rounds[start : start + ROUNDS] for start in starts]
    tokens = [sum(s for s, _, _ in part) / sum(n for _, n, _ in part) for part in windows]
    ratios = [
        token / median(other for _, _, other in part)
        for token, part in zip(tokens, windows, strict=True)
    ]
    benchmark.extra_info.update(
        table="lossless",
        device=device,
        step="compiled" if compiled else "eager",
        seen=seen,
        budget=BUDGET,
        chance=chance,
        acceptance_rate=statistics.acceptance_rate,
        tokens_per_verification=statistics.tokens_per_verification,
        plain_from=statistics.plain_from,
        ms_per_token=1000 * median(tokens),
        baseline_ms=1000 * median(other for _, _, other in rounds[BEFORE:]),
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
    )
