"""What a policy said, by document, and what a row says of all of them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from compressed_cache.eval.agreement.reading import Compared
from compressed_cache.eval.agreement.text import Text


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, at each of its tokens what was said before it."""

    name: str
    prompt_tokens: int
    late: int
    """The first late token: what was said before it came from fewer tokens than there were. As
    many as there are tokens if none is."""
    same: list[bool]
    divergence: list[float]
    lost: list[float]

    @classmethod
    def of(cls, text: Text, compared: Compared, row: int, budget: int | None) -> "Document":
        """A row of a batch, up to the end of its text."""
        length = len(text.answer)
        prompt = len(text.prompt)
        # The first token comes from the whole prompt, however long that is.
        late = length if budget is None else min(max(1, budget + 1 - prompt), length)
        return cls(
            name=text.document,
            prompt_tokens=prompt,
            late=late,
            same=compared.same[row, :length].tolist(),
            divergence=compared.divergence[row, :length].tolist(),
            lost=compared.lost[row, :length].tolist(),
        )

    @property
    def first_difference(self) -> int:
        """Tokens before the first other most likely token."""
        return self.same.index(False) if False in self.same else len(self.same)

    def to_json(self) -> dict[str, Any]:
        """What a cell keeps, numbers with as many digits as mean something."""
        return {
            "document": self.name,
            "prompt_tokens": self.prompt_tokens,
            "late": self.late,
            "same": [int(one) for one in self.same],
            "divergence": [float(f"{one:.4g}") for one in self.divergence],
            "lost": [float(f"{one:.4g}") for one in self.lost],
        }


def summary(documents: Sequence[Document]) -> dict[str, Any]:
    """The fields of :class:`~compressed_cache.eval.results.row.Agreement` that are means."""
    late = [one for one in documents if one.late < len(one.same)]
    agreements = {one.name: fmean(one.same[one.late :]) for one in late}
    return {
        "documents": len(documents),
        "prompt_tokens": fmean(one.prompt_tokens for one in documents),
        "text_tokens": fmean(len(one.same) for one in documents),
        "late_documents": len(late),
        "late_positions": sum(len(one.same) - one.late for one in late),
        **_mean("agreement", agreements.values()),
        **_mean("divergence", [fmean(one.divergence[one.late :]) for one in late]),
        **_mean("lost", [fmean(one.lost[one.late :]) for one in late]),
        # Every text has a first token, and its late ones come after it.
        "early_agreement": fmean(fmean(one.same[: one.late]) for one in documents),
        "early_divergence": fmean(fmean(one.divergence[: one.late]) for one in documents),
        "early_lost": fmean(fmean(one.lost[: one.late]) for one in documents),
        **_mean("first_difference", [one.first_difference for one in documents]),
        "identical": fmean(all(one.same) for one in documents),
        "agreements": agreements,
    }


def _mean(name: str, values: Iterable[float]) -> dict[str, float | None]:
    """The mean over documents and its standard error."""
    own = list(values)
    error = stdev(own) / math.sqrt(len(own)) if len(own) > 1 else None
    return {name: float(fmean(own)) if own else None, f"{name}_se": error}
