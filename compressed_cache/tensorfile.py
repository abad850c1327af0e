"""Safetensors files, refused in words."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


@contextmanager
def opened(path: str | Path, *, what: str = "file", device: str = "cpu") -> Iterator[Any]:
    """A safetensors file to read from.

    Args:
        path: the file.
        what: what a user takes it for.
        device: where its tensors go.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of something else.
    """
    if Path(path).is_dir():
        raise FileNotFoundError(f"{str(path)!r} is a folder, not a {what}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {what} {str(path)!r}")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file: {error}") from None


def check_finite(path: str | Path, name: str, tensor: Tensor) -> None:
    """Raises ``ValueError`` for a tensor of a file with a number that is none or has no end."""
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{str(path)!r} must have finite numbers, got NaN or infinity in {name}")
