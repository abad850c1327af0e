"""What a layer refuses, in words, before any work is done."""

from typing import Any

from torch import Tensor

from compressed_cache.rules import Rules

_UNSUPPORTED = {
    "sliding_window": "sliding-window attention",
    "softcap": "soft-capped attention logits",
    "s_aux": "learned attention sinks",
    "position_bias": "a learned position bias",
}


def check_batch(held: Tensor, new: Tensor) -> None:
    """Raises ``ValueError`` if new keys come in another batch size than the held ones."""
    if held.shape[0] != new.shape[0]:
        raise ValueError(
            f"batch size must stay {held.shape[0]} until the cache is reset, got {new.shape[0]}. "
            "Call cache.reset() or use a new CompressedCache."
        )


def check_prompt(real: Tensor, rules: Rules) -> None:
    """Raises ``ValueError`` if a protected prompt (``real``: ``[B, L]`` bool) leaves no room."""
    if not rules.protect_prompt:
        return
    longest = int(real.sum(dim=1).max())
    least = longest + rules.recent + 1
    if least > rules.budget:
        raise ValueError(
            "budget must be at least prompt + recent + 1 with protect_prompt=True "
            f"({longest} + {rules.recent} + 1 = {least}), got {rules.budget}. "
            "Raise budget, lower recent, or set protect_prompt=False."
        )


def check_attention(layer: int, module: Any, arguments: dict[str, Any]) -> None:
    """Raises ``NotImplementedError`` for an attention layer that slots cannot serve."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None) or ""
    if implementation.startswith("paged|"):
        raise NotImplementedError(
            f"attn_implementation {implementation!r} keeps keys and values in pages of its own, so "
            "CompressedCache cannot work with it. Use 'sdpa', 'eager', 'flash_attention_2' or "
            "'flex_attention'."
        )
    for name, meaning in _UNSUPPORTED.items():
        if arguments.get(name) is not None:
            raise NotImplementedError(
                f"layer {layer} ({type(module).__name__}) uses {meaning}, which CompressedCache "
                "does not support"
            )
