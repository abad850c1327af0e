"""Files of statistics, and which model they are of.

A model is told by a hash over the part of its configuration that shapes attention, which does not
change with the path it was loaded from, the dtype or the release of transformers. Models of one
shape but with other weights are told apart by a few weights of each attention layer, compared with
a tolerance: a model in another dtype passes, and so does a close relative, such as a model and what
it was fine-tuned from, whose statistics are nearly the same. Files that others publish
(:mod:`compressed_cache.policies.hub_files`) are read too, and are compared with the model's shape.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compressed_cache.policies import hub_files
from compressed_cache.policies.hub_files import HubFormat
from compressed_cache.policies.view import LayerContext
from compressed_cache.reasoner import MODEL_PATH
from compressed_cache.tensorfile import check_finite, opened, write

FORMAT = "compressed-cache statistics 1"
SHIPPED = MODEL_PATH / "calibration"
_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_ROPE = ("rope_type", "rope_theta", "factor")
_WEIGHTS = "weights"
_SAMPLED = 64
_SIMILAR = 0.9


class _File(NamedTuple):
    """What a file says about itself, and of each layer its tensors by name."""

    metadata: dict[str, str]
    layers: dict[int, dict[str, Tensor]]
    kind: HubFormat | None = None
    """The format of a file that others wrote."""


def model_hash(config: Any) -> str:
    """16 hexadecimal digits for a text config."""
    chosen = {name: getattr(config, name, None) for name in _FIELDS}
    heads = config.num_attention_heads
    chosen["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    by_type = {name: part for name, part in rope.items() if isinstance(part, dict)} or {"": rope}
    chosen["rope"] = {
        name: {field: part[field] for field in _ROPE if field in part}
        for name, part in by_type.items()
    }
    text = json.dumps(chosen, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weight_sample(module: Any) -> Tensor:
    """A few weights of an attention module, float32; none where they are not plain numbers."""
    matrix = next((p for p in module.parameters() if p.dim() == 2), None)
    if matrix is None or not matrix.is_floating_point() or hasattr(matrix, "to_local"):
        return torch.empty(0)
    return matrix.detach()[0, :_SAMPLED].float().cpu()


def save(
    path: Path, *, policy: str, model: str, config: Any, tokens: int, layers: Mapping[int, Any]
) -> None:
    """Writes statistics.

    Args:
        path: the file.
        policy: whose.
        model: name of the model, for people.
        config: its text config.
        tokens: how many they were made of.
        layers: for each layer its attention module and its tensors by name.
    """
    from compressed_cache import __version__

    tensors: dict[str, Tensor] = {}
    for layer, (module, statistics) in layers.items():
        tensors[f"{layer}.{_WEIGHTS}"] = weight_sample(module)
        tensors |= {f"{layer}.{name}": part.float() for name, part in statistics.items()}
    tensors = {name: part.contiguous().cpu() for name, part in tensors.items()}
    metadata = {
        "format": FORMAT,
        "policy": policy,
        "model": model,
        "model_hash": model_hash(config),
        "version": __version__,
        "tokens": str(tokens),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, tensors, metadata)


def describe(path: str | Path) -> dict[str, str]:
    """What a file says about itself.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of something else.
    """
    return _read(path).metadata


def check_policy(path: str | Path, policy: str) -> None:
    """Raises ``ValueError`` for a file of another policy's statistics."""
    path = _file(path, policy)
    found = describe(path)["policy"]
    if found != policy:
        raise ValueError(
            f"{str(path)!r} has statistics for policy {found!r}, not {policy!r}. Where both are "
            f"needed, pass a folder with {found}.safetensors and {policy}.safetensors."
        )


def _file(path: str | Path, policy: str) -> Path:
    """The file, or that of the policy where a folder is given.

    Raises:
        FileNotFoundError: a folder without one.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    names = [f"{policy}.safetensors"]
    if any(kind.policy == policy for kind in hub_files.FORMATS):
        names.append(hub_files.FILE)
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no calibration file {' or '.join(names)} in {str(path)!r}")
    return found


def shipped(policy: str, config: Any) -> Path | None:
    """The file that came with this package for a model of this shape."""
    path = SHIPPED / f"{policy}.safetensors"
    known = path.is_file() and describe(path)["model_hash"] == model_hash(config)
    return path if known else None


def load(
    policy: str, path: str | None, context: LayerContext, *, option: str = "calibration"
) -> dict[str, Tensor]:
    """Statistics of one layer, the heads at hand, on the layer's device.

    Args:
        policy: whose.
        path: the file; None for one that came with this package.
        context: the layer. All tensors but those of the model's weights begin with its heads.
        option: of the policy, by which it takes the path.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file for another policy or of another model, or no file for this one.
    """
    found, metadata = find(policy, path, context.config, option=option)
    file = _read(found)
    tensors = dict(file.layers.get(context.layer, {}))
    if not tensors:
        raise ValueError(f"{str(found)!r} has no statistics of layer {context.layer}")
    if file.kind is not None:
        tensors = hub_files.of_heads(file.kind, tensors, context)
    else:
        name = f"{str(found)!r} (model {metadata['model']!r})"
        _check_weights(tensors.pop(_WEIGHTS), context, name)
    heads = slice(context.first_head, context.first_head + context.heads)
    return {name: part[heads].to(context.device) for name, part in tensors.items()}


def load_layers(
    policy: str, path: str | None, config: Any, name: str, *, option: str = "calibration"
) -> dict[int, Tensor]:
    """One statistic of all layers; arguments and errors as those of :func:`load`."""
    found, _ = find(policy, path, config, option=option)
    layers = _read(found).layers
    return {index: tensors[name] for index, tensors in layers.items() if name in tensors}


def find(
    policy: str, path: str | None, config: Any, *, option: str = "calibration"
) -> tuple[str | Path, dict[str, str]]:
    """The file for a model and what it says about itself; raises as :func:`load`."""
    found = _file(path, policy) if path else shipped(policy, config)
    if found is None:
        name = getattr(config, "name_or_path", "") or "MODEL"
        raise ValueError(
            f"policy {policy!r} needs statistics of the model, and none came with this package for "
            f"{name!r}. Run\n    compressed-cache calibrate --model {name} --policy "
            f"{policy} --out FILE\nand pass {option}=FILE."
        )
    check_policy(found, policy)
    metadata, expected = describe(found), model_hash(config)
    file = _read(found)
    if file.kind is not None:
        hub_files.check_shape(file.kind, file.layers, config, str(found))
        return found, metadata
    if metadata["model_hash"] != expected:
        raise ValueError(
            f"{str(found)!r} has statistics of model {metadata['model']!r} "
            f"(hash {metadata['model_hash']}), not of this one (hash {expected})"
        )
    return found, metadata


def _read(path: str | Path) -> _File:
    """What is in a file, read once and again when it has changed; raises as :func:`describe`."""
    path = Path(path)
    state = path.stat() if path.is_file() else None
    return _read_once(path, state and (state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=2)
# Tensors born in inference mode could not be used outside of it later.
@torch.inference_mode(False)
def _read_once(path: Path, state: tuple[int, int] | None) -> _File:
    with opened(path, what="calibration file") as file:
        metadata, kind = file.metadata() or {}, None
        if metadata.get("format") != FORMAT:
            # By shapes alone: it may be the weights of a model.
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            kind = hub_files.recognised(shapes)
            if kind is None:
                raise ValueError(
                    f"{str(path)!r} must be written by 'compressed-cache calibrate' in "
                    f"format {FORMAT!r}, or be a file of kvpress with query_mean and query_cov or "
                    f"of Q-Filters with q_filters, got format {metadata.get('format')!r} with "
                    f"{', '.join(sorted(shapes)[:3])}"
                )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        check_finite(path, name, tensor)
    if kind is not None:
        return _File({"policy": kind.policy}, hub_files.by_layer(kind, tensors), kind)
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        layers.setdefault(int(index), {})[name] = tensor
    return _File(metadata, layers)


def _check_weights(known: Tensor, context: LayerContext, file: str) -> None:
    # Another process of tensor parallelism has other rows.
    found = weight_sample(context.module)
    if context.first_head or not len(found) or not len(known):
        return
    if len(found) != len(known) or torch.cosine_similarity(found, known, dim=0) < _SIMILAR:
        raise ValueError(
            f"{file} has statistics of a model like this one (hash {model_hash(context.config)}) "
            "but with other weights"
        )
