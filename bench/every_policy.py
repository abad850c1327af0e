"""The policies and combinations that appear in tables of all of them."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

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
    "snapkv+ams",
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
UNTRAINED = ("learned_gate",)
"""Need gates that somebody trained, and none came with this package: no accuracy to measure."""


def statistics(name: str, model: Any) -> dict[str, Any]:
    """Options of a policy that name the statistics it needs, collected on random tokens."""
    scorers, modifiers = split_name(name)
    options = {}
    for part in scorers + modifiers:
        # Those of the prompt are what it has by default.
        if part in STATISTICS and part != "expected_attention":
            option = "gates" if part == "duo_attention" else "calibration"
            options[option] = str(collected(part, model))
        if part in UNTRAINED:
            options["weights"] = str(_drawn(model))
    return options


def _drawn(model: Any) -> Path:
    """Gates that nobody trained: they cost what trained ones cost."""
    config, generator = model.config.get_text_config(), torch.Generator().manual_seed(2)
    gates = {}
    for layer in range(config.num_hidden_layers):
        heads, width = config.num_key_value_heads, config.hidden_size
        gates[f"module_list.{layer}.weight"] = torch.randn(heads, width, generator=generator)
        gates[f"module_list.{layer}.bias"] = torch.zeros(heads)
    path = Path(tempfile.mkdtemp(prefix="gates")) / "gates.safetensors"
    save_file(gates, path)
    return path


def collected(policy: str, model: Any) -> Path:
    """Statistics of a model for a policy, over tokens drawn at random."""
    folder = Path(tempfile.mkdtemp(prefix="statistics"))
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(1, model.config.vocab_size, (512,), generator=generator).tolist()
    path = folder / f"{policy}.safetensors"
    layers = collect(model, [text], policy)
    config = model.config.get_text_config()
    files.save(path, policy=policy, model="random", config=config, tokens=len(text), layers=layers)
    return path
