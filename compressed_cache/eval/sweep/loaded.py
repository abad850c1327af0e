"""The model of this process, and what it runs on."""

import functools
import hashlib
import importlib.metadata
import json
import platform
from typing import Any

import torch

from compressed_cache.eval.sweep.plan import Plan
from compressed_cache.hf.loading import progress_bars
from compressed_cache.integrations.harness import adapter

_SAMPLE = 2**18
"""Numbers of each weight that its digest looks at."""
PACKAGES = ("compressed-cache", "lm-eval", "torch", "transformers")


def model(plan: Plan) -> Any:
    """The harness's model; the cells of a process share it."""
    return _model(json.dumps({"pretrained": plan.pretrained} | plan.model_args), plan.batch_size)


def forget() -> None:
    """The next cell loads the model anew."""
    _model.cache_clear()


def versions() -> dict[str, str]:
    """Of Python and of the packages that shape a row."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | found


def machine(model: Any) -> dict[str, str | int]:
    """What a model computes on, and in."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def digest(model: Any) -> str:
    """Of names, shapes and the first numbers of all weights."""
    found = hashlib.sha256()
    for name, weight in model.state_dict().items():
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        start = weight.detach().flatten()[:_SAMPLE].cpu().contiguous()
        found.update(start.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


@functools.lru_cache(maxsize=1)
def _model(arguments: str, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    adapter.patch(HFLM)
    model: Any = HFLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with progress_bars(False):
        return model(**json.loads(arguments), kv_press="full", device=device, batch_size=batch_size)
