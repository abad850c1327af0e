"""Selection: the context stays off the device, and each step fetches the chunks it asks for."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compressed_cache.ops.rotary import rotary_of
from compressed_cache.policies.base import Defaults, Needs, Policy
from compressed_cache.policies.view import LayerContext


@dataclass(frozen=True, kw_only=True)
class ShadowKV(Policy):
    """Keeps every token, the prompt off the device; each step fetches ``budget`` tokens of it.

    ShadowKV, section 4 (https://arxiv.org/abs/2410.21465): the values of the prompt go to the host,
    its keys are kept as low-rank factors from before their rotation. Of each chunk stays a
    landmark, the mean of its keys; chunks that are unlike their landmark (outliers), the end of the
    prompt and everything generated stay as they are. A query picks the chunks whose landmarks it
    attends to most (the largest share in the group), and attends exactly to what then is at hand.

    Resident for each token of the prompt, in a layer with ``H`` heads of ``D``: ``rank + H * D /
    chunk_size`` numbers in the dtype of the model (``H * D / chunk_size`` with ``rank=None``) and
    ``H / chunk_size`` bytes, where a full cache has ``2 * H * D`` numbers; off the device ``H * D``
    (``2 * H * D``). The context has room for a power of two of tokens, so that shapes, and with
    them the compiled step, outlive a prompt. What is fetched, outliers, the end of the prompt and
    generated tokens take ``2 * H * D`` numbers and ``8 * H`` bytes each, in slots that double.

    Differs from the authors' code in six points: the factors come from the eigenvectors of the
    products of the keys, over all heads of the layer that are at hand, instead of from a singular
    value decomposition (the same subspace in less memory); chunks that the step before fetched are
    fetched again (their kernel reuses these); on CUDA the chosen chunks are gathered by the host,
    so each layer of each step waits until it knows their numbers (their kernel reads the memory of
    the host itself); in a padded batch chunks are counted from the start of each row (their rows
    are of one length); a prompt read in parts attends to all of the parts before, whose keys are by
    then of low rank, and is organised anew with each (theirs is read at once); and a tie goes to
    the newer chunk (theirs to any).
    """

    name: ClassVar[str] = "shadowkv"
    evicts: ClassVar[bool] = False
    store: ClassVar = "offloaded"
    chunk_size: int = 8
    """Tokens that share a landmark and are fetched together (the paper's 8)."""
    rank: int | None = 160
    """Rank of the keys over all heads of a layer, cut to ``H * D`` (the paper's 160); None: keys
    go to the host as they are."""
    outlier_chunks: int = 48
    """Chunks of each head that stay because a token is least like the landmark (the paper's 48)."""
    local_chunks: int = 4
    """Full chunks at the end of the prompt that stay, beside the rest (the authors' code has 4)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("chunk_size", 1), ("outlier_chunks", 0), ("local_chunks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be >= 1 or None, got {self.rank}")

    @property
    def needs(self) -> Needs:
        return Needs(model=("rotary position embedding",))

    def defaults(self, budget: int) -> Defaults:
        if budget % self.chunk_size:
            raise ValueError(
                f"budget must be a multiple of chunk_size ({self.chunk_size}), the tokens fetched "
                f"together, got {budget}"
            )
        return Defaults()

    def constants(self, context: LayerContext) -> dict[str, Tensor]:
        if self.rank is None:
            return {}
        return rotary_of(context.config, context.module, context.layer, context.dim).constants()
