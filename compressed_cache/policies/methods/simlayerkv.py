"""Layers that look at the first and last tokens alone keep no others."""

from dataclasses import dataclass
from typing import ClassVar

from compressed_cache.policies.capabilities import LazyLayerConfig, find_dropping, find_store
from compressed_cache.policies.modifier import Modifier


@dataclass(frozen=True, kw_only=True)
class SimLayerKV(Modifier):
    """Keeps only first and last tokens in layers that attend to little else.

    SimLayerKV, section 3 (https://arxiv.org/abs/2410.13846), its variant for the prompt. A layer is
    lazy if the last ``lazy_queries`` of the prompt give more than ``lazy_threshold`` of their
    attention, averaged over all heads, to the first ``lazy_sinks`` and the last ``lazy_recent``
    tokens. It then holds no more tokens than these; in the other layers the policy before ``+``
    decides within the budget. A layer that is lazy in all rows of a batch takes that much less
    memory, and one that is lazy in some leaves the slots of these rows empty.

    Differs from the authors' code in six points: each row of a batch is judged for itself; a lazy
    layer goes on giving up tokens while decoding (theirs is cut once); with a budget below twice
    ``lazy_sinks + lazy_recent`` both shrink in proportion to half the budget, or to what is
    protected; a lazy layer holds what ``sinks``, a given ``recent`` and ``protect_prompt`` protect
    too, with as many slots as that takes, or is not lazy where that is the whole budget, but a
    default of ``recent`` does not hold there; a prompt that is no longer than the tokens that count
    says nothing, and its layers are not lazy; and of a prompt read in chunks the first one decides.
    """

    name: ClassVar[str] = "simlayerkv"
    store: ClassVar = "lazy"
    lazy_threshold: float = 0.9
    """Part of the attention above which a layer is lazy, 0 to 1: 1 is never (the authors have 0.9
    for Llama 3, 0.65 for Llama 2, 0.8 for Mistral, 0.85 for Qwen)."""
    lazy_queries: int = 32
    """Last queries of the prompt that are asked."""
    lazy_sinks: int = 4
    """First tokens that a lazy layer keeps."""
    lazy_recent: int = 1024
    """Last tokens that a lazy layer keeps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lazy_threshold <= 1:
            raise ValueError(f"lazy_threshold must be from 0 to 1, got {self.lazy_threshold}")
        for name, least in (("lazy_queries", 1), ("lazy_sinks", 0), ("lazy_recent", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if find_store(self.base) != "slots" or find_dropping(self.base):
            raise ValueError(f"simlayerkv cannot leave slots of {self.base.label!r} empty")

    def lazy_layer(self, budget: int, protected: int) -> LazyLayerConfig:
        length = self.lazy_sinks + self.lazy_recent
        slots = min(length, max(budget // 2, protected + 1))
        sinks = min(self.lazy_sinks, slots * self.lazy_sinks // length)
        return LazyLayerConfig(self.lazy_threshold, self.lazy_queries, sinks, slots)
