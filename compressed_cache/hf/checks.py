"""What a cache and its layers refuse, in words, before any work is done."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from compressed_cache.hf.module_identity import ModuleIdentity
from compressed_cache.ops.tokens import Sizes
from compressed_cache.policies.base import Policy
from compressed_cache.policies.capabilities import ReadsTwice, find, needs_of
from compressed_cache.policies.eviction_config import EvictionConfig
from compressed_cache.versions import CACHE

ATTENTION = ("full_attention", "sliding_attention")
"""Types of layers that a cache can serve."""
# Of these transformers keeps the state, if they have one.
_OTHERS = ("linear_attention", "conv", "moe", "mlp")
# Numbers by which a config tells of a form of attention.
_FORMS = {
    "keep_window_size": "its attention is biased by what the values say, in every step anew",
    "lambda_std_dev": "differential attention attends twice to the same keys",
    "cross_attn_k": "it reads its text in patches of bytes, which it keeps beside the cache",
}
_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", *(f"flash_attention_{n}" for n in (2, 3, 4)))
_RESET = "Call cache.reset() or use a new CompressedCache."
_NEW_TEXT = "For a new text, call cache.reset() or use a new CompressedCache."


def check_states(held: Sizes | None, keys: Tensor, values: Tensor) -> None:
    """Raises ``ValueError`` if new keys and values do not fit those of ``held``."""
    if held is None:
        return
    check_batch(held.batch, keys.shape[0])
    kept = held.heads, held.dim, held.value_dim, held.device
    given = keys.shape[1], keys.shape[3], values.shape[3], keys.device
    # Under autocast they may be of another dtype.
    if kept != given:
        raise ValueError(
            f"keys must be those of the model that read the prompt ({_states(*kept, held.dtype)}), "
            f"got {_states(*given, keys.dtype)}. {_RESET}"
        )


def check_batch(held: int, rows: int) -> None:
    """Raises ``ValueError`` if a call has other rows than the cache."""
    if held == rows:
        return
    repeats, rest = divmod(rows, held)
    remedy = _RESET
    if repeats > 1 and not rest:
        remedy = (
            f"For {repeats} beams or texts of each row, call "
            f"cache.batch_repeat_interleave({repeats}) before. {_NEW_TEXT}"
        )
    raise ValueError(f"batch size must stay {held} until the cache is reset, got {rows}. {remedy}")


def rows_held(rows: Tensor, held: int, *, all_stay: bool) -> Tensor:
    """The indices ``[B]`` int64 of rows, from 0 on, of ``held`` ones that they are chosen from.

    Raises:
        TypeError: what is no index of a row.
        ValueError: no rows, others than are held, or another number where ``all_stay``.
    """
    if rows.dtype == torch.bool and rows.shape == (held,):
        rows = rows.nonzero()[:, 0]
    is_index = rows.dtype in (torch.int32, torch.int64) and rows.dim() == 1
    if len(rows.shape) and not rows.numel():
        raise ValueError(f"indices must be of one row at least, of the {held} that are held")
    if not is_index:
        raise TypeError(
            f"indices must be whole numbers [B] or a bool for each of the {held} rows, got "
            f"{rows.dtype} {list(rows.shape)}"
        )
    if all_stay and len(rows) != held:
        raise ValueError(
            f"beam_idx must have one index for each of the {held} rows, got {len(rows)}"
        )
    # A look at those of a GPU would wait for it in each step of a beam search.
    if rows.device.type == "cpu" and not bool(((-held <= rows) & (rows < held)).all()):
        raise ValueError(f"indices must be of the {held} rows that are held, got {rows.tolist()}")
    return torch.where(rows < 0, rows + held, rows)


def _states(heads: int, dim: int, value_dim: int, device: Any, dtype: Any) -> str:
    values = "" if value_dim == dim else f", values of {value_dim}"
    return f"{heads} heads of {dim}{values}, {str(dtype).removeprefix('torch.')} on {device}"


def check_module(identity: ModuleIdentity, module: Any, arguments: dict[str, Any]) -> None:
    """Raises ``ValueError`` if the text held was read by another attention module, or if it asks
    for dropout, which is done of a first prompt only."""
    if not identity.knows(module):
        raise ValueError(f"model must be the one that read the prompt, got another. {_RESET}")
    dropout = arguments.get("dropout")
    if dropout:
        raise ValueError(
            f"attention_dropout must be 0 after the prompt, where it would be left out, got "
            f"{dropout}. Call model.eval()."
        )


def check_read(*, is_read: bool) -> None:
    """Raises ``ValueError`` if a model was called with a cache and left it out."""
    if not is_read:
        raise ValueError(
            "the model left out the cache it was given, as transformers does under gradient "
            "checkpointing, so it saw nothing of what was read before. Call "
            "model.gradient_checkpointing_disable(), or give no cache."
        )


def check_read_once() -> None:
    """Raises ``ValueError`` in a backward pass, which calls a model for what it has read before."""
    if torch._C._current_graph_task_id() != -1:
        raise ValueError(
            "a call with a cache must not be checkpointed: the backward pass calls the model "
            "again, and its tokens would be read twice. Leave out torch.utils.checkpoint, or the "
            "cache."
        )


def check_order(layers: Sequence[Any], layer: Any, first: Any) -> None:
    """Raises unless all layers took part in the same calls before ``layer`` is given new keys.

    Args:
        layers: of the cache; those of linear attention are passed over.
        layer: one of them.
        first: the one that each call meets first.

    Raises:
        NotImplementedError: keys of another layer were never attended.
        ValueError: a call failed between two layers.
    """
    if layer is first:
        for other in layers:
            if hasattr(other, "check_attended"):
                other.check_attended()
                if other.is_filled:
                    _check_progress(other, expected=first.progress)
        return
    previous = layers[layer.index - 1]
    if hasattr(previous, "check_attended"):
        previous.check_attended()
    _check_progress(layer, expected=first.progress - 2)


def _check_progress(layer: Any, *, expected: int) -> None:
    if layer.progress != expected:
        raise ValueError(
            "all layers must hold the same text, but a call failed before layer "
            f"{layer.index} had read it. {_RESET}"
        )


def check_whole(*, is_torn: bool) -> None:
    """Raises ``ValueError`` if a call failed that some layers may have read."""
    if is_torn:
        raise ValueError(
            "all layers must hold the same text, but a call failed that some may have read and "
            f"others not. {_RESET}"
        )


def has_linear_layers(config: Any) -> bool:
    """Whether some layers keep a state in place of keys and values, by a model's config."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    return not set(kinds) <= set(ATTENTION)


def check_attended(layer: int, *, awaits: bool) -> None:
    """Raises ``NotImplementedError`` if a layer still awaits attention when it is too late."""
    if awaits:
        raise NotImplementedError(
            _refusal(
                f"the attention of layer {layer} never reached the cache. It must call what "
                "transformers' AttentionInterface.get_interface returns, with the keys that "
                "cache.update returned"
            )
        )


def check_handed(layer: int, *, awaits: bool, values_are_own: bool) -> None:
    """Raises ``NotImplementedError`` unless attention is once over what the layer handed out.

    A prompt would be right all the same, and only the tokens after it wrong.
    """
    if not awaits:
        raise NotImplementedError(
            _refusal(f"the keys of layer {layer} are attended to more than once in one call")
        )
    if not values_are_own:
        raise NotImplementedError(
            _refusal(f"layer {layer} attends to other values than those cache.update returned")
        )


def hidden_states(layer: int, shown: Any, module: Any, query: Tensor) -> Tensor:
    """What ``module`` was given, ``[B, L, E]``; raises ``NotImplementedError`` unless it showed it
    in this call."""
    if shown is None or shown.module is not module:
        raise NotImplementedError(
            f"the policy needs hidden states, and layer {layer} did not show its own: the cache "
            "must be given by name (cache=cache) to a model of transformers whose "
            "attention modules are called with it"
        )
    given = shown.hidden_states
    if given.shape[:2] != (query.shape[0], query.shape[2]):
        raise NotImplementedError(
            f"the policy needs hidden states [B, L, E] of {query.shape[0]} rows and "
            f"{query.shape[2]} tokens, layer {layer} was given {list(given.shape)}"
        )
    return given


def check_prompt(
    lengths: Tensor, policy: Policy, eviction: EvictionConfig, budget: int, place: str = ""
) -> None:
    """Raises ``ValueError`` if protected prompts of these ``lengths`` ``[B]`` leave no room in a
    budget, which is that of a ``place``."""
    if not eviction.protect_prompt or eviction.prompt_yields:
        return
    longest = int(lengths.max())
    recent = eviction.least_recent
    least = longest + recent + 1
    if least > budget:
        lowered = "window" if recent == needs_of(policy).recent else "recent"
        named, lower = (" + recent", f", lower {lowered}") if recent else ("", "")
        raise ValueError(
            f"budget must be at least prompt{named} + 1 with protect_prompt=True "
            f"({longest}{f' + {recent}' if recent else ''} + 1 = {least}), got {budget}"
            f"{place}. Raise budget{lower}, or set protect_prompt=False."
        )


def check_first_prompt(policy: Policy, seen: int = 0) -> None:
    """Raises ``ValueError`` for a first prompt that a layer cannot read.

    That is where other layers have ``seen`` tokens, as those of another model's file, or under a
    policy whose prompts are not read by ``generate``.
    """
    if seen:
        raise ValueError(
            f"model must be the one that read the prompt, got one of more layers. {_RESET}"
        )
    if find(policy, ReadsTwice):
        raise ValueError(
            f"{policy.label!r} ranks a prompt by a second pass over it, which must come before "
            "generate: call compressed_cache.compress(model, input_ids, cache, tokenizer=...)."
        )


def check_drafts(policy: Policy) -> None:
    """Raises ``NotImplementedError`` for a policy that cannot draft."""
    if find(policy, ReadsTwice):
        raise NotImplementedError(
            f"{policy.label!r} ranks a prompt by a second pass over it, but drafts follow the "
            "first. Choose another policy, or leave out lossless."
        )


def check_text(seen: int, tokens: int) -> None:
    """Raises ``ValueError`` if a text of ``tokens`` tokens cannot go on with what was read."""
    if seen and tokens <= seen:
        raise ValueError(
            f"the text must begin with the {seen} tokens the cache has seen (padding included) and "
            f"be longer, got {tokens}. To go on, pass the text so far and what is new. "
            f"{_NEW_TEXT}"
        )


def check_text_held(is_other: Tensor, seen: int) -> None:
    """Raises ``ValueError`` if a text has other tokens than were read, those of ``[B, C]`` bool."""
    if bool(is_other.any()):
        row, column = is_other.nonzero()[0].tolist()
        raise ValueError(
            f"the text must begin with the {seen} tokens the cache has seen (padding included), "
            f"got another token in row {row}, column {column}. {_NEW_TEXT}"
        )


def check_whole_text(seen: int, tokens: int, width: int) -> None:
    """Raises ``ValueError`` if a mask of ``width`` columns says that only new tokens were given."""
    if seen and width > tokens:
        raise ValueError(
            f"assisted decoding needs the whole text, the {seen} tokens the cache has seen "
            f"included, got {tokens} tokens with an attention_mask of {width} columns."
        )


def check_mask(attention_mask: Tensor, seen: int, tokens: int) -> None:
    """Raises ``ValueError`` if a 2-D mask is shorter than the text, as that of another text is."""
    width = attention_mask.shape[1]
    if width < seen + tokens:
        raise ValueError(
            f"attention_mask must cover the {seen} tokens the cache has seen (padding included) "
            f"and {tokens} new ones, got {width} columns. {_NEW_TEXT}"
        )


def check_shown(known: Tensor, shown: Tensor) -> None:
    """Raises ``ValueError`` if a mask shows as tokens what was read as padding, ``[B, T]`` bool."""
    more = (shown & ~known).sum(dim=1)
    if bool(more.any()):
        row = int(more.argmax())
        raise ValueError(
            f"attention_mask must hide what was read as padding, of rows that had ended or by an "
            f"earlier mask, because it is not held; it shows {int(more[row])} such tokens of row "
            f"{row}"
        )


def implementation_of(module: Any) -> str | None:
    """The attention implementation of a module, such as ``"eager"``; None where it names none."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def check_function(function: Callable[..., Any], module: Any) -> None:
    """Raises ``NotImplementedError`` for an attention function that steps would leave out.

    Steps compute what the functions of transformers compute, and what stands under their names.
    """
    implementation = implementation_of(module)
    if implementation is None or implementation in _IMPLEMENTATIONS:
        return
    while isinstance(function, functools.partial):
        function = function.func
    home = getattr(function, "__globals__", {}).get("__name__", "")
    if home.partition(".")[0] != "transformers" and home != type(module).__module__:
        name = getattr(function, "__qualname__", type(function).__qualname__)
        raise NotImplementedError(
            f"attn_implementation {implementation!r} calls {name!r}, a function of your own: the "
            "decode steps of CompressedCache attend over slots by themselves and would leave it "
            "out. Use 'sdpa', 'eager', 'flash_attention_2' or 'flex_attention'."
        )


def check_attention(layer: int, module: Any, arguments: dict[str, Any]) -> None:
    """Raises ``NotImplementedError`` for an attention layer that slots cannot serve."""
    config = getattr(module, "config", None)
    implementation = implementation_of(module)
    if implementation is not None and implementation.startswith("paged|"):
        raise NotImplementedError(
            f"attn_implementation {implementation!r} keeps keys and values in pages of its own, so "
            "CompressedCache cannot work with it. Use 'sdpa', 'eager', 'flash_attention_2' or "
            "'flex_attention'."
        )
    if config is not None:
        check_config(config)
    kinds = getattr(config, "layer_types", None) or []
    kind = kinds[layer] if layer < len(kinds) else "full_attention"
    if kind not in ATTENTION:
        raise NotImplementedError(_refusal(f"layer {layer} is of type {kind!r}"))
    if arguments.get("position_bias") is not None:
        raise NotImplementedError(
            _refusal(f"layer {layer} adds a position bias, which is counted in slots, not tokens")
        )


def check_config(config: Any) -> None:
    """Raises ``NotImplementedError`` for a model whose config tells that it cannot be served, and
    ``TypeError`` for what is no config."""
    if not isinstance(config, PreTrainedConfig):
        hint = ". Use config=model.config" if hasattr(config, "config") else ""
        raise TypeError(f"config must be a model's config, got a {type(config).__name__}{hint}")
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            _refusal("an encoder-decoder model attends to its encoder, where nothing is decoded")
        )
    text = config.get_text_config(decoder=True)
    if _has(text, "kv_lora_rank"):
        raise NotImplementedError(
            _refusal("multi-head latent attention caches one latent vector for all heads, not keys")
        )
    sharing = getattr(text, "kv_sharing_modes", None) or []
    if _has(text, "num_kv_shared_layers") or "reuse" in sharing:
        raise NotImplementedError(_refusal("its last layers read the keys of earlier ones"))
    kinds = getattr(text, "layer_types", None) or []
    unknown = sorted({kind for kind in kinds if kind not in (*ATTENTION, *_OTHERS)})
    if unknown:
        raise NotImplementedError(
            _refusal(f"it has layers of type {', '.join(map(repr, unknown))}")
        )
    check_keys(any(kind in ATTENTION for kind in kinds or ATTENTION))
    if "diffusion" in (getattr(text, "model_type", None) or ""):
        raise NotImplementedError(
            _refusal("it writes a block of tokens many times over, not one token after another")
        )
    if getattr(text, "recurrent_kv_cache_mode", None) == "last_loop":
        raise NotImplementedError(_refusal("its loops read the keys that are held by themselves"))
    for name, reason in _FORMS.items():
        if _has(text, name):
            raise NotImplementedError(_refusal(reason))


def check_keys(has_some: bool) -> None:
    """Raises ``NotImplementedError`` for a model without a layer that keeps keys and values."""
    if not has_some:
        raise NotImplementedError(
            _refusal("it keeps no keys and values, so there is nothing to compress")
        )


def check_model(model: Any) -> None:
    """Raises ``NotImplementedError`` for a model that cannot generate with a cache it is given."""
    check_config(model.config)
    check_class(type(model))
    # With a cache that could be compiled, generate builds the masks.
    if any(hasattr(part, "_prepare_decoder_attention_mask") for part in model.children()):
        raise NotImplementedError(_refusal("it takes no masks but those it builds itself"))


@functools.cache
def check_class(model: type) -> None:
    """Raises ``NotImplementedError`` for a class of models that has no use for a cache it is given.

    Such a model would go on without it, or say so in words of its own.
    """
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if supports is not None and not supports():
        raise NotImplementedError(_refusal("it keeps its states in a way of its own"))
    takers = (getattr(model, name, None) for name in ("forward", "prepare_inputs_for_generation"))
    if not any(taker and CACHE in inspect.signature(taker).parameters for taker in takers):
        raise NotImplementedError(_refusal("it cannot be given a cache"))


def class_of(config: Any) -> Any:
    """The class of the model that transformers makes of a config, None if it knows none."""
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    ):
        if type(config) in mapping:
            return mapping[type(config)]
    return None


def _has(config: Any, name: str) -> bool:
    """Whether a number of a config, or of one of its layers, is there and not zero."""
    try:
        return bool(getattr(config, name, None))
    except RuntimeError:
        # It differs between layers and is not told of all at once.
        return any(getattr(layer, name, None) for layer in config.per_layer_config)


def _refusal(reason: str) -> str:
    return f"CompressedCache cannot serve this model: {reason}."
