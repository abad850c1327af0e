"""The optimizer for matrices."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon) in float32, equal shapes stacked.

    `torch.optim.Muon` iterates in bfloat16, matrix by matrix, which takes longer than the backward
    pass on a CPU without bfloat16 arithmetic.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            stacks: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                stacks.setdefault(tuple(parameter.shape), []).append(parameter)
            for (rows, columns), parameters in stacks.items():
                gradients = torch.stack([p.grad for p in parameters if p.grad is not None])
                buffer = self.state[parameters[0]].setdefault(
                    "momentum", torch.zeros_like(gradients)
                )
                buffer.lerp_(gradients, 1 - group["momentum"])
                update = _orthogonal(gradients.lerp(buffer, group["momentum"]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, change in zip(parameters, update.unbind(), strict=True):
                    parameter.mul_(1 - group["lr"] * group["decay"]).sub_(change, alpha=scale)


def _orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest orthogonal matrices, by the Newton-Schulz iteration of the Muon authors."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x
