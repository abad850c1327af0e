"""What this library relies on in transformers and torch without having been promised it.

When a release moves one of these, exactly the test that names it fails, and says where to look.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CompileConfig, GenerationMixin, PreTrainedModel, cache_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from compressed_cache.versions import cache_argument


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(inspect.unwrap(function)).parameters)


def _source(function: Any) -> str:
    return inspect.getsource(inspect.unwrap(function))


def attention_functions_are_looked_up_by_name_with_a_default() -> bool:
    found = _parameters(AttentionInterface.get_interface)
    return found == ["self", "attn_implementation", "default"]


def models_look_attention_up_in_each_forward() -> bool:
    from transformers.models.llama.modeling_llama import LlamaAttention

    return "ALL_ATTENTION_FUNCTIONS.get_interface" in _source(LlamaAttention.forward)


def caches_are_updated_before_attention_is_called() -> bool:
    from transformers.models.llama.modeling_llama import LlamaAttention

    source = _source(LlamaAttention.forward)
    return source.index(".update(") < source.index("get_interface")


def layers_implement_these_methods() -> bool:
    wanted = {"lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "get_max_length"}
    return set(cache_utils.CacheLayerMixin.__abstractmethods__) == wanted


def layers_are_asked_for_mask_sizes_by_query_length() -> bool:
    layer = _parameters(cache_utils.CacheLayerMixin.get_mask_sizes)
    cache = _parameters(cache_utils.Cache.get_mask_sizes)
    return layer == ["self", "query_length"] and cache == ["self", "query_length", "layer_idx"]


def masks_are_made_outside_of_the_compiled_step() -> bool:
    source = _source(GenerationMixin.prepare_inputs_for_generation)
    return "is_compileable" in source and "create_masks_for_generate" in source


def generate_compiles_caches_that_say_so() -> bool:
    source = _source(GenerationMixin._valid_auto_compile_criteria)
    return "is_compileable" in source and "_compile_all_devices" in source


def compilation_can_be_asked_for_on_any_device() -> bool:
    return hasattr(CompileConfig(), "_compile_all_devices")


def compiled_calls_come_from_the_model() -> bool:
    return _parameters(PreTrainedModel.get_compiled_call) == ["self", "compile_config"]


def assisted_decoding_is_given_the_prompt_and_the_cache() -> bool:
    return _parameters(GenerationMixin._assisted_decoding)[:2] == ["self", "input_ids"]


def assisted_decoding_says_that_it_begins_and_takes_tokens_back() -> bool:
    source = _source(GenerationMixin._assisted_decoding)
    return ".activate_past_recording()" in source and ".crop(-" in source


def assisted_decoding_reads_the_whole_text_first() -> bool:
    source = _source(GenerationMixin._assisted_decoding)
    given = _parameters(GenerationMixin.prepare_inputs_for_generation)[:3]
    is_whole = "if not is_first_iteration else None" in source and "next_sequence_length" in source
    return is_whole and given == ["self", "input_ids", "next_sequence_length"]


def arguments_of_decoding_loops_are_extracted_by_one_method() -> bool:
    given = _parameters(GenerationMixin._extract_generation_mode_kwargs)
    return given == [
        "self",
        "custom_generate",
        "kwargs",
        "synced_gpus",
        "assistant_model",
        "streamer",
    ]


def models_decode_by_methods_of_these_names() -> bool:
    source = _source(GenerationMixin._sample)
    methods = ("_prefill", "_update_model_kwargs_for_generation", "prepare_inputs_for_generation")
    more = ("_valid_auto_compile_criteria", "get_compiled_call", "_optimize_model_for_decode")
    return all(f"self.{name}(" in source for name in methods + more)


def a_step_is_given_another_token_and_position_and_nothing_else() -> bool:
    """It is why a loop may prepare a step once; read both anew where one has changed."""
    kept = _source(GenerationMixin._update_model_kwargs_for_generation)
    names = set(re.findall(r'model_kwargs\.get\("?(\w+)', kept))
    known = {"token_type_ids", "mm_token_type_ids", "position_ids_key", "attention_mask_key"}
    return names == known


def beams_reorder_the_cache() -> bool:
    return "reorder_cache" in _source(GenerationMixin._beam_search)


def prompts_are_cut_into_chunks_by_prefill_chunk_size() -> bool:
    return "prefill_chunk_size" in _source(GenerationMixin._prefill)


def linear_attention_keeps_its_states_in_dictionaries() -> bool:
    layer = cache_utils.LinearAttentionLayer()
    states = layer.conv_states, layer.recurrent_states, layer.has_previous_state
    return all(isinstance(state, dict) for state in states)


def the_argument_of_a_cache_is_one_of_two_names() -> bool:
    (name,) = cache_argument(None)
    from transformers import LlamaForCausalLM

    return name in _parameters(LlamaForCausalLM.forward)


def back_ends_and_their_masks_have_these_names() -> bool:
    names = {"sdpa", "flash_attention_2", "flex_attention"}
    masks = set(ALL_MASK_ATTENTION_FUNCTIONS.keys())
    return names <= set(ALL_ATTENTION_FUNCTIONS.keys()) and names | {"eager"} <= masks


def tensors_can_be_marked_static() -> bool:
    return callable(torch._dynamo.mark_static_address)


def compilation_can_be_refused_with_a_reason() -> bool:
    return "reason" in _parameters(torch.compiler.disable)


DETAILS: list[Callable[[], bool]] = [
    attention_functions_are_looked_up_by_name_with_a_default,
    models_look_attention_up_in_each_forward,
    caches_are_updated_before_attention_is_called,
    layers_implement_these_methods,
    layers_are_asked_for_mask_sizes_by_query_length,
    masks_are_made_outside_of_the_compiled_step,
    generate_compiles_caches_that_say_so,
    compilation_can_be_asked_for_on_any_device,
    compiled_calls_come_from_the_model,
    assisted_decoding_is_given_the_prompt_and_the_cache,
    assisted_decoding_says_that_it_begins_and_takes_tokens_back,
    assisted_decoding_reads_the_whole_text_first,
    arguments_of_decoding_loops_are_extracted_by_one_method,
    models_decode_by_methods_of_these_names,
    a_step_is_given_another_token_and_position_and_nothing_else,
    beams_reorder_the_cache,
    prompts_are_cut_into_chunks_by_prefill_chunk_size,
    linear_attention_keeps_its_states_in_dictionaries,
    the_argument_of_a_cache_is_one_of_two_names,
    back_ends_and_their_masks_have_these_names,
    tensors_can_be_marked_static,
    compilation_can_be_refused_with_a_reason,
]


@pytest.mark.parametrize("detail", DETAILS, ids=lambda detail: detail.__name__)
def test_a_private_detail_is_where_it_was(detail: Callable[[], bool]) -> None:
    assert detail(), f"not so any more in this release: {detail.__name__.replace('_', ' ')}"
