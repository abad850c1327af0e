"""Which heads of a layer this process has, where tensor parallelism shares them out."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed


class Shard(NamedTuple):
    """One of ``size`` equal parts of the heads of a layer."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, module: Any, query: Tensor) -> "Shard":
        """The part that an attention module works on, told by how many query heads it has.

        Args:
            module: the attention module.
            query: ``[B, H * G, L, D]``.

        Raises:
            NotImplementedError: heads shared out among a part of the processes only.
        """
        total = getattr(getattr(module, "config", None), "num_attention_heads", None)
        if not isinstance(total, int) or total == query.shape[1]:
            return cls()
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        size = distributed.get_world_size()
        if query.shape[1] * size != total:
            raise NotImplementedError(
                f"tensor parallelism must span all {size} processes, got {query.shape[1]} of "
                f"{total} query heads in this one"
            )
        return cls(distributed.get_rank(), size)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of what all parts have."""
        if self.size == 1:
            return values
        values = values.contiguous()
        if torch.compiler.is_compiling():
            from torch.distributed import _functional_collectives as collectives

            group: Any = distributed.group.WORLD
            return collectives.all_reduce(values, "sum", group) / self.size
        distributed.all_reduce(values)
        return values / self.size
