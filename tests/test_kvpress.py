"""The process that the benchmark of kvpress asks for tokens, here without kvpress."""

import sys
from contextlib import closing
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from bench.contenders import BASELINE, Generation
from bench.kvpress import KvpressGeneration, PressSetting

PYTHON = Path(sys.executable)


@pytest.mark.slow
def test_a_text_goes_on_as_far_as_it_is_asked(model: LlamaForCausalLM) -> None:
    like = Generation(BASELINE, model, batch=2, prompt=5)
    with closing(KvpressGeneration(PYTHON, None, like)) as text:
        assert len(text.continue_by(3)) == 3
        assert text.held_tokens == 5 + 3  # The last token generated is not read yet.
        assert len(text.continue_by(2)) == 2
        assert text.held_tokens == 5 + 3 + (1 + 2)


@pytest.mark.slow
def test_a_process_that_ends_early_is_an_error(model: LlamaForCausalLM) -> None:
    like = Generation(BASELINE, model, batch=1, prompt=5)
    with pytest.raises(RuntimeError, match="ended early, with status 1"):
        KvpressGeneration(PYTHON, PressSetting("NoSuchPress", interval=16), like)
