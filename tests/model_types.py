"""A tiny random model of every model type that transformers knows, and what it makes of a cache.

``python -m tests.model_types`` writes the table beside this file.
"""

import copy
import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compressed_cache import CompressedCache
from compressed_cache.versions import cache_argument
from compressed_cache.wording import markdown

TABLE = Path(__file__).with_name("model_types.md")
REFUSAL = "CompressedCache cannot serve this model: "
RIGHT, REFUSED, NOT_BUILT, WRONG = "right", "refused", "cannot be built here", "wrong"

VOCABULARY = 160
PROMPT, NEW = 24, 10
PADDING = (7, 0, 2)
WINDOW = 10
_FIRST_SPECIAL = 140
_MAX_PARAMETERS = 40_000_000

_CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_IMAGE_TEXT = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
MODELS = sorted({*_CAUSAL.items(), *_IMAGE_TEXT.items()})
"""Model types, each with the name of the class of models that is made of it."""


class Outcome(NamedTuple):
    """What became of one model."""

    verdict: str
    reason: str = ""


# Whatever of it a config has, and so do the configs inside of it.
_TINY: dict[str, Any] = {
    name: value
    for value, names in (
        (VOCABULARY, "vocab_size"),
        (0.3, "initializer_range init_std"),
        (0, "pad_token_id"),
        (1, "bos_token_id decoder_start_token_id"),
        (2, "eos_token_id"),
        (True, "use_cache is_decoder"),
        (128, "max_position_embeddings n_positions n_ctx max_seq_len"),
        (128, "original_max_position_embeddings"),
        (WINDOW, "sliding_window sliding_window_size"),
        (2, "depth encoder_layers decoder_layers layers num_decoder_layers"),
        (4, "num_attention_heads num_heads n_head n_heads swa_num_attention_heads"),
        (4, "encoder_attention_heads decoder_attention_heads attention_heads"),
        (2, "num_key_value_heads kv_n_heads num_kv_heads swa_num_key_value_heads"),
        (8, "head_dim swa_head_dim d_kv kv_channels dim_head rotary_dim"),
        (8, "qk_rope_head_dim qk_nope_head_dim v_head_dim"),
        (16, "qk_head_dim index_head_dim"),
        (4, "n_routed_experts num_experts num_local_experts moe_num_experts"),
        (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k"),
        (1, "n_group topk_group num_expert_group"),
        (3, "num_channels"),
    )
    for name in names.split()
}
# None means that there is none of it.
_OPTIONAL = ("sliding_window", "n_group", "topk_group", "original_max_position_embeddings")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_KINDS = ("layer_types", "layers_block_type", "block_types", "attention_layers")

# Tried in turn.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"mrope_section": [2, 1, 1]},
    {"mrope_section": [1, 1, 0]},
)

_MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, mamba_expand=2)
_ROPE_OF_KINDS = {
    kind: dict(rope_type="default", rope_theta=1e4)
    for kind in ("full_attention", "sliding_attention")
}
_INDEXER = dict(indexer_n_heads=4, indexer_kv_heads=2, indexer_head_dim=8, indexer_budget=8)

# What one of them needs beyond that.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": dict(audio_token_offset=64),
    "bamba": dict(_MAMBA, attn_layer_indices=[1]),
    "blt": dict(num_hidden_layers=2),
    "chameleon": dict(vocabulary_map={"<image>": 150}),
    "cohere_compass": dict(text_config=dict(rope_parameters=_ROPE_OF_KINDS)),
    "cohere_compass_text": dict(rope_parameters=_ROPE_OF_KINDS),
    "dbrx": dict(attn_config=dict(rope_theta=1e4, clip_qkv=8.0)),
    "deepseek_ocr2": dict(text_config=dict(mlp_layer_types=["dense", "dense"])),
    "diffusion_gemma": dict(
        text_config=dict(num_experts=4, top_k_experts=2, moe_intermediate_size=16)
    ),
    "dory": dict(
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        n_input_layers=1,
        n_recurrent_layers=1,
        n_output_layers=1,
    ),
    "dots1": dict(
        moe_intermediate_size=16, n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2
    ),
    "emu3": dict(vocabulary_map={"<image>": 150}),
    "ernie4_5_vl_moe": dict(
        text_config=dict(
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
        )
    ),
    "gemma3n_text": dict(num_kv_shared_layers=0),
    "gemma4": dict(text_config=dict(vocab_size_per_layer_input=VOCABULARY)),
    "gemma4_text": dict(vocab_size_per_layer_input=VOCABULARY),
    "granite4_vision": dict(deepstack_layer_map=[]),
    "granitemoehybrid": dict(_MAMBA, layer_types=["linear_attention", "full_attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(num_heads=4, head_dim=16, expand=2, n_groups=1),
    "marian": dict(decoder_vocab_size=VOCABULARY),
    "minimax_m3_vl": dict(text_config=dict(layer_types=["full_attention", "minimax_m3_sparse"])),
    "minimax_m3_vl_text": dict(layer_types=["full_attention", "minimax_m3_sparse"]),
    "molmo2": dict(adapter_config=dict(vision_feature_layer=[-1, -2])),
    "muse_spark": dict(
        audio_config=dict(num_hidden_layers=4, hidden_sizes=[32] * 4, depths=[1] * 4)
    ),
    "musicgen": dict(decoder=dict(num_codebooks=1)),
    "musicgen_melody": dict(decoder=dict(num_codebooks=1)),
    "nemotron_h_omni": dict(vision_config=dict(video_temporal_patch_size=2)),
    "phimoe": dict(sliding_window=WINDOW),
    "qwen2_5_omni_thinker": dict(vision_start_token_id=150),
    "qwen3_omni_moe_thinker": dict(vision_start_token_id=150),
    "qwen4_exp": dict(text_config=_INDEXER),
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": dict(
        block_types=["recurrent", "attention"], lru_width=32, attention_window_size=WINDOW
    ),
    "reformer": dict(axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 16], num_buckets=4),
    "step3p7": dict(text_config=dict(sliding_window=WINDOW)),
    "whisper": dict(max_target_positions=128),
    "xlnet": dict(d_head=8),
    "xmod": dict(default_language="en_XX"),
    "zamba2": dict(mamba_headdim=16, n_mamba_heads=4, mamba_d_state=16, mamba_ngroups=1),
    "zaya": dict(num_experts_per_tok=1),
}


# What one of them cannot do without even before it is made small.
_NEEDED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": dict(
        text_config=dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)
    ),
}


def tiny(config: Any, overrides: dict[str, Any], variant: dict[str, Any], ids: Any = None) -> Any:
    """A config of the same class with everything small."""
    ids = ids or itertools.count(_FIRST_SPECIAL)
    layers: Any = next((getattr(config, name) for name in _LAYERS if hasattr(config, name)), 2)
    chosen = _one_of_each(config, layers)
    made: dict[str, Any] = {}
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    optional = {*_OPTIONAL} - ({"sliding_window"} if slides else set())
    inner = {
        name: tiny(value, overrides.get(name, {}), variant, ids)
        for name, value in vars(config).items()
        if isinstance(value, transformers.PreTrainedConfig)
    }
    for name, value in vars(config).items():
        if name in inner or (name in _TINY and isinstance(value, list | tuple)):
            continue
        if name in _LAYERS:
            made[name] = len(chosen)
        elif name in _TINY and (value is not None or name not in optional):
            made[name] = variant.get(name, _TINY[name])
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            made[name] = next(ids)
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            made[name] = _tiny_rope(value, variant)
        elif isinstance(value, int) and value > 32:
            made[name] = 32
        elif isinstance(value, list) and len(value) == layers and isinstance(layers, int):
            made[name] = [value[index] for index in chosen]
    return type(config)(**{**made, **overrides, **inner})


def _tiny_rope(rope: dict[str, Any], variant: dict[str, Any]) -> dict[str, Any]:
    inner = {
        name: _tiny_rope(value, variant) for name, value in rope.items() if isinstance(value, dict)
    }
    section = variant.get("mrope_section", [2, 1, 1] if "mrope_section" in rope else None)
    return rope | inner | ({"mrope_section": section} if section else {})


def _one_of_each(config: Any, layers: Any) -> list[int]:
    """Indices of two or more layers, of every kind one."""
    kinds = next((found for name in _KINDS if (found := getattr(config, name, None))), None)
    if not kinds:
        return [0, 1]
    first = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())
    return first if len(first) > 1 else [first[0], min(first[0] + 1, len(kinds) - 1)]


def _config(kind: str) -> Any:
    return CONFIG_MAPPING[kind](**_NEEDED.get(kind, {}))


def make(kind: str, made: str) -> Any:
    """A model of a class with random weights, in evaluation mode."""
    errors: list[Exception] = []
    for variant in _VARIANTS:
        try:
            model = _make(kind, made, variant)
            generate(model, *prompts()[0], None)
        except Exception as error:
            errors.append(error)
        else:
            return model
    raise errors[0]


def _make(kind: str, made: str, variant: dict[str, Any]) -> Any:
    config = tiny(_config(kind), _OVERRIDES.get(kind, {}), variant)
    cls: Any = getattr(transformers, made)
    text = config.get_text_config(decoder=True)
    if type(config) is not cls.config_class and type(text) is cls.config_class:
        config = text
    with torch.device("meta"):
        empty = cls._from_config(copy.deepcopy(config))
    count = sum(parameter.numel() for parameter in empty.parameters())
    if count > _MAX_PARAMETERS:
        raise ValueError(f"{count} parameters are not a tiny model")
    torch.manual_seed(0)
    model = cls._from_config(config).eval().float()
    generation = model.generation_config
    generation.eos_token_id = generation.forced_eos_token_id = None
    generation.bos_token_id = generation.decoder_start_token_id = 1
    generation.cache_implementation = None
    generation.pad_token_id = 0
    return model


def prompts() -> list[tuple[Tensor, Tensor]]:
    """Token ids and mask of one row, and of a batch with padding on the left."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randperm(_FIRST_SPECIAL - 5, generator=generator)[:PROMPT] + 4 for _ in PADDING]
    ids = torch.stack(rows)
    mask = torch.ones_like(ids)
    for row, padding in enumerate(PADDING):
        ids[row, :padding] = mask[row, :padding] = 0
    return [(ids[1:2], mask[1:2]), (ids, mask)]


def _more(model: Any, rows: int) -> dict[str, Any]:
    """What a model wants beside a text."""
    image = torch.zeros(rows, 3, 32, 32)
    if model.config.model_type == "blip":
        return {"pixel_values": image}
    if model.config.model_type == "idefics":
        seen = torch.ones(rows, PROMPT, 1, dtype=torch.long)
        return {"pixel_values": image[:, None], "image_attention_mask": seen}
    return {}


def generate(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> Any:
    """Tokens and logits."""
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **_more(model, len(ids)),
        **cache_argument(cache),
    )


def judge(kind: str, made: str) -> Outcome:
    """Whether a model generates with a cache that holds everything as it does with its own.

    One that cannot generate is still refused if its config is.
    """
    try:
        model = make(kind, made)
        # First, as some models keep to the rows of the batch they read last.
        called = _called(model)
        own = [generate(model, *prompt, None) for prompt in prompts()]
    except Exception as error:
        refusal = _tried(lambda: _accepted(kind))
        return refusal if refusal.verdict == REFUSED else Outcome(NOT_BUILT, brief(error))
    alone, batch = zip(prompts(), own, strict=True)
    # Of settings and prompts each at least once, as each takes as long as all before.
    generated = [
        _tried(functools.partial(_compared, model, *of_prompt, setting))
        for of_prompt, setting in (
            (batch, dict(policy="full")),
            (alone, dict(policy="h2o")),
            (batch, dict(policy="h2o", config=model.config)),
        )
    ]
    found = list(dict.fromkeys(called + generated))
    if len(found) == 1:
        return found[0]
    return Outcome(WRONG, "; ".join(": ".join(one) for one in found))


def _accepted(kind: str) -> Outcome:
    CompressedCache(config=_config(kind))
    return Outcome(RIGHT)


def _called(model: Any) -> list[Outcome]:
    """The same of calls without ``generate``, nothing if the model asks nothing of the cache."""
    own = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache = CompressedCache("h2o", 64)
    try:
        expected = _forward(model, own)
    except Exception:
        expected = None

    def compared() -> Outcome:
        got = _forward(model, cache)
        return Outcome(RIGHT) if expected is None else _close(zip(expected, got, strict=True))

    found = _tried(compared)
    asked = cache.layers and (expected is not None or found.verdict == RIGHT)
    return [found] if asked or found.verdict == REFUSED else []


def _forward(model: Any, cache: Any) -> list[Tensor]:
    """Logits of a prompt, and of a step that follows."""
    ids, mask = prompts()[0]
    longer = torch.ones(1, PROMPT + 1, dtype=mask.dtype)
    with torch.no_grad():
        return [
            model(input_ids=tokens, attention_mask=seen, **cache_argument(cache)).logits
            for tokens, seen in ((ids, mask), (ids[:, :1], longer))
        ]


def _tried(run: Callable[[], Outcome]) -> Outcome:
    try:
        return run()
    except NotImplementedError as error:
        if str(error).startswith(REFUSAL):
            return Outcome(REFUSED, str(error).removeprefix(REFUSAL).removesuffix("."))
        return Outcome(WRONG, brief(error))
    except Exception as error:
        return Outcome(WRONG, brief(error))


def _compared(
    model: Any, prompt: tuple[Tensor, Tensor], own: Any, settings: dict[str, Any]
) -> Outcome:
    cache = CompressedCache(budget=64, **settings)
    got = generate(model, *prompt, cache)
    if cache.get_seq_length() != own.sequences.shape[1] - 1:
        return Outcome(WRONG, f"the cache saw {cache.get_seq_length()} tokens")
    if not torch.equal(own.sequences, got.sequences):
        return Outcome(WRONG, "other tokens")
    return _close(zip(own.logits, got.logits, strict=True))


def _close(pairs: Iterable[tuple[Tensor, Tensor]]) -> Outcome:
    error = max(float((own - got).abs().max() / own.abs().max()) for own, got in pairs)
    return Outcome(RIGHT) if error < 1e-4 else Outcome(WRONG, f"logits differ by {error:.0e}")


def table() -> str:
    """The outcome of every model as Markdown."""
    rows = []
    for kind, made in MODELS:
        outcome = judge(kind, made)
        rows.append([kind, made, outcome.verdict, outcome.reason.replace("|", "/") or "-"])
    counts = Counter(verdict for _, _, verdict, _ in rows)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (RIGHT, REFUSED, NOT_BUILT))
    return (
        f"Every causal and image-text model type of transformers {transformers.__version__} as a "
        f"tiny random model: {summary}.\n\n"
        f"*{RIGHT}*: with `full` and with `h2o`, as long as nothing is evicted, in a padded batch "
        "and alone, tokens and logits are those of the model's own cache. "
        f"*{REFUSED}*: with this reason, whether `config=` is given or not. "
        "`python -m tests.model_types` writes this file.\n\n"
        + markdown(["model type", "class", "outcome", "reason"], rows)
        + "\n"
    )


def read_table() -> dict[tuple[str, str], Outcome]:
    """What the table says of every type and class."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    cells = [line.strip("| ").split(" | ") for line in lines[2:]]
    return {
        (kind, made): Outcome(verdict, "" if reason == "-" else reason)
        for kind, made, verdict, reason in cells
    }


def brief(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # A validator says the reason in its second line.
    said = lines[1] if "alidation" in lines[0] and len(lines) > 1 else lines[0]
    return f"{type(error).__name__}: {said[:160]}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    TABLE.write_text(table())
