"""What a layer learns of its attention module when it meets it: by that its store is chosen."""

from typing import Any

from torch import Tensor

from compressed_cache.ops.attention import LogitTransform
from compressed_cache.ops.tensor_parallel import Shard
from compressed_cache.policies.base import Policy
from compressed_cache.policies.budgets import compressed_layers
from compressed_cache.policies.capabilities import FitsPrompt, SharesBudget, find
from compressed_cache.policies.eviction_config import EvictionConfig, share_budget
from compressed_cache.policies.methods.streaming_llm import StreamingLLM
from compressed_cache.policies.view import LayerContext
from compressed_cache.snapshot import LayerState
from compressed_cache.stores.bound_policy import BoundPolicy
from compressed_cache.stores.inputs import AttentionInputs


def bind_module(
    policy: Policy,
    eviction: EvictionConfig,
    layer: int,
    module: Any,
    inputs: AttentionInputs,
    arguments: dict[str, Any],
) -> BoundPolicy:
    """The policy at the attention module of a first prompt.

    Args:
        policy: of the cache.
        eviction: likewise.
        layer: its index.
        module: the attention module.
        inputs: the tokens of the call.
        arguments: what the attention function was given by name.
    """
    query, key, value = inputs[:3]
    scaling = arguments.get("scaling")
    factor = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    transform = LogitTransform(factor, arguments.get("softcap"), arguments.get("s_aux"))
    shard = Shard.of(module, query)
    heads = key.shape[1]
    context = LayerContext(
        config=_text_config(module),
        module=module,
        layer=layer,
        first_head=shard.rank * heads,
        heads=heads,
        groups=query.shape[1] // heads,
        dim=key.shape[3],
        value_dim=value.shape[3],
        device=key.device,
        total_heads=shard.size * heads,
        hidden_size=0 if inputs.hidden_states is None else inputs.hidden_states.shape[2],
    )
    window = arguments.get("sliding_window", _window(context.config, layer))
    if window is not None:
        return _bind_window(window, layer, transform, shard)
    constants: dict[str, Tensor] = {}
    for part in policy.parts:
        constants |= part.constants(context)
    return BoundPolicy(
        policy,
        eviction,
        layer=layer,
        budget=_budget(policy, eviction, context, inputs),
        transform=transform,
        constants=constants,
        shard=shard,
    )


def rebind(
    policy: Policy,
    eviction: EvictionConfig,
    layer: int,
    state: LayerState,
    shard: Shard | None,
) -> BoundPolicy:
    """The policy at a layer whose module was met before ``state`` was copied."""
    if state.window is not None:
        return _bind_window(state.window, layer, state.transform, shard)
    return BoundPolicy(
        policy,
        eviction,
        layer=layer,
        budget=state.budget,
        transform=state.transform,
        constants=state.constants,
        shard=shard,
    )


def _bind_window(
    window: int, layer: int, transform: LogitTransform, shard: Shard | None = None
) -> BoundPolicy:
    """That of a layer with a sliding window, whose oldest token goes whatever the policy."""
    return BoundPolicy(
        StreamingLLM(),
        EvictionConfig(window, interval=1, sinks=0, recent=0, protect_prompt=False),
        layer=layer,
        budget=window,
        transform=transform,
        window=window,
        shard=shard,
    )


def _budget(
    policy: Policy, eviction: EvictionConfig, context: LayerContext, inputs: AttentionInputs
) -> int | tuple[int, ...]:
    """Slots of every head of a layer, or of each of those at hand."""
    if isinstance(eviction.budget, int) and not find(policy, SharesBudget):
        return eviction.budget
    fitting = find(policy, FitsPrompt)
    if fitting is not None and fitting.fits_prompt:
        return _fitted(fitting, eviction, context, inputs)
    share = share_budget(eviction, policy, context.config)[context.layer]
    return share if isinstance(share, int) else share[context.first_head :][: context.heads]


def _fitted(
    fitting: FitsPrompt, eviction: EvictionConfig, context: LayerContext, inputs: AttentionInputs
) -> int:
    """Slots of every head of a layer for this prompt."""
    assert isinstance(eviction.budget, int)
    layer = compressed_layers(context.config).index(context.layer)
    lengths = sorted(set(inputs.real.sum(dim=1).tolist()))
    shares = {
        fitting.fitted(eviction.budget, eviction.least, context.config, length)[layer]
        for length in lengths
    }
    if len(shares) > 1:
        raise ValueError(
            "prompts of a batch must call for the same budgets with fit_prompt=True, got some of "
            f"{', '.join(map(str, lengths))} tokens. Generate them one by one."
        )
    return shares.pop()


def _window(config: Any, layer: int) -> int | None:
    """The window of a layer by its config, as transformers' own caches read it.

    Some attention is not told of it: its mask has it.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds and (layer >= len(kinds) or kinds[layer] != "sliding_attention"):
        return None
    layers = getattr(config, "per_layer_config", None)
    return getattr(layers[layer] if layers else config, "sliding_window", None)


def _text_config(module: Any) -> Any:
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
