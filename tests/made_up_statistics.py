"""Statistics for models that nobody calibrated."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressed_cache.policies import LayerContext, gate_file
from compressed_cache.policies import statistics_file as files
from tests.reference.policies import made_up, made_up_gate

_load = files.load
_load_gate = gate_file.load


def load_or_make_up(
    policy: str, path: str | None, context: LayerContext, **more: Any
) -> dict[str, Tensor]:
    """In place of ``files.load``: without a file those that the reference makes up."""
    if path or files.shipped(policy, context.config):
        return _load(policy, path, context, **more)
    heads = [
        made_up(policy, context.layer, context.first_head + head, context.groups, context.dim)
        for head in range(context.heads)
    ]
    return {
        name: torch.tensor(np.stack([head[name] for head in heads])).float().to(context.device)
        for name in heads[0]
    }


def load_or_make_up_gate(path: str | None, context: LayerContext) -> dict[str, Tensor]:
    """In place of ``gate_file.load``: without a file gates that the reference makes up."""
    if path:
        return _load_gate(path, context)
    heads = range(context.first_head, context.first_head + context.heads)
    gates = [made_up_gate(context.layer, head, context.hidden_size) for head in heads]
    last = "2." if context.layer % 2 else ""
    gate = {
        f"{last}weight": np.stack([gate.weight for gate in gates]),
        f"{last}bias": np.stack([gate.bias for gate in gates]),
    }
    if gates[0].inner is not None:
        gate["0.weight"], gate["0.bias"] = gates[0].inner
    return {name: torch.tensor(part).float().to(context.device) for name, part in gate.items()}
