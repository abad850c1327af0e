"""Small random models whose attention is far from uniform."""

import os
from collections.abc import Callable, Iterator
from typing import Any

# Tests run side by side, and so do the processes that they start: a thread for each is enough.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton reads this when it is imported, which transformers may do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from compressed_cache.policies import gate_file
from compressed_cache.policies import statistics_file as files
from tests.made_up_statistics import load_or_make_up, load_or_make_up_gate
from tests.reference import comparison
from tests.reference.llama import ReferenceLlama
from tests.reference.policies import Rules, full

VOCABULARY = 400

# Each of these is for one process, because its tests share what takes long to make.
_FILES_OF_ONE_PROCESS = ("test_autoload.py", "test_report_page.py", "test_sweep_kills.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives any other test to whoever is free. Marked groups have no effect under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.endswith(_FILES_OF_ONE_PROCESS) else nodeid

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For each test anew, because commands that are tested ask for more; and what a test does with
    gradients ends with it."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    yield
    assert torch.is_grad_enabled()


@pytest.fixture(autouse=True)
def _statistics_of_any_model(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models without a file of statistics have made-up ones, those of the reference."""
    if request.node.get_closest_marker("real_statistics"):
        return
    monkeypatch.setattr(files, "load", load_or_make_up)
    monkeypatch.setattr(gate_file, "load", load_or_make_up_gate)


def make_llama(**changes: object) -> LlamaForCausalLM:
    """Two layers with grouped queries 2:1, in evaluation mode."""
    torch.manual_seed(0)
    settings = dict(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=VOCABULARY,
        initializer_range=0.3,
        max_position_embeddings=16384,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LlamaForCausalLM]:
    """A factory of :func:`make_llama`'s models."""
    return make_llama


@pytest.fixture(scope="session")
def model(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="session")
def precise_model() -> LlamaForCausalLM:
    """Float64, for comparisons with the reference."""
    return comparison.make_model()


@pytest.fixture(scope="session")
def reference(precise_model: LlamaForCausalLM) -> ReferenceLlama:
    return ReferenceLlama(precise_model)


@pytest.fixture(scope="session")
def tolerance(reference: ReferenceLlama) -> float:
    """Four times what transformers loses in float32 over a full cache; logits are around 2."""
    text = comparison.distinct_tokens(50, seed=0)
    with torch.no_grad():
        output = comparison.make_model(torch.float32)(torch.tensor([text]), use_cache=False)
    trace = reference.generate(text[:1], 50, score=full, rules=Rules(64), forced=[*text[1:], 0])
    error = float(np.abs(output.logits[0].double().numpy() - np.stack(trace.logits)).max())
    assert error < 1e-4
    return 4 * error


def distinct_tokens(rows: int, length: int, *, seed: int = 0) -> Tensor:
    """``[rows, length]`` token ids without repetition inside a row, none of them padding.

    A repeated token has the same key norm in the first layer: a tie that float noise would break.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randperm(VOCABULARY - 1, generator=generator)[:length] + 1 for _ in range(rows)]
    )


def held(cache: object, layer: int, row: int = 0) -> list[list[int]]:
    """Sorted positions held by each key/value head of one row."""
    positions = cache.layers[layer].held().positions[row]
    return [sorted(p for p in head if p >= 0) for head in positions.tolist()]
