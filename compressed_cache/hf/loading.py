"""Models that commands load."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from compressed_cache.reasoner import MODEL_PATH


def load(name_or_path: str | Path, *, device: str = "cpu") -> tuple[Any, Any]:
    """Tokenizer and model, with a progress bar where somebody waits for it.

    Raises:
        ValueError: there is no such model; the message is one line.
    """
    is_shipped = Path(name_or_path).resolve() == MODEL_PATH.resolve()
    with progress_bars(sys.stderr.isatty() and not is_shipped):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
            model: Any = AutoModelForCausalLM.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError(why(name_or_path, error)) from None
    return tokenizer, model.to(device).eval()


def why(name_or_path: str | Path, error: Exception) -> str:
    """In one line why there is no such model."""
    # The hub would say that it is no name of a repository.
    if str(name_or_path).startswith(("/", ".", "~")) and not Path(name_or_path).is_dir():
        return f"there is no folder {str(name_or_path)!r}"
    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
    is_offline = "couldn't connect" in said
    return said + (" Without a network, name a folder with the model." if is_offline else "")


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Shows those of transformers or none; shown are only those that nobody has switched off."""
    before = logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()
