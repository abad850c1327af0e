"""Leverage of keys and values."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from compressed_cache.policies.base import Defaults, Needs, Policy
from compressed_cache.policies.draws import check_seed, gauss
from compressed_cache.policies.needs import usual_interval
from compressed_cache.policies.view import Slots


@dataclass(frozen=True, kw_only=True)
class CurDKV(Policy):
    """Keeps the tokens whose key and value have the largest leverage among their neighbours.

    CurDKV (https://arxiv.org/abs/2509.15038), as its authors' press in kvpress
    (https://github.com/NVIDIA/kvpress) has it: the leverage of a key is its squared length after a
    product with a Gaussian matrix of ``rank`` columns, as a share of the sum over its window of
    ``local_window`` tokens; the score is that of the key times that of the value, as a share of the
    sum over all. The first ``num_sinks`` positions score 1, as much as all the others together.
    The press leaves the matrix out by default (``rank=0`` here). The baseline "cur_fixed_gauss" in
    the code of VaSE (https://arxiv.org/abs/2606.03928) has ``local_window=0`` and 64 recent tokens.

    Differs in four points: entries of the matrix are hashes of seed and layer, the same for all
    heads and rows and at every ranking; windows are formed anew at every ranking, of what is held
    in the order of positions; windows are counted from the oldest token, as in kvpress, where the
    authors' first version counted from the newest; and while decoding the last tokens are kept
    through ``recent``, as VaSE's baseline does.
    """

    name: ClassVar[str] = "curdkv"
    rank: int = 20
    """Columns of the matrix, >= 0 (the authors'); 0 takes keys and values as they are."""
    local_window: int = 16
    """Tokens that share their leverage, >= 0; 0 takes all that are held together."""
    num_sinks: int = 4
    """Positions at the start of the text that stay, >= 0, also the default of ``sinks``."""
    seed: int = 0
    """Any int >= 0; another seed gives another matrix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        for option in ("rank", "local_window", "num_sinks"):
            if getattr(self, option) < 0:
                raise ValueError(f"{option} must be >= 0, got {getattr(self, option)}")

    @property
    def needs(self) -> Needs:
        return Needs(values=True)

    def defaults(self, budget: int) -> Defaults:
        return Defaults(
            interval=usual_interval(budget), sinks=self.num_sinks, recent=min(64, budget // 2)
        )

    def scores(self, slots: Slots) -> Tensor:
        sizes = self._sizes(slots)
        counted = sizes.isfinite().all(dim=0) & (slots.positions >= 0)
        last = torch.iinfo(torch.int64).max
        order = slots.positions.masked_fill(~counted, last).argsort(dim=-1, stable=True)
        in_order = sizes.masked_fill(~counted, 0.0).gather(-1, order.expand_as(sizes))
        product = self._leverage(in_order).prod(dim=0)
        shares = _shares(torch.zeros_like(product).scatter(-1, order, product))
        shares = shares.masked_fill(slots.positions < self.num_sinks, 1.0)
        return shares.masked_fill(~counted, -1.0)

    def _sizes(self, slots: Slots) -> Tensor:
        """Squared lengths of keys and of values, ``[2, B, H, S]`` float32."""
        both = [slots.keys.float(), slots.values.float()]
        if self.rank:
            dim = max(vectors.shape[3] for vectors in both)
            drawn = gauss(slots, self.seed, count=dim * self.rank, redraw=False)
            matrix = (drawn * self.rank**-0.5).unflatten(1, (1, dim, self.rank))
            both = [vectors @ matrix[:, :, : vectors.shape[3]] for vectors in both]
        return torch.stack([vectors.square().sum(dim=-1) for vectors in both])

    def _leverage(self, sizes: Tensor) -> Tensor:
        """Sizes ``[2, B, H, S]``, the oldest token first, as shares of their windows."""
        num_slots = sizes.shape[-1]
        window = self.local_window or num_slots
        windows = pad(sizes, (0, -num_slots % window)).unflatten(-1, (-1, window))
        return _shares(windows).flatten(-2)[..., :num_slots]


def _shares(sizes: Tensor) -> Tensor:
    total = sizes.sum(dim=-1, keepdim=True)
    return sizes / total.clamp(min=torch.finfo(torch.float32).tiny)
