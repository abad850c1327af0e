"""compressed-cache: a fixed budget for the key-value cache of a model that thinks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressed_cache.cache import CompressedCache
    from compressed_cache.hf.compile_once import compile_layers_once
    from compressed_cache.hf.decode_loop import decode
    from compressed_cache.hf.draft_length import DraftStatistics
    from compressed_cache.hf.lossless import lossless
    from compressed_cache.policies import POLICIES, Defaults, Policy, PrefillDecode, Slots
    from compressed_cache.policies.methods.h2o import H2O
    from compressed_cache.second_pass import compress
    from compressed_cache.telemetry import Recorder, measure

__all__ = [
    "H2O",
    "POLICIES",
    "CompressedCache",
    "Defaults",
    "DraftStatistics",
    "Policy",
    "PrefillDecode",
    "Recorder",
    "Slots",
    "__version__",
    "compile_layers_once",
    "compress",
    "decode",
    "lossless",
    "measure",
]

__version__ = "0.1.0"

_HOME = {
    "CompressedCache": "compressed_cache.cache",
    "Recorder": "compressed_cache.telemetry",
    "compile_layers_once": "compressed_cache.hf.compile_once",
    "compress": "compressed_cache.second_pass",
    "DraftStatistics": "compressed_cache.hf.draft_length",
    "decode": "compressed_cache.hf.decode_loop",
    "lossless": "compressed_cache.hf.lossless",
    "measure": "compressed_cache.telemetry",
}


def __getattr__(name: str) -> Any:
    # Importing the package alone costs nothing: torch and transformers are loaded at first use.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME.get(name, "compressed_cache.policies")), name)


def __dir__() -> list[str]:
    return list(__all__)
