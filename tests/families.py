"""One small random model of each family, attention far from uniform."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from compressed_cache.markdown import markdown

VOCABULARY = 160
WINDOW = 10
FULL, SLIDING, LINEAR = "full", "sliding", "linear"


@dataclass(frozen=True)
class Family:
    """How to build a model, and what is special about its cache."""

    name: str
    config: str
    """Name of the config class; the model is what ``AutoModelForCausalLM`` makes of it."""
    settings: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    kinds: tuple[str, ...] = (FULL, FULL)
    """Of each layer, as the cache must find out by itself."""
    note: str = ""
    window: int = WINDOW
    dtype: torch.dtype = torch.float64
    """float64 keeps rounding out of comparisons, where transformers computes right in it."""

    def make(self, *, repeats: int = 1) -> Any:
        """Two layers, so many times, in evaluation mode."""
        torch.manual_seed(0)
        # What is said of each layer is a list.
        settings = {
            name: value * repeats if isinstance(value, list) else value
            for name, value in self.settings.items()
        }
        base = dict(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2 * repeats,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.3,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        config = getattr(transformers, self.config)(**{**base, **settings})
        config._attn_implementation = self.attention
        make: Callable[..., Any] = transformers.AutoModelForCausalLM.from_config
        return make(config).eval().to(self.dtype)


_ALTERNATING = ["sliding_attention", "full_attention"]
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)

FAMILIES = (
    Family("Llama 3", "LlamaConfig"),
    Family(
        "Mistral",
        "MistralConfig",
        dict(sliding_window=WINDOW),
        kinds=(SLIDING, SLIDING),
        note="with `sliding_window` set nothing is left to compress; later releases have none",
    ),
    Family("Mistral without a window", "MistralConfig", dict(sliding_window=None)),
    Family("Qwen2", "Qwen2Config"),
    Family("Qwen3", "Qwen3Config"),
    Family("Phi-3", "Phi3Config", dict(sliding_window=None)),
    Family(
        "Gemma 2",
        "Gemma2Config",
        dict(
            sliding_window=WINDOW,
            layer_types=_ALTERNATING,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=8,
        ),
        attention="eager",
        kinds=(SLIDING, FULL),
        note="soft-capped logits",
        dtype=torch.float32,
    ),
    Family(
        "Gemma 3",
        "Gemma3TextConfig",
        dict(sliding_window=WINDOW, layer_types=_ALTERNATING, query_pre_attn_scalar=8),
        kinds=(SLIDING, FULL),
    ),
    Family("Granite", "GraniteConfig", dict(attention_multiplier=0.2)),
    Family("OLMo 2", "Olmo2Config"),
    Family("SmolLM3", "SmolLM3Config", dict(no_rope_layers=[1, 0]), note="layers without RoPE"),
    Family("GLM-4", "Glm4Config", dict(partial_rotary_factor=0.5)),
    Family("DeepSeek-R1-Distill-Qwen", "Qwen2Config", dict(tie_word_embeddings=False)),
    Family("DeepSeek-R1-Distill-Llama", "LlamaConfig", dict(tie_word_embeddings=False)),
    Family(
        "GPT-OSS",
        "GptOssConfig",
        dict(
            sliding_window=WINDOW,
            layer_types=_ALTERNATING,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        attention="eager",
        kinds=(SLIDING, FULL),
        note="learned attention sinks, mixture of experts",
        dtype=torch.float32,
    ),
    Family(
        "Qwen3-MoE",
        "Qwen3MoeConfig",
        _EXPERTS,
        note="mixture of experts",
        dtype=torch.float32,
    ),
    Family(
        "Mixtral",
        "MixtralConfig",
        dict(num_local_experts=4, sliding_window=None),
        note="mixture of experts",
        dtype=torch.float32,
    ),
    Family(
        "LFM2",
        "Lfm2Config",
        dict(layer_types=["conv", "full_attention"]),
        kinds=(LINEAR, FULL),
        note="short convolutions; no assisted decoding and no file of its cache",
    ),
    Family(
        "Qwen3-Next",
        "Qwen3NextConfig",
        dict(
            **_EXPERTS,
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            shared_expert_intermediate_size=16,
        ),
        kinds=(LINEAR, FULL),
        note="no assisted decoding and no file of its cache: a recurrent state has no history",
        dtype=torch.float32,
    ),
)


# What tests/test_errors.py holds.
REFUSED = {
    "DeepSeek-V2, V3 and others with multi-head latent attention": "they cache one latent vector "
    "for all heads, not keys",
    "T5, BART and other encoder-decoders": "they attend to an encoder, where nothing is decoded",
    "Gemma 3n": "its last layers read the keys of earlier ones",
    "Llama 4": "chunked attention",
}


def table() -> str:
    """The families as Markdown, for the README."""
    rows = []
    for family in FAMILIES:
        kinds = " and ".join(sorted(set(family.kinds), reverse=True))
        rows.append([family.name, kinds, family.note or "-"])
    rows += [[name, "refused", reason] for name, reason in REFUSED.items()]
    return markdown(["family", "layers", "note"], rows) + "\n"


if __name__ == "__main__":
    page = Path(__file__).parents[1] / "README.md"
    marks = r"(<!-- families:begin -->\n).*?(<!-- families:end -->)"
    text = re.sub(marks, lambda m: m[1] + table() + m[2], page.read_text(), flags=re.DOTALL)
    page.write_text(text)
