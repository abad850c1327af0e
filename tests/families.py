"""One small random model of each family, attention far from uniform."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers

from compressed_cache.wording import markdown

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
    vision: dict[str, Any] = field(default_factory=dict)
    """How to build the part of a model that reads images, beside the settings of its text."""
    compiles: bool = True
    """Whether the code that transformers has of it can be compiled."""
    compiles_layers: bool = True
    """Whether its layers can be compiled once for all."""
    turns: bool = True
    """Whether policies that turn keys can tell how it turns them."""
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
        text = {**base, **settings}
        if self.vision:
            config = getattr(transformers, self.config)(text_config=text, vision_config=self.vision)
            auto = transformers.AutoModelForImageTextToText
        else:
            config = getattr(transformers, self.config)(**text)
            auto = transformers.AutoModelForCausalLM
        config._attn_implementation = self.attention
        make: Callable[..., Any] = auto.from_config
        return make(config).eval().to(self.dtype)


_ALTERNATING = ["sliding_attention", "full_attention"]
_LINEAR = dict(
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
_NO_HISTORY = "no assisted decoding and no file of its cache"
_TEXT = "tested with text only"
_NO_TURNS = "no policy that turns keys"
_MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1]))
_VISION = dict(
    depth=1, hidden_size=32, intermediate_size=32, num_heads=4, out_hidden_size=32, patch_size=4
)
_CLIP = dict(
    model_type="clip_vision_model",
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    image_size=8,
    patch_size=4,
    projection_dim=32,
)
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
    Family(
        "Qwen3.5",
        "Qwen3_5TextConfig",
        dict(layer_types=["linear_attention", "full_attention"], **_LINEAR),
        kinds=(LINEAR, FULL),
        note=_NO_HISTORY,
        dtype=torch.float32,
    ),
    Family(
        "Gemma 4",
        "Gemma4TextConfig",
        dict(
            sliding_window=WINDOW,
            layer_types=_ALTERNATING,
            global_head_dim=8,
            num_kv_shared_layers=0,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=8,
        ),
        kinds=(SLIDING, FULL),
        note=f"without layers that share keys; {_NO_TURNS}",
        compiles_layers=False,
        turns=False,
    ),
    Family(
        "Jamba",
        "JambaConfig",
        dict(
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=4,
            mamba_d_state=8,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
        kinds=(LINEAR, FULL),
        note=f"{_NO_HISTORY}; {_NO_TURNS}",
        turns=False,
        dtype=torch.float32,
    ),
    Family(
        "Bamba",
        "BambaConfig",
        dict(
            attn_layer_indices=[1, 3],
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_n_groups=1,
        ),
        kinds=(LINEAR, FULL),
        note=_NO_HISTORY,
        dtype=torch.float32,
    ),
    Family(
        "RecurrentGemma",
        "RecurrentGemmaConfig",
        dict(block_types=["recurrent", "attention"], attention_window_size=WINDOW, lru_width=32),
        kinds=(LINEAR, SLIDING),
        note=f"nothing is left to compress; eager only; {_NO_HISTORY}; {_NO_TURNS}; no beams, "
        "snapshots or rows left out: transformers keeps its recurrent state in the model",
        turns=False,
        compiles=False,
        compiles_layers=False,
        dtype=torch.float32,
    ),
    *(
        Family(name, config, _MROPE, vision=_VISION, note=f"{_TEXT}; {_NO_TURNS}", turns=False)
        for name, config in (
            ("Qwen2-VL", "Qwen2VLConfig"),
            ("Qwen2.5-VL", "Qwen2_5_VLConfig"),
            ("Qwen3-VL", "Qwen3VLConfig"),
        )
    ),
    Family("LLaVA", "LlavaConfig", dict(model_type="llama"), vision=_CLIP, note=_TEXT),
)


# Windows, soft-capping, sinks, partial rotation, recurrence; the others are slow, being many.
_QUICK = ("Llama 3", "Gemma 2", "Gemma 3", "GPT-OSS", "GLM-4", "Qwen3-Next")
EACH_FAMILY = [
    pytest.param(one, id=one.name, marks=[] if one.name in _QUICK else pytest.mark.slow)
    for one in FAMILIES
]

# Some of those that tests/model_types.md has.
REFUSED = {
    "DeepSeek-V2, V3, Kimi and others with multi-head latent attention": "they cache one latent "
    "vector for all heads, not keys",
    "T5, BART and other encoder-decoders": "they attend to an encoder, where nothing is decoded",
    "Gemma 3n": "its last layers read the keys of earlier ones",
    "Llama 4": "chunked attention",
    "DeepSeek-V4, Falcon-H1, Inkling, Zamba, MiniMax-M3": "layers of kinds of their own",
    "Doge": "a bias told from the values in every step",
    "DiffLlama": "attends twice to the same keys",
    "Mamba, RWKV, xLSTM": "no keys and values",
    "Falcon, BLOOM, MPT, GPT-Neo": "attention that is not transformers' interface",
}


def table() -> str:
    """The families as Markdown."""
    rows = []
    for family in FAMILIES:
        kinds = " and ".join(sorted(set(family.kinds), reverse=True))
        rows.append([family.name, kinds, family.note or "-"])
    rows += [[name, "refused", reason] for name, reason in REFUSED.items()]
    return markdown(["family", "layers", "note"], rows)
