"""One small random model of each family, attention far from uniform."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCABULARY = 160
WINDOW = 10


@dataclass(frozen=True)
class Family:
    """How to build a model, and what is special about its cache."""

    name: str
    config: str
    """Name of the config class; the model is what ``AutoModelForCausalLM`` makes of it."""
    settings: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    layers: str = "full"
    compiles: bool = True

    def make(self) -> Any:
        """Two layers, or four where kinds alternate; float32, evaluation mode."""
        torch.manual_seed(0)
        base = dict(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.3,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        config = getattr(transformers, self.config)(**{**base, **self.settings})
        config._attn_implementation = self.attention
        make: Callable[..., Any] = transformers.AutoModelForCausalLM.from_config
        return make(config).eval()


_ALTERNATING = ["sliding_attention", "full_attention"]
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)

FAMILIES = (
    Family("Llama 3", "LlamaConfig"),
    Family("Mistral", "MistralConfig", dict(sliding_window=WINDOW), layers="sliding"),
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
        layers="sliding and full",
    ),
    Family(
        "Gemma 3",
        "Gemma3TextConfig",
        dict(sliding_window=WINDOW, layer_types=_ALTERNATING, query_pre_attn_scalar=8),
        layers="sliding and full",
    ),
    Family("Granite", "GraniteConfig", dict(attention_multiplier=0.2)),
    Family("OLMo 2", "Olmo2Config"),
    Family("SmolLM3", "SmolLM3Config", dict(no_rope_layers=[1, 0])),
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
        layers="sliding and full",
    ),
    Family("Qwen3-MoE", "Qwen3MoeConfig", _EXPERTS),
    Family("Mixtral", "MixtralConfig", dict(num_local_experts=4, sliding_window=None)),
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
        layers="linear and full",
    ),
)
