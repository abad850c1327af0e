"""Safetensors files, refused in words."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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


def write(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: it cannot be written there.
    """
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that is there, got {str(path)!r}")
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} cannot be written: {error}") from None


def check_folder(folder: str | Path) -> None:
    """Makes a folder where there is none, and raises ``OSError`` if files cannot be written there.

    For what takes long and writes at its end.
    """
    if Path(folder).is_file():
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(folder))
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_finite(path: str | Path, name: str, tensor: Tensor) -> None:
    """Raises ``ValueError`` for a tensor of a file with a number that is none or has no end."""
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{str(path)!r} must have finite numbers, got NaN or infinity in {name}")
