"""Safetensors files, refused in words."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


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
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {what} {str(path)!r}")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file: {error}") from None
