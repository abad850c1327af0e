"""The shape of the model, its first weights, and its files."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from compressed_cache.reasoner.problems import VOCABULARY, Problem
from compressed_cache.reasoner.tokenizer import build_tokenizer

IDS = {word: i for i, word in enumerate(VOCABULARY)}
LAYERS = 4
KEY_VALUE_HEADS = 2
GROUPS = 2  # query heads for each of them
HEAD_DIM = 32
ROPE_THETA = 10_000.0
EMBEDDING = 0.3  # standard deviation at the start: smaller ones change too fast to build upon


def build_model() -> LlamaForCausalLM:
    """A Llama of 0.6 million parameters with two query heads for each key/value head."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=KEY_VALUE_HEADS * GROUPS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HEAD_DIM,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=IDS["<bos>"],
        eos_token_id=IDS["<eos>"],
        pad_token_id=IDS["<pad>"],
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING)
    _look_back(model)
    return model


@torch.no_grad()
def _look_back(model: LlamaForCausalLM) -> None:
    """Starts one head of the first layer as a previous-token head, half of an induction circuit.

    A component that all embeddings share makes queries and keys constant, and keys are turned by
    one position, so their rotary products peak at distance one. Found by gradient descent alone,
    the same head takes most of the training.
    """
    model.model.embed_tokens.weight[:, 0] = 5 * EMBEDDING
    attention: Any = model.model.layers[0].self_attn
    for pair in range(5):
        angle = ROPE_THETA ** (-2 * pair / HEAD_DIM)
        for head in range(GROUPS):
            attention.q_proj.weight[head * HEAD_DIM + pair, 0] += 1.6
        attention.k_proj.weight[pair, 0] += 1.6 * math.cos(angle)
        attention.k_proj.weight[pair + HEAD_DIM // 2, 0] += 1.6 * math.sin(angle)


def encode(problem: Problem) -> list[int]:
    """Token ids of ``<bos> prompt trace <eos>``."""
    words = f"<bos> {problem.prompt} {problem.trace} <eos>".split()
    return [IDS[word] for word in words]


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes weights, configuration and tokenizer in the format of transformers."""
    model.generation_config = GenerationConfig(
        bos_token_id=IDS["<bos>"],
        eos_token_id=IDS["<eos>"],
        pad_token_id=IDS["<pad>"],
        do_sample=False,
    )
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
