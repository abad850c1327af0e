"""Texts that the full cache wrote, and batches of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from compressed_cache.ops.masks import left_padded

FILE = "texts.jsonl"


@dataclass(frozen=True, kw_only=True)
class Text:
    """A prompt and what the full cache went on with."""

    document: str
    """What identifies the prompt."""
    prompt: list[int]
    """Token ids."""
    answer: list[int]
    """Token ids, the one that ends the text included."""
    words: str
    """The answer as it is read."""
    weights: str
    """A digest of those of the model."""


class Batch(NamedTuple):
    """Left-padded prompts and the answers after them."""

    ids: Tensor
    """``[B, L]`` int64."""
    mask: Tensor
    """``[B, L]`` int64, 0 where padded."""
    answers: Tensor
    """``[B, T]`` int64, 0 after the end of an answer."""
    lengths: Tensor
    """``[B]`` int64 of the answers."""


def batch(texts: Sequence[Text], device: torch.device | str) -> Batch:
    """The texts as one batch."""
    ids, mask = left_padded([text.prompt for text in texts])
    lengths = torch.tensor([len(text.answer) for text in texts])
    answers = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
    for row, text in zip(answers, texts, strict=True):
        row[: len(text.answer)] = torch.tensor(text.answer)
    return Batch(*(tensor.to(device) for tensor in (ids, mask, answers, lengths)))


def write(folder: Path, texts: Sequence[Text]) -> None:
    """Keeps texts in a folder."""
    with (folder / FILE).open("w") as file:
        file.writelines(json.dumps(asdict(text)) + "\n" for text in texts)


def read(folder: Path) -> list[Text]:
    """The texts of a folder.

    Raises:
        ValueError: there are none, or they are not complete.
    """
    path = folder / FILE
    try:
        return [Text(**json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must hold the texts of the full cache, got: {error}. Remove {folder} to have "
            "them written again"
        ) from None
