"""Files of statistics that others publish on the Hugging Face hub, one tensor for all layers.

They say nothing of the model that they are of but its shape: two models of one shape cannot be told
apart by them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compressed_cache.ops.rotary import rotary_of
from compressed_cache.policies.view import LayerContext

FILE = "model.safetensors"
"""What such a file is called in its repository."""


class HubFormat(NamedTuple):
    """One kind of such files."""

    policy: str
    """Whose statistics they have."""
    names: Mapping[str, str]
    """Their names of tensors ``[layers, heads, D, ...]``, and ours."""
    of_queries: bool
    """Whether heads are those of queries; else they are key/value heads."""


FORMATS = (
    # https://github.com/NVIDIA/kvpress, expected_attention_with_stats.py: before RoPE.
    HubFormat("expected_attention", {"query_mean": "mean", "query_cov": "covariance"}, True),
    # https://github.com/NathanGodey/qfilters.
    HubFormat("qfilter", {"q_filters": "filters"}, False),
)


def recognised(shapes: Mapping[str, Sequence[int]]) -> HubFormat | None:
    """The format of a file with tensors of these shapes."""
    for kind in FORMATS:
        if set(shapes) == set(kind.names):
            first, *others = (list(shapes[name]) for name in kind.names)
            if len(first) == 3 and all(other == [*first, first[-1]] for other in others):
                return kind
    return None


def by_layer(kind: HubFormat, tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Of each layer its tensors by our names."""
    number = len(tensors[next(iter(kind.names))])
    return {
        layer: {own: tensors[name][layer] for name, own in kind.names.items()}
        for layer in range(number)
    }


def check_shape(
    kind: HubFormat, layers: Mapping[int, Mapping[str, Tensor]], config: Any, path: str
) -> None:
    """Raises ``ValueError`` unless statistics are of a model of this shape."""
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if not kind.of_queries:
        heads = getattr(config, "num_key_value_heads", None) or heads
    expected = config.num_hidden_layers, heads, dim
    first = next((part for tensors in layers.values() for part in tensors.values()), None)
    found = len(layers), *(() if first is None else first.shape[:2])
    if found != expected:
        what = "query" if kind.of_queries else "key/value"
        raise ValueError(
            f"{path!r} has statistics of another model: its layers, {what} heads and dimension are "
            f"{list(found)}, those of this model {list(expected)}"
        )


def of_heads(
    kind: HubFormat, tensors: Mapping[str, Tensor], context: LayerContext
) -> dict[str, Tensor]:
    """The tensors of a layer as ours are: ``[H, ...]``, of queries ``[H, G, ...]``, float32."""
    tensors = {name: part.float() for name, part in tensors.items()}
    if not kind.of_queries:
        return tensors
    # Ours are of queries as they meet the keys, which a model with YaRN scales as it rotates them.
    scale = rotary_of(context.config, context.module, context.layer, context.dim).scale().cpu()
    scales = {"mean": scale, "covariance": torch.outer(scale, scale)}
    return {
        name: (part * scales[name]).unflatten(0, (-1, context.groups))
        for name, part in tensors.items()
    }
