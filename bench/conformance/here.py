"""What a policy of this library keeps."""

from typing import Any

import torch

from bench.conformance.agreement import Kept
from bench.conformance.pairs import Pair
from bench.conformance.setting import DECODED, SUFFIX, WORDINGS, Case, PrefillCase, Setting, text
from compressed_cache import CompressedCache, compress
from compressed_cache.policies.capabilities import ReadsTwice, find
from compressed_cache.versions import cache_argument


class Here:
    """Runs the counterpart of a press.

    Args:
        setting: model and statistics.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._known: dict[Any, list[Kept]] = {}

    def kept(self, pair: Pair, case: Case, undone: tuple[str, ...]) -> list[Kept]:
        """What is held after each cut that tokens were read after.

        Args:
            pair: the counterpart is run.
            case: at prefill there is one cut.
            undone: causes that are undone; only whether attention is passed on matters here.

        Raises:
            ValueError: refused, and similarly ``TypeError`` and ``NotImplementedError``.
        """
        key = pair, case, "passed on" in undone
        if key not in self._known:
            with torch.inference_mode():
                self._known[key] = self._run(*key)
        return self._known[key]

    def _run(self, pair: Pair, case: Case, is_silent: bool) -> list[Kept]:
        ids = torch.tensor([text(case)])
        if isinstance(case, PrefillCase):
            cache = self._cache(pair, case, budget=case.kept)
            if find(cache.policy, ReadsTwice):
                tokenizer = self.setting.tokenizer
                compress(self.setting.model, ids, cache, tokenizer=tokenizer, suffix=SUFFIX)
                return [_held(cache)]
            sizes = [ids.shape[1]]
            if pair.block:
                rest = ids.shape[1] - case.kept
                sizes = [case.kept, *[pair.block] * (rest // pair.block), rest % pair.block]
            for block in ids.split([size for size in sizes if size], dim=1):
                self._read(block, cache)
            return [_held(cache)]
        # The budget is what is held before a cut, and what goes is overwritten later. So what a cut
        # has left is told right before the next one: all but what came in between.
        cache = self._cache(pair, case, budget=case.prompt + case.interval, interval=case.interval)
        self._read(ids[:, : case.prompt], cache)
        hooks = [silence(layer) for layer in self.setting.model.model.layers if is_silent]
        cuts = []
        for step in range(1, DECODED + 1):
            at = case.prompt + step
            self._read(ids[:, at - 1 : at], cache)
            if step % case.interval == 0 and step > case.interval:
                before = at - case.interval
                cuts.append(
                    [[[p for p in head if p < before] for head in layer] for layer in _held(cache)]
                )
        for hook in hooks:
            hook.remove()
        return cuts

    def _read(self, ids: torch.Tensor, cache: CompressedCache) -> None:
        self.setting.model(ids, **cache_argument(cache))

    def _cache(self, pair: Pair, case: Case, **defaults: Any) -> CompressedCache:
        names: dict[str, Any] = {
            "tokens": case.prompt,
            "ratio": getattr(case, "ratio", None),
            "statistics": self.setting.statistics,
            "wordings": WORDINGS,
            "call": lambda policy, **options: CompressedCache(policy, **{**defaults, **options}),
        }
        return eval(f"call({pair.here})", names)


def silence(layer: Any) -> Any:
    """A hook that keeps a layer from passing its attention on: keys then depend on tokens alone."""
    return layer.self_attn.o_proj.register_forward_hook(lambda *call: torch.zeros_like(call[-1]))


def _held(cache: CompressedCache) -> Kept:
    return [
        [sorted(p for p in head if p >= 0) for head in layer.held().positions[0].tolist()]
        for layer in cache.layers
    ]
