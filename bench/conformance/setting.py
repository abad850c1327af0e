"""The model, the texts and the cases that are compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.every_policy import collected

VOCABULARY = 400
PROMPTS = (100, 163, 300)
RATIOS = (0.25, 0.5, 0.7)
INTERVALS = (1, 8, 24)
DECODED_PROMPT = 100
"""Tokens before the first decode step, and how many are held after each cut."""
DECODED = 96
"""Tokens read one by one."""
NEEDS_STATISTICS = ("qfilter", "expected_attention", "duo_attention")
"""What is given statistics of the model."""
SUFFIX = " [A]"
"""What the chat template puts after a text."""
WORDINGS = {
    "repeat_prompt": "\n\nRepeat the previous context exactly.",
    "repeat_from_prompt": "\n\nRepeat the part of the previous context exactly, starting with",
}
"""The instructions of ``KVzipPress``."""


class PrefillCase(NamedTuple):
    """A prompt that is read at once and cut."""

    prompt: int
    ratio: float

    @property
    def kept(self) -> int:
        # As kvpress rounds it.
        return int(self.prompt * (1 - self.ratio))


class DecodingCase(NamedTuple):
    """A text that is read token by token and cut after every ``interval`` of them."""

    interval: int

    @property
    def prompt(self) -> int:
        return DECODED_PROMPT


Case = PrefillCase | DecodingCase
PREFILL_CASES = [PrefillCase(prompt, ratio) for prompt in PROMPTS for ratio in RATIOS]
DECODING_CASES = [DecodingCase(interval) for interval in INTERVALS]


class Setting(NamedTuple):
    """What both sides are given."""

    model: Any
    weights: Path
    statistics: Mapping[str, str]
    """The file of each kind."""
    tokenizer: Any
    """Makes a token of each byte of an instruction."""


def make(folder: Path) -> Setting:
    """A small Llama with random weights in float64 whose attention is far from uniform.

    Args:
        folder: where its weights and its tokenizer are written.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=VOCABULARY,
        initializer_range=0.3,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model: Any = LlamaForCausalLM(config).double().eval()
    weights = folder / "model.safetensors"
    save_file({name: part.contiguous() for name, part in model.state_dict().items()}, weights)
    files = {kind: str(collected(kind, model)) for kind in NEEDS_STATISTICS}
    _tokenizer().save_pretrained(folder)
    return Setting(model, weights, files, AutoTokenizer.from_pretrained(folder))


def _tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # kvpress repeats what comes after the start of the template: as long as the sinks are here.
    template = "[Q] {{ messages[0]['content'] }}" + SUFFIX
    return PreTrainedTokenizerFast(tokenizer_object=tokens, chat_template=template)


def text(case: Case) -> list[int]:
    """Tokens without repetition, as many as a case reads: equal tokens have equal key norms in the
    first layer."""
    generator = torch.Generator().manual_seed(case.prompt)
    count = case.prompt if isinstance(case, PrefillCase) else case.prompt + DECODED
    return (torch.randperm(VOCABULARY, generator=generator)[:count]).tolist()
