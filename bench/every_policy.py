"""The policies and combinations that appear in tables of all of them."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from compressed_cache.calibration.recording import collect
from compressed_cache.calibration.statistics import STATISTICS
from compressed_cache.policies import POLICIES, split_name
from compressed_cache.policies import statistics_file as files
from compressed_cache.policies.capabilities import ReadsTwice

COMBINATIONS = (
    "snapkv+adakv",
    "snapkv+duo_attention",
    "snapkv+simlayerkv",
    "snapkv+criticalkv",
    "snapkv+chunkkv",
    "snapkv+chunk",
    "h2o+caote",
    "streaming_llm+key_rerotation",
    "h2o+merging",
    "h2o+think",
)
# A benchmark reads a prompt once.
EVERY = (
    *(name for name, kind in POLICIES.items() if not issubclass(kind, ReadsTwice)),
    *COMBINATIONS,
)


def statistics(name: str, model: Any) -> dict[str, Any]:
    """Options of a policy that name the statistics it needs, collected on random tokens."""
    scorers, modifiers = split_name(name)
    options = {}
    for part in scorers + modifiers:
        # Those of the prompt are what it has by default.
        if part in STATISTICS and part != "expected_attention":
            option = "gates" if part == "duo_attention" else "calibration"
            options[option] = str(_collected(part, model))
    return options


def _collected(policy: str, model: Any) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="statistics"))
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(1, model.config.vocab_size, (512,), generator=generator).tolist()
    path = folder / f"{policy}.safetensors"
    layers = collect(model, [text], policy)
    config = model.config.get_text_config()
    files.save(path, policy=policy, model="random", config=config, tokens=len(text), layers=layers)
    return path
